// int8_lora_linear on a CPU.
//   y[m, n] = act(sum_k q_x[m, k] q_w[n, k] * (s_x[m] s_w[n]) + bias[n] + t[m] B[:, n]) + residual[m, n], t = s x At
//   x [M, K]; W packed in blocks of 64 channels (int8_packing.h); 2 M N K integer operations on N K bytes of weights.
// Few rows are bound by those bytes: every block is read once, in order, and prefetched ahead of its use. Many rows are
// bound by the integer units: rows are quantized a chunk at a time, which stays in the second cache while every block
// of weights passes over it. Either way a task owns a range of rows and a range of blocks and does all of its work, so
// that a call forks once: quantizing a few rows once per task costs less than a second fork. (With a screen it forks
// twice, int8_screen.inl.)
//   LoRA-up is r more steps over k on the sums, once they are fp32; bias, activation and residual follow before y is
//   written. Few rows read A while they are normalized and quantized, and B beside the weights. Many rows with bf16
//   adapters multiply pairs where the CPU does so faster (plan.bf16_dot): x and t are rounded to bf16.
// Measured (one core with AVX-512 VNNI and a peak of 970 Gop/s, weights in cache): 256 rows of 512 x 512 800 Gop/s with
// quantization and bias, 83 % of the peak; GELU adds 13 %, the residual 6 %. One Zen 5 core, a live adapter of rank 16:
// at 1,500 rows 19 % (512 x 512, LayerNorm included), 13 % (512 to 2,048) and 10 % (2,048 to 512), without pairs 20, 17
// and 16; at one row, out of cache, 25 to 30 %, of which the bytes are 8 to 12. Tried and lost: integer products
// inlined into the tile (g++ keeps the sums in memory: a third of the speed), prefetching y.

constexpr int64_t kBlockBytesPerStep = kInt8BlockChannels * kInt8StepDepth;
constexpr int kPanelsPerBlock = static_cast<int>(kInt8BlockChannels / kPanel);
// A chunk of quantized rows takes at most this of the second cache: weights, x and y pass through the rest ...
constexpr int64_t kChunkBytes = 192 * 1024;
// ... but it has enough rows to pay for reading all weights again, and few enough for x in fp32 to stay there as well.
constexpr int64_t kFewestChunkRows = 48, kMostChunkRows = 96;
// From here on rows are split over the tasks before columns are: quantizing all rows in every task would cost more than
// reading all weights in every task.
constexpr int64_t kSplitRows = 48;
// From here on (of a group that shares an adapter) bf16 adapters are multiplied as pairs, x and t rounded to bf16. Not
// below: decoding steps keep fp32.
constexpr int64_t kPairRows = 48;
// Weights in flight between memory and the registers: latency times the bandwidth of one core.
constexpr int64_t kStreamBytes = 4096;
// Weights that few rows ask for while they are quantized and meet the adapters.
constexpr int64_t kFirstBytes = 16384;

// Tasks are a grid of row ranges and block ranges.
struct Int8Grid {
  int64_t row_parts, block_parts;
};
inline int64_t int8_blocks(const Int8LoraLinearProblem& p) {
  return round_up(p.out_features, kInt8BlockChannels) / kInt8BlockChannels;
}
inline Int8Grid int8_grid(const Int8LoraLinearProblem& p, int64_t tasks) {
  int64_t row_parts = p.rows / kSplitRows;
  row_parts = row_parts < 1 ? 1 : row_parts < tasks ? row_parts : tasks;
  const int64_t block_parts = tasks / row_parts, blocks = int8_blocks(p);
  return {row_parts, block_parts < blocks ? block_parts : blocks > 0 ? blocks : 1};
}

// Rows of a chunk: as equal as can be.
inline int64_t int8_chunk_rows(const Int8LoraLinearProblem& p, int64_t rows) {
  int64_t most = kChunkBytes / (p.in_features > 0 ? p.in_features : 1);
  most = most < kFewestChunkRows ? kFewestChunkRows : most > kMostChunkRows ? kMostChunkRows : most;
  most -= most % kInt8TileRows;
  const int64_t chunks = (rows + most - 1) / most;
  return chunks > 1 ? round_up((rows + chunks - 1) / chunks, kInt8TileRows) : rows;
}

