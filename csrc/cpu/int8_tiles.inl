// int8_lora_linear of many rows in tiles (AMX): the formula and the packed weights of int8_lora_linear.inl.
//   A task owns a range of rows and a range of blocks. Rows are quantized a chunk at a time, into tiles of 16 rows and
// 64 k that lie behind each other, and meet their adapter (lora_tiles.inl) while they are in the first cache; a chunk
// stays in the second. Over it pass the blocks of 64 channels, half a block at a time, which is 16 KB at 512 k and
// stays in the first cache: 2 x 2 sums of 16 x 16, four tiles loaded for four products. A chunk has one adapter.
//   The outputs of 32 x 32 sums (scales, bias, LoRA, activation, residual, storage) are vector work, and are made while
// the tiles of the next 32 x 32 are multiplied: a few rows after each step over k. One after the other they would take
// as long as the products at 512 k.
//   2 M N K integer operations; a tile takes 16 cycles per product, 2,048 multiply-adds in each.

// Fewer rows are bound by the bytes of the weights, and by quantization where a task has them all.
constexpr int64_t kFewestTileRows = 48;
// Rows quantized at a time: weights pass once per chunk, out of the second cache or beyond.
constexpr int64_t kMostTileChunkRows = 256;
constexpr int64_t kTileChunkBytes = 512 * 1024;  // but no more of the second cache
// Weights that stay in the second cache while the strips of a chunk pass over them.
constexpr int64_t kGroupBytes = 1024 * 1024;
constexpr int kAheadLines = 32;  // of weights per step: what a step multiplies

constexpr int64_t kRestBytes = kTileSide * kBlockBytesPerStep;

inline LoraPlanes int8_planes(const Int8LoraLinearPlan& plan) { return {plan.bf16_dot ? 1 : kMostPlanes}; }

// Scratch of one task, in floats; one description serves the size and the pointers.
struct Int8TileScratch {
  int64_t used = 0;
  float* base;
  int64_t rows, steps, group_bytes;  // of a chunk; of 64 k; of 16 quantized rows
  int64_t x_stride, t_stride;        // of a plane of x, and of t of 16 rows, in bf16
  uint8_t* q;                        // [rows / 16][steps][16][64]
  float* scales;                     // [rows], s_x
  float* row;                        // [K], a row of x as fp32
  bf16 *x, *t, *down, *up;           // lora_tiles.inl; x of 16 rows, t of the chunk, up of all blocks
  int64_t up_stride;                 // of a block
  uint8_t* rests;                    // [blocks][16][256], last weights of blocks where K is no multiple of 64
  float* bias;                       // [blocks][64]
  int32_t* sums;                     // [2][32][32]
  float* branches;                   // [2][32][32]

  Int8TileScratch(float* memory, const Int8LoraLinearPlan& plan, const Int8Grid& grid) : base(memory) {
    const Int8LoraLinearProblem& p = plan.problem;
    const int64_t task_rows = (p.rows + grid.row_parts - 1) / grid.row_parts;
    int64_t most = kTileChunkBytes / (p.in_features + 1) / kMacroRows * kMacroRows;
    most = most < kFewestTileRows ? 2 * kMacroRows : most > kMostTileChunkRows ? kMostTileChunkRows : most;
    const int64_t chunks = (task_rows + most - 1) / most;
    rows = round_up((task_rows + chunks - 1) / chunks, kMacroRows);
    steps = round_up(p.in_features, kTileDepth) / kTileDepth;
    group_bytes = steps * kTileBytes;
    const LoraPlanes planes = int8_planes(plan);
    const bool lora = p.lora.present();
    const int64_t depth = round_up(p.in_features, kTileDepthBf16);
    x_stride = depth * kTileSide;
    t_stride = planes.depth(p.lora.max_rank) * kTileSide;
    q = reinterpret_cast<uint8_t*>(take(rows / kTileSide * group_bytes / 4));
    scales = take(rows);
    row = take(p.has_norm || p.dtype != DType::kFloat32 ? p.in_features : 0);
    x = reinterpret_cast<bf16*>(take(lora ? planes.count * x_stride / 2 : 0));
    t = reinterpret_cast<bf16*>(take(lora ? rows / kTileSide * t_stride / 2 : 0));
    down = reinterpret_cast<bf16*>(take(lora ? planes.count * down_tiles(p.lora.max_rank, p.in_features) * 256 : 0));
    const int64_t blocks = (int8_blocks(p) + grid.block_parts - 1) / grid.block_parts;
    up_stride = planes.depth(p.lora.max_rank) * kInt8BlockChannels;
    up = reinterpret_cast<bf16*>(take(lora ? blocks * up_stride / 2 : 0));
    rests = reinterpret_cast<uint8_t*>(take(p.in_features % kTileDepth ? blocks * kRestBytes / 4 : 0));
    bias = take(blocks * kInt8BlockChannels);
    sums = reinterpret_cast<int32_t*>(take(2 * kMacroRows * kMacroColumns));
    branches = take(lora ? 2 * kMacroRows * kMacroColumns : 0);
  }
  float* take(int64_t floats) {
    float* p = base + used;
    used += round_up(floats, 16);
    return p;
  }
};