// Scratch of one task, in floats; one description serves the size and the pointers.
struct Int8Scratch {
  int64_t used = 0;
  float* base;
  int64_t rows, q_stride;
  uint8_t* q;     // [rows][q_stride], quantized rows
  float* scales;  // [rows], s_x
  float* x;       // [rows][K], x as fp32 where it is normalized, or stored otherwise and LoRA wants it
  bf16* pairs;    // [rows][K], x as the LoRA branch wants it where it multiplies pairs
  float* t;       // [rows][padded rank], fp32, or bf16 where the LoRA branch multiplies pairs
  float* down;    // the panel of A
  float* up;      // [kPanelsPerBlock] panels of B

  Int8Scratch(float* memory, const Int8LoraLinearPlan& plan, const Int8Grid& grid) : base(memory) {
    const Int8LoraLinearProblem& p = plan.problem;
    const bool lora = p.lora.present(), pairs_wanted = plan.bf16_dot;
    rows = int8_chunk_rows(p, (p.rows + grid.row_parts - 1) / grid.row_parts);
    // One cache line more than a multiple: rows of a power of two do not share the sets of the first cache.
    q_stride = round_up(p.in_features, 64) + 64;
    q = reinterpret_cast<uint8_t*>(take(rows * q_stride / 4));
    scales = take(rows);
    x = take(p.has_norm || (lora && p.dtype != DType::kFloat32 && !pairs_wanted) ? rows * p.in_features : 0);
    pairs = reinterpret_cast<bf16*>(take(pairs_wanted ? rows * p.in_features / 2 : 0));
    t = take(lora ? rows * padded_rank(p.lora) : 0);
    down = take(lora ? down_scratch(p.lora, p.in_features) : 0);
    up = take(lora ? round_up(p.lora.max_rank, 2) * kInt8BlockChannels : 0);
  }
  float* take(int64_t floats) {
    float* p = base + used;
    used += round_up(floats, 16);
    return p;
  }
};

// ---------- Integer products

enum class Ahead {
  kNothing,
  kStream,     // the weights that this tile will need soon, as it is the first to read them, and `beside`
  kNextBlock,  // one line of the next block per step, into the second cache
};
struct AheadOfTile {
  Ahead what = Ahead::kNothing;
  const uint8_t* next = nullptr;  // of kNextBlock
  ReadAhead* beside = nullptr;    // or null; spread over the steps, as a burst would be lost behind the weights
};

// sums[i][j] = start[j] (or 0) + q[i] . vector j of the block, over `steps` steps of four k, for MR rows and NV
// vectors. A function of its own on purpose: inlined beside other uses of the sums, g++ 12 keeps them in memory and
// stores them in every step.
template <Ahead kAhead, int MR, int NV>
LORA_KERNELS_APART void int8_dots(const int32_t* start, const uint8_t* q, int64_t q_stride, const uint8_t* w,
                                  int64_t steps, const AheadOfTile& ahead, int32_t* sums) {
  const uint8_t* next = ahead.next;
  const int64_t beside = ahead.beside ? ahead.beside->total() : 0;
  int64_t due = 0;
  I c[MR][NV];
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) c[i][j] = kUnsignedActivations ? load_int(start + j * kLanes) : set_int(0);
  for (int64_t step = 0; step < steps; ++step, q += kInt8StepDepth, w += kBlockBytesPerStep) {
    if constexpr (kAhead == Ahead::kStream) {
#pragma GCC unroll 4
      for (int j = 0; j < kBlockBytesPerStep; j += 64) prefetch(w + kStreamBytes + j);
      for (due += beside; due >= steps; due -= steps) ahead.beside->lines(1);
    } else if constexpr (kAhead == Ahead::kNextBlock) {
      __builtin_prefetch(next, 0, 2);
      next += 64;
    }
    Weights b[NV];
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) b[j] = load_weights(w + j * sizeof(I));
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      int32_t four;
      memcpy(&four, q + i * q_stride, sizeof four);
      const I x = set_int(four);
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) int8_dot_into(c[i][j], x, b[j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) store_int(sums + (i * NV + j) * kLanes, c[i][j]);
}

// ---------- Outputs

// The last steps for `rows` rows of up to 64 columns, whose sums are in `sums` (rows of 64): activation, residual,
// storage.
template <class T>
inline void finish_rows(const Epilogue& e, int64_t m, int64_t column, int64_t columns, int64_t rows, float* sums) {
  if (e.activation != Activation::kNone)
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; j += kLanes) {
        float* v = sums + i * kInt8BlockChannels + j;
        store(v, activate(load(v), e.activation));
      }
  for (int64_t i = 0; i < rows; ++i) {
    const float* v = sums + i * kInt8BlockChannels;
    const int64_t at = (m + i) * e.out_features + column;
    T* y = static_cast<T*>(e.y) + at;
    const T* residual = e.residual ? static_cast<const T*>(e.residual) + at : nullptr;
    int64_t j = 0;
    for (; j + kLanes <= columns; j += kLanes) store(y + j, residual ? load(v + j) + load(residual + j) : load(v + j));
    if (const int rest = static_cast<int>(columns - j))
      store_n(y + j, residual ? load(v + j) + load_n(residual + j, rest) : load(v + j), rest);
  }
}

// What the tiles of one task share.
struct Int8Task {
  const Bank* bank;  // null: no LoRA branch
  Epilogue epilogue;
  int64_t steps;  // of four k
  Int8Scratch s;
  int64_t first_row;  // of the chunk
  int64_t top;        // outputs to keep of each row; 0: store them all
  bool log_sum;
  float* lists;  // of every row of x, by this task's blocks
  // of the block at hand
  const uint8_t* weights;
  const float *weight_scales, *bias;
  const int32_t* compensation;
  int64_t column;                 // its first
  int64_t last[kPanelsPerBlock];  // whose panel of B each part of s.up holds
  UpPanel up[kPanelsPerBlock];
};

// MR rows (from row i of the chunk on) times NV vectors of the block (from channel c on)
template <int MR, int NV>
LORA_KERNELS_APART void int8_tile(Int8Task& task, int64_t i, int64_t c, const AheadOfTile& ahead) {
  const Int8Scratch& s = task.s;
  const uint8_t *q = s.q + i * s.q_stride, *w = task.weights + c * kInt8StepDepth;
  const int32_t* start = task.compensation + c;
  // The residual travels while the products are computed. (The same for y gained nothing: stores are buffered.)
  if (task.epilogue.residual) {
    const int64_t size = size_of(task.epilogue.dtype);
    for (int r = 0; r < MR; ++r) {
      const char* row = static_cast<const char*>(task.epilogue.residual) +
                        ((task.first_row + i + r) * task.epilogue.out_features + task.column + c) * size;
      for (int64_t byte = 0; byte < NV * kLanes * size; byte += 64) prefetch(row + byte);
    }
  }
  alignas(64) int32_t products[MR * NV * kLanes];
  if (ahead.what == Ahead::kStream)
    int8_dots<Ahead::kStream, MR, NV>(start, q, s.q_stride, w, task.steps, ahead, products);
  else if (ahead.what == Ahead::kNextBlock)
    int8_dots<Ahead::kNextBlock, MR, NV>(start, q, s.q_stride, w, task.steps, ahead, products);
  else
    int8_dots<Ahead::kNothing, MR, NV>(start, q, s.q_stride, w, task.steps, ahead, products);

  alignas(64) float sums[MR * kInt8BlockChannels];
  const int64_t m = task.first_row + i;
#pragma GCC unroll 8
  for (int part = 0; part < NV; part += kTileVectors) {
    Tile<MR, kTileVectors> tile;
#pragma GCC unroll 4
    for (int j = 0; j < kTileVectors; ++j) {
      const int64_t channel = c + (part + j) * kLanes;
      const F scale = load(task.weight_scales + channel), bias = load(task.bias + channel);
#pragma GCC unroll 8
      for (int r = 0; r < MR; ++r)
        tile.sum[r][j] =
            to_float(load_int(products + (r * NV + part + j) * kLanes)) * (set(s.scales[i + r]) * scale) + bias;
    }
    const int64_t left = task.epilogue.out_features - task.column - c - part * kLanes;
    if (task.bank && left > 0) {
      const int64_t panel = (c + part * kLanes) / kPanel;
      const int64_t row = i * padded_rank(task.bank->shape), columns = left < kPanel ? left : kPanel;
      const auto add = [&](const auto* t) {
        add_lora(tile, *task.bank, m, t + row, task.column + panel * kPanel, columns,
                 s.up + panel * kPanel * round_up(task.bank->shape.max_rank, 2), &task.last[panel], &task.up[panel]);
      };
      task.bank->pairs ? add(reinterpret_cast<const bf16*>(s.t)) : add(s.t);
    }
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < kTileVectors; ++j) store(sums + r * kInt8BlockChannels + (part + j) * kLanes, tile.sum[r][j]);
  }
  const int64_t left = task.epilogue.out_features - task.column - c, columns = left < NV * kLanes ? left : NV * kLanes;
  if (columns <= 0) return;
  if (task.top) {
    for (int r = 0; r < MR; ++r)
      TopList(task.lists + (m + r) * TopList::floats(task.top, task.log_sum), task.top, task.log_sum)
          .take(sums + r * kInt8BlockChannels, task.column + c, columns);
    return;
  }
  with_type(task.epilogue.dtype, task.epilogue.y, [&](auto* y) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(y)>>;
    finish_rows<T>(task.epilogue, m, task.column + c, columns, MR, sums);
  });
}