// ---------- Outputs

// Sums of up to 32 rows and 32 columns that are to become outputs.
struct Int8Unfinished {
  const int32_t* sums;                             // [32][32]
  const float* branch;                             // [32][32], or null
  const float *row_scales, *weight_scales, *bias;  // of its first row and column
  const int32_t* compensation;                     //
  int64_t row = 0, column = 0;                     // of y
  int64_t rows = 0, columns = 0;                   // that exist
  int64_t done = 0;                                // rows
};

// The outputs of rows [from, to).
template <class T, Activation kActivation, bool kBranch>
LORA_KERNELS_APART void int8_finish(const Epilogue& e, const Int8Unfinished& u, int64_t from, int64_t to) {
  constexpr int kVectors = static_cast<int>(kMacroColumns) / kLanes;
  F scale[kVectors], bias[kVectors];
  I start[kVectors];
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; ++j) {
    scale[j] = load(u.weight_scales + j * kLanes), bias[j] = load(u.bias + j * kLanes);
    start[j] = load_int(u.compensation + j * kLanes);
  }
  for (int64_t i = from; i < to; ++i) {
    const F row_scale = set(u.row_scales[i]);
    const int64_t at = (u.row + i) * e.out_features + u.column;
    T* y = static_cast<T*>(e.y) + at;
    const T* residual = e.residual ? static_cast<const T*>(e.residual) + at : nullptr;
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      const int64_t place = i * kMacroColumns + j * kLanes, left = u.columns - j * kLanes;
      F v = to_float(load_int(u.sums + place) + start[j]) * (row_scale * scale[j]) + bias[j];
      if constexpr (kBranch) v = v + load(u.branch + place);
      v = activate(v, kActivation);
      if (left >= kLanes) {
        if (residual) v = v + load(residual + j * kLanes);
        store(y + j * kLanes, v);
      } else if (left > 0) {
        if (residual) v = v + load_n(residual + j * kLanes, static_cast<int>(left));
        store_n(y + j * kLanes, v, static_cast<int>(left));
      }
    }
  }
}

using Int8Finish = void (*)(const Epilogue&, const Int8Unfinished&, int64_t, int64_t);
template <class T, bool kBranch>
inline Int8Finish int8_finish_of(Activation activation) {
  return activation == Activation::kGelu   ? int8_finish<T, Activation::kGelu, kBranch>
         : activation == Activation::kSilu ? int8_finish<T, Activation::kSilu, kBranch>
                                           : int8_finish<T, Activation::kNone, kBranch>;
}

// What is done beside products, a little after each step: outputs of what was multiplied before, and asking for memory.
struct Int8Beside {
  Epilogue epilogue;
  Int8Finish finish[2];  // without and with a branch
  Int8Unfinished unfinished;
  const uint8_t *next, *next_end;  // weights, into the second cache
  char* y;                         // outputs of the sums at hand, which are written during the next products
  char* y_end;
  int64_t y_stride, y_bytes;
  int64_t pace;  // rows per step

  void rows(int64_t to) {
    if (to > unfinished.rows) to = unfinished.rows;
    if (to <= unfinished.done) return;
    finish[unfinished.branch != nullptr](epilogue, unfinished, unfinished.done, to);
    unfinished.done = to;
  }
  void step() {
    rows(unfinished.done + pace);
    for (int i = 0; i < kAheadLines && next < next_end; ++i, next += 64) __builtin_prefetch(next, 0, 2);
    for (int64_t i = 0; i < pace && y < y_end; ++i, y += y_stride)
      for (int64_t j = 0; j < y_bytes; j += 64) prefetch_to_write(y + j);
  }
};