// One block of 64 channels for all rows of the chunk. `beside` (or null) is what the first tile asks for besides.
inline void int8_block(Int8Task& task, int64_t rows, int64_t block_bytes, ReadAhead* beside) {
  const uint8_t* next = task.weights + block_bytes;
  if (rows == 1) {
    for (int64_t c = 0; c < kInt8BlockChannels; c += kInt8RowVectors * kLanes)
      int8_tile<1, kInt8RowVectors>(task, 0, c, {Ahead::kStream, nullptr, c == 0 ? beside : nullptr});
    return;
  }
  constexpr int64_t kWidth = kInt8TileVectors * kLanes;
  const int64_t tiles = (rows + kInt8TileRows - 1) / kInt8TileRows, calls = tiles * (kInt8BlockChannels / kWidth);
  int64_t call = 0;
  for (int64_t c = 0; c < kInt8BlockChannels; c += kWidth)
    for (int64_t i = 0; i < rows; ++call) {
      const int64_t count = tile_rows(rows - i, kInt8TileRows);
      AheadOfTile ahead;
      if (calls < 4) {
        if (call == 0) ahead = {Ahead::kStream, nullptr, beside};
      } else if (call < 4) {  // each of the first four fetches a quarter of the next block
        ahead = {Ahead::kNextBlock, next + call * task.steps * 64, nullptr};
      }
      with_rows<kInt8TileRows>(count,
                               [&](auto tag) { int8_tile<decltype(tag)::value, kInt8TileVectors>(task, i, c, ahead); });
      i += count;
    }
}

// ---------- A task

// Normalizes (where asked) and quantizes rows [begin, end) of x, and computes their t.
template <class Ahead>
inline void int8_prepare(const Int8LoraLinearProblem& p, const Int8LoraLinearArgs& args, const Int8Task& task,
                         int64_t begin, int64_t end, int64_t* packed_adapter, Ahead& ahead) {
  const int64_t K = p.in_features;
  const Int8Scratch& s = task.s;
  const float* x_scale = p.static_scale ? args.x_scale : nullptr;
  const bool pairs = task.bank && task.bank->pairs;
  // Where x is fp32 already, or nobody but the quantization reads it as that, it is read as it lies.
  const bool copied = p.has_norm || (task.bank && !pairs && p.dtype != DType::kFloat32);
  with_type(p.dtype, args.x, [&](auto* x) {
    for (int64_t m = begin; m < end; ++m) {
      const int64_t i = m - begin;
      const auto* row = x + m * args.x_stride;
      uint8_t* q = s.q + i * s.q_stride;
      float* copy = s.x + i * K;
      if (p.has_norm)
        with_type(p.norm_dtype, args.norm_weight, [&](auto* weight) {
          normalize_row(row, K, weight, static_cast<decltype(weight)>(args.norm_bias), p.norm_eps, copy, ahead);
        });
      else if (copied)
        convert_row(row, K, copy);
      s.scales[i] = copied ? quantize(copy, K, x_scale, q, ahead) : quantize(row, K, x_scale, q, ahead);
      if (pairs) copied ? convert_row_for_dot(copy, K, s.pairs + i * K) : convert_row_for_dot(row, K, s.pairs + i * K);
    }
  });
  if (!task.bank) return;
  if (pairs) {
    down_pairs(*task.bank, s.pairs - begin * K, K, begin, end, K, reinterpret_cast<bf16*>(s.t), s.down, packed_adapter);
    return;
  }
  const float* x = copied ? s.x - begin * K : static_cast<const float*>(args.x);
  down_rows(*task.bank, x, copied ? K : args.x_stride, begin, end, K, s.t, s.down, packed_adapter, ahead);
}