// ---------- Products

// sums [32][32] of two groups of 16 quantized rows (or one) with 32 channels of a block from `w` on. `rest` is the last
// step of the same channels, or null where all are whole.
template <int kGroups>
LORA_KERNELS_APART void int8_macro_tile(const uint8_t* q, int64_t group_bytes, const uint8_t* w, int64_t steps,
                                        const uint8_t* rest, Int8Beside& beside, int32_t* sums) {
  tile_zero<0>(), tile_zero<1>();
  if constexpr (kGroups == 2) tile_zero<2>(), tile_zero<3>();
  for (int64_t step = 0; step < steps; ++step, q += kTileBytes, w += kTileSide * kBlockBytesPerStep) {
    if (step + 1 == steps && rest) w = rest;
    tile_load<4>(q, kTileRowBytes);
    tile_load<6>(w, kBlockBytesPerStep);
    tile_load<7>(w + kTileRowBytes, kBlockBytesPerStep);
    if constexpr (kGroups == 2) tile_load<5>(q + group_bytes, kTileRowBytes);
    tile_dot_int8<0, 4, 6>();
    tile_dot_int8<1, 4, 7>();
    if constexpr (kGroups == 2) {
      tile_dot_int8<2, 5, 6>();
      tile_dot_int8<3, 5, 7>();
    }
    beside.step();
  }
  constexpr int64_t kStride = kMacroColumns * 4;
  tile_store<0>(sums, kStride);
  tile_store<1>(sums + kTileSide, kStride);
  if constexpr (kGroups == 2) {
    tile_store<2>(sums + kTileSide * kMacroColumns, kStride);
    tile_store<3>(sums + kTileSide * kMacroColumns + kTileSide, kStride);
  }
}

// ---------- A task

// Normalizes (where asked) and quantizes rows [begin, end) of a chunk that begins with row `first` of x into tiles, and
// computes their t. begin - first is a multiple of 16.
inline void int8_prepare_tiles(const Int8LoraLinearProblem& p, const Int8LoraLinearArgs& args, const Int8TileScratch& s,
                               const LoraPlanes& planes, const AdapterRanks& adapter, int64_t first, int64_t begin,
                               int64_t end) {
  const int64_t K = p.in_features;
  const float* x_scale = p.static_scale ? args.x_scale : nullptr;
  NothingAhead nothing;
  with_type(p.dtype, args.x, [&](auto* x) {
    const auto keep = [&](const auto* row, int64_t i, bool last) {
      uint8_t* q = s.q + i / kTileSide * s.group_bytes + i % kTileSide * kTileRowBytes;
      s.scales[i] = quantize(row, K, x_scale, q, nothing, kTileSide);
      if (adapter.rank == 0) return;
      store_tile_row(planes, row, K, i % kTileSide, s.x, s.x_stride);
      if (last || i % kTileSide == kTileSide - 1)
        down_tile_rows(planes, adapter, s.x, s.x_stride, s.down, K, s.t + i / kTileSide * s.t_stride);
    };
    for (int64_t m = begin; m < end; ++m) {
      const auto* row = x + m * args.x_stride;
      if (!p.has_norm) {
        keep(row, m - first, m + 1 == end);
        continue;
      }
      with_type(p.norm_dtype, args.norm_weight, [&](auto* weight) {
        normalize_row(row, K, weight, static_cast<decltype(weight)>(args.norm_bias), p.norm_eps, s.row, nothing);
      });
      keep(static_cast<const float*>(s.row), m - first, m + 1 == end);
    }
  });
}

// What a task multiplies: its blocks, and the chunk of rows at hand.
struct Int8TileTask {
  const Int8LoraLinearProblem& p;
  const Int8LoraLinearArgs& args;
  Int8TileScratch s;
  LoraPlanes planes;
  int64_t first_block, last_block, block_bytes, weight_bytes, rest_bytes;
  Int8Beside beside;
  int64_t first, end;  // rows of the chunk
  AdapterRanks adapter;
  int64_t turn = 0;

  // What blocks need besides the weights as they lie.
  void pack_blocks() {
    for (int64_t block = first_block; block < last_block; ++block) {
      const int64_t n = block * kInt8BlockChannels, at = block - first_block;
      if (rest_bytes) {
        const uint8_t* weights = args.packed_weight + block * block_bytes;
        uint8_t* rest = s.rests + at * kRestBytes;
        memcpy(rest, weights + weight_bytes - rest_bytes, static_cast<size_t>(rest_bytes));
        memset(rest + rest_bytes, 0, static_cast<size_t>(kRestBytes - rest_bytes));
      }
      float* bias = s.bias + at * kInt8BlockChannels;
      memset(bias, 0, kInt8BlockChannels * sizeof(float));
      if (p.has_bias)
        with_type(p.bias_dtype, args.bias, [&](auto* values) {
          for (int64_t c = 0; c < kInt8BlockChannels; c += kLanes)
            store(bias + c, load_at(values + n, c, p.out_features - n));
        });
    }
  }
  void pack_adapter(const Bank& bank) {
    pack_down_tiles(planes, bank, adapter, p.in_features, s.down);
    for (int64_t block = first_block; block < last_block; ++block) {
      const int64_t n = block * kInt8BlockChannels;
      pack_up_tiles(planes, bank, adapter, n, p.out_features - n, s.up + (block - first_block) * s.up_stride);
    }
  }

  // 32 rows from row i of the chunk on times half a block.
  void macro_tile(int64_t i, int64_t block, int64_t c) {
    int32_t* sums = s.sums + turn % 2 * kMacroRows * kMacroColumns;
    float* branch = s.branches + turn % 2 * kMacroRows * kMacroColumns;
    ++turn;
    const int64_t at = block - first_block, column = block * kInt8BlockChannels + c;
    const int64_t rows = end - first - i < kMacroRows ? end - first - i : kMacroRows;
    const int64_t columns = p.out_features - column < kMacroColumns ? p.out_features - column : kMacroColumns;
    const uint8_t* weights = args.packed_weight + block * block_bytes;
    const uint8_t *q = s.q + i / kTileSide * s.group_bytes, *w = weights + c * kInt8StepDepth;
    const uint8_t* rest = rest_bytes ? s.rests + at * kRestBytes + c * kInt8StepDepth : nullptr;
    const int64_t size = size_of(p.dtype);
    beside.y = static_cast<char*>(args.y) + ((first + i) * p.out_features + column) * size;
    beside.y_end = beside.y + rows * beside.y_stride;
    beside.y_bytes = columns * size;
    const bool two = rows > kTileSide, lora = adapter.rank > 0;
    two ? int8_macro_tile<2>(q, s.group_bytes, w, s.steps, rest, beside, sums)
        : int8_macro_tile<1>(q, s.group_bytes, w, s.steps, rest, beside, sums);
    beside.rows(kMacroRows);
    if (lora) {
      const bf16 *t = s.t + i / kTileSide * s.t_stride, *up = s.up + at * s.up_stride + c * 2;
      const int64_t depth = planes.depth(adapter.rank);
      two ? up_tiles<2>(t, s.t_stride, up, depth, branch) : up_tiles<1>(t, s.t_stride, up, depth, branch);
    }
    const auto* scales = reinterpret_cast<const float*>(weights + weight_bytes) + c;
    const auto* compensation = reinterpret_cast<const int32_t*>(weights + weight_bytes) + kInt8BlockChannels + c;
    beside.unfinished = {sums,
                         lora ? branch : nullptr,
                         s.scales + i,
                         scales,
                         s.bias + at * kInt8BlockChannels + c,
                         compensation,
                         first + i,
                         column,
                         rows,
                         columns,
                         0};
  }

  // The chunk against all blocks, as many at a time as stay in the second cache.
  void run_chunk() {
    const int64_t most = kGroupBytes / block_bytes > 1 ? kGroupBytes / block_bytes : 1;
    const int64_t groups = (last_block - first_block + most - 1) / most;
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t begin = first_block + (last_block - first_block) * group / groups;
      const int64_t stop = first_block + (last_block - first_block) * (group + 1) / groups;
      for (int64_t i = 0; i < end - first; i += kMacroRows) {
        if (group == 0) {
          const int64_t to = first + i + kMacroRows;
          int8_prepare_tiles(p, args, s, planes, adapter, first, first + i, to < end ? to : end);
        }
        for (int64_t block = begin; block < stop; ++block) {
          beside.next = beside.next_end = args.packed_weight + (block + 1) * block_bytes;
          if (i == 0 && block + 1 < stop) beside.next_end += block_bytes;
          for (int64_t c = 0; c < kInt8BlockChannels && block * kInt8BlockChannels + c < p.out_features;
               c += kMacroColumns)
            macro_tile(i, block, c);
        }
      }
    }
    beside.rows(kMacroRows);  // before the scales of its rows are overwritten
  }
};