inline void int8_run_task(const Int8LoraLinearPlan& plan, const Int8LoraLinearArgs& args, const Bank& bank,
                          const Int8Grid& grid, int64_t index, float* memory, float* lists) {
  const Int8LoraLinearProblem& p = plan.problem;
  const int64_t blocks = int8_blocks(p), block_bytes = int8_block_bytes(p.in_features);
  const int64_t row_part = index / grid.block_parts, block_part = index % grid.block_parts;
  const int64_t first = p.rows * row_part / grid.row_parts, end = p.rows * (row_part + 1) / grid.row_parts;
  const int64_t first_block = blocks * block_part / grid.block_parts;
  const int64_t last_block = blocks * (block_part + 1) / grid.block_parts;
  const Epilogue epilogue = {p.has_bias ? args.bias : nullptr,
                             p.bias_dtype,
                             p.activation,
                             p.has_residual ? args.residual : nullptr,
                             args.y,
                             p.dtype,
                             p.out_features};
  alignas(64) float bias[kInt8BlockChannels] = {};
  Int8Task task{bank.present() ? &bank : nullptr,
                epilogue,
                int8_padded_depth(p.in_features) / kInt8StepDepth,
                Int8Scratch(memory, plan, grid),
                0,
                p.top_k,
                p.log_sum,
                lists + block_part * p.rows * TopList::floats(p.top_k, p.log_sum),
                nullptr,
                nullptr,
                bias,
                nullptr,
                0,
                {},
                {}};
  const bool few = p.rows <= kRowsAsItLies;
  int64_t packed_adapter = -1;
  for (int64_t m = first; m < end; m += task.s.rows) {
    const int64_t stop = m + task.s.rows < end ? m + task.s.rows : end;
    if (few) {  // what lies in memory travels while the rows are quantized: the adapters, then the first weights
      ReadAhead ahead;
      if (task.bank) {
        add_down(bank, m, stop, p.in_features, &ahead);
        add_up(bank, m, stop, first_block * kInt8BlockChannels, p.out_features, &ahead);
      }
      ahead.add(args.packed_weight + first_block * block_bytes, kFirstBytes);
      int8_prepare(p, args, task, m, stop, &packed_adapter, ahead);
    } else {
      NothingAhead nothing;
      int8_prepare(p, args, task, m, stop, &packed_adapter, nothing);
    }
    task.first_row = m;
    if (p.top_k)
      for (int64_t row = m; row < stop; ++row)
        TopList(task.lists + row * TopList::floats(p.top_k, p.log_sum), p.top_k, p.log_sum).clear();
    for (int64_t block = first_block; block < last_block; ++block) {
      task.weights = args.packed_weight + block * block_bytes;
      task.weight_scales = reinterpret_cast<const float*>(task.weights + task.steps * kBlockBytesPerStep);
      task.compensation = reinterpret_cast<const int32_t*>(task.weight_scales + kInt8BlockChannels);
      task.column = block * kInt8BlockChannels;
      for (int64_t& last : task.last) last = -1;
      if (p.has_bias)
        with_type(p.bias_dtype, args.bias, [&](auto* values) {
          for (int64_t c = 0; c < kInt8BlockChannels; c += kLanes)
            store(bias + c, load_at(values + task.column, c, p.out_features - task.column));
        });
      ReadAhead up;  // of the next block
      if (task.bank && few) add_up(bank, m, stop, task.column + kInt8BlockChannels, p.out_features, &up);
      int8_block(task, stop - m, block_bytes, up.total() ? &up : nullptr);
    }
  }
}