inline void int8_tile_task(const Int8LoraLinearPlan& plan, const Int8LoraLinearArgs& args, const Bank& bank,
                           const Int8Grid& grid, int64_t index, float* memory) {
  const Int8LoraLinearProblem& p = plan.problem;
  const int64_t blocks = int8_blocks(p), weight_bytes = kInt8BlockChannels * int8_padded_depth(p.in_features);
  const int64_t row_part = index / grid.block_parts, block_part = index % grid.block_parts;
  const int64_t first = p.rows * row_part / grid.row_parts, end = p.rows * (row_part + 1) / grid.row_parts;
  Int8Beside beside{};
  beside.epilogue = {p.has_bias ? args.bias : nullptr,
                     p.bias_dtype,
                     p.activation,
                     p.has_residual ? args.residual : nullptr,
                     args.y,
                     p.dtype,
                     p.out_features};
  beside.y_stride = p.out_features * static_cast<int64_t>(size_of(p.dtype));
  with_type(p.dtype, args.y, [&](auto* y) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(y)>>;
    beside.finish[0] = int8_finish_of<T, false>(p.activation);
    beside.finish[1] = int8_finish_of<T, true>(p.activation);
  });
  Int8TileTask task{p,
                    args,
                    Int8TileScratch(memory, plan, grid),
                    int8_planes(plan),
                    blocks * block_part / grid.block_parts,
                    blocks * (block_part + 1) / grid.block_parts,
                    int8_block_bytes(p.in_features),
                    weight_bytes,
                    weight_bytes % kRestBytes,
                    beside,
                    first,
                    first,
                    {}};
  task.beside.pace = task.s.steps > 0 ? (kMacroRows + task.s.steps - 1) / task.s.steps : kMacroRows;
  const TileRegisters registers;
  task.pack_blocks();
  int64_t packed_adapter = -1;
  for (; task.first < end; task.first = task.end) {
    task.end = task.first + task.s.rows < end ? task.first + task.s.rows : end;
    if (bank.present()) {
      task.end = bank.run_end(task.first, task.end);
      const int64_t id = bank.adapter_of(task.first);
      task.adapter = bank.ranks(id);
      if (task.adapter.rank > 0 && packed_adapter != id) task.pack_adapter(bank), packed_adapter = id;
    }
    task.run_chunk();
  }
}

// ---------- The implementation

inline void configure_tiles(const DeviceInfo& device, Int8LoraLinearPlan* plan) {
  configure(device, plan);
  const Int8LoraLinearProblem& p = plan->problem;
  const int64_t together = p.lora.groups > 0 ? p.rows / p.lora.groups : p.rows;
  if (p.rows < kFewestTileRows || p.top_k || (p.lora.present() && together < kFewestTileRows)) return;
  plan->tiles = true;
  plan->bf16_dot = p.lora.present() && p.lora.dtype == DType::kBFloat16;
  // A fork and join costs a few microseconds, in which one core does ten million multiply-adds.
  const double worth =
      static_cast<double>(p.out_features) * static_cast<double>(p.in_features) * static_cast<double>(p.rows) / 10e6;
  int64_t tasks = device.threads;
  if (worth < static_cast<double>(tasks)) tasks = static_cast<int64_t>(worth) + 1;
  const Int8Grid grid = int8_grid(p, tasks);
  plan->tasks = static_cast<int>(grid.row_parts * grid.block_parts);
  plan->workspace = Int8TileScratch(nullptr, *plan, grid).used * plan->tasks * static_cast<int64_t>(sizeof(float));
}

inline void run_tiles(const Int8LoraLinearPlan& plan, const Int8LoraLinearArgs& args, const Executor& executor) {
  if (!plan.tiles) return run_forward(plan, args, executor);
  const Bank bank = Bank::forward(plan.problem.lora, args.lora, plan.problem.rows);
  const Int8Grid grid = int8_grid(plan.problem, plan.tasks);
  const int64_t scratch = Int8TileScratch(nullptr, plan, grid).used;
  for_each_task(executor, plan.tasks, [&](int64_t index) {
    int8_tile_task(plan, args, bank, grid, index, static_cast<float*>(args.workspace) + index * scratch);
  });
}
