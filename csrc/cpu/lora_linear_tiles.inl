// lora_linear of many rows of bf16 in tiles (AMX), forward: the formula of lora_linear.inl.
//   W is packed once per call, [N / 64][K / 2][64][2], which costs as much as some tens of rows: training shares W, so
// there is nowhere to keep it. A task owns a range of rows and a range of blocks of 64 columns. 32 rows at a time,
// their x in tiles and their t (lora_tiles.inl), meet as many blocks as stay in the second cache; LoRA-up adds to the
// same sums; bias, activation, residual and storage follow while the next 32 x 32 are multiplied. A chunk of rows has
// one adapter. Sums are fp32, two k at a time.
//   2 M N K FLOPs, 512 multiply-adds a cycle; bytes 2 (M K + N K + M N).
// Measured (one core of an Emerald Rapids, 2.4 TFLOP/s of products alone, shared with other work; 1,500 rows, rank 16
// included, against F.linear without it in turns): 1.22 (512 x 512), 1.04 (512 to 2,048), 1.12 (2,048 to 512); with
// vectors 5.6 to 6.6.

// Fewer rows do not pay for packing W into tiles, and adapters of fewer are multiplied in fp32.
constexpr int64_t kFewestTileRows = 48;
constexpr int64_t kMostTileChunkRows = 256;
constexpr int64_t kGroupBytes = 1024 * 1024;  // of W, that stay in the second cache while the strips pass over them

inline bool takes_tiles(const LoraLinearProblem& p) {
  const int64_t together = p.lora.present() && p.lora.groups > 0 ? p.rows / p.lora.groups : p.rows;
  return p.dtype == DType::kBFloat16 && together >= kFewestTileRows;
}
inline LoraPlanes planes_of(const LoraLinearProblem& p) { return {p.lora.dtype == DType::kBFloat16 ? 1 : kMostPlanes}; }

// Tasks are a grid of row ranges and block ranges.
struct TileGrid {
  int64_t row_parts, block_parts, blocks, steps;  // steps: of 32 k
  TileGrid(const LoraLinearProblem& p, int64_t tasks) {
    blocks = round_up(p.out_features, kPanel) / kPanel;
    steps = round_up(p.in_features, kTileDepthBf16) / kTileDepthBf16;
    row_parts = p.rows / kFewestTileRows;
    row_parts = row_parts < 1 ? 1 : row_parts < tasks ? row_parts : tasks;
    block_parts = tasks / row_parts;
    block_parts = block_parts < 1 ? 1 : block_parts < blocks ? block_parts : blocks;
  }
  int64_t tasks() const { return row_parts * block_parts; }
  int64_t block_size() const { return steps * kTileDepthBf16 * kPanel; }  // of packed W, in bf16
};

// Scratch of one task, in floats; one description serves the size and the pointers.
struct TileScratch {
  int64_t rows, x_stride, t_stride, up_stride;  // of a chunk; of 16 rows, of a plane or of t, and of a block, in bf16
  bf16 *x, *planes, *t, *down, *up;             // x of the chunk; the rest as in lora_tiles.inl
  float *row, *bias, *sums;                     // [K]; [blocks][64]; [2][32][32]

  TileScratch(Workspace& w, const LoraLinearProblem& p, const TileGrid& grid) {
    const LoraPlanes cut = planes_of(p);
    const bool lora = p.lora.present();
    const int64_t blocks = (grid.blocks + grid.block_parts - 1) / grid.block_parts;
    const auto take = [&](int64_t count) { return reinterpret_cast<bf16*>(w.take((count + 1) / 2)); };
    rows = round_up((p.rows + grid.row_parts - 1) / grid.row_parts, kMacroRows);
    if (rows > kMostTileChunkRows) rows = kMostTileChunkRows;
    x_stride = grid.steps * kTileBytes / 2;
    t_stride = cut.depth(p.lora.max_rank) * kTileSide;
    up_stride = cut.depth(p.lora.max_rank) * kPanel;
    x = take(rows / kTileSide * x_stride);
    planes = take(lora && (cut.count > 1 || p.dropout_p > 0) ? cut.count * x_stride : 0);
    t = take(lora ? rows / kTileSide * t_stride : 0);
    down = take(lora ? cut.count * down_tiles(p.lora.max_rank, p.in_features) * kTileBytes / 2 : 0);
    up = take(lora ? blocks * up_stride : 0);
    row = w.take(lora ? p.in_features : 0);
    bias = w.take(blocks * kPanel);
    sums = w.take(2 * kMacroRows * kMacroColumns);
  }
};

// 16 rows of 32 k of a matrix as they lie, zero beyond `rows` and `depth`, to rows of `to`.
inline void copy_tile(const bf16* from, int64_t stride, int64_t rows, int64_t depth, bf16* to) {
  if (rows >= kTileSide && depth >= kTileDepthBf16) {  // of known size: no calls
#pragma GCC unroll 16
    for (int64_t i = 0; i < kTileSide; ++i) memcpy(to + i * kTileDepthBf16, from + i * stride, kTileRowBytes);
    return;
  }
  for (int64_t i = 0; i < kTileSide; ++i, to += kTileDepthBf16) {
    const int64_t count = i < rows ? (depth < kTileDepthBf16 ? depth : kTileDepthBf16) : 0;
    if (count < kTileDepthBf16) memset(to, 0, kTileRowBytes);
    memcpy(to, from + (count ? i * stride : 0), static_cast<size_t>(count) * sizeof(bf16));
  }
}

// Columns [n, n + 64) of W, of which `columns` exist, as [K / 2][64][2].
inline void pack_weight_tiles(const bf16* w, int64_t stride, int64_t columns, int64_t depth, bf16* out) {
  alignas(64) bf16 rows[kTileSide * kTileDepthBf16];
  for (int64_t k = 0; k < depth; k += kTileDepthBf16, out += kTileDepthBf16 * kPanel)
    for (int64_t j = 0; j < kPanel; j += kTileSide) {
      copy_tile(w + (j < columns ? j * stride : 0) + k, stride, columns - j, depth - k, rows);
      transpose_block(reinterpret_cast<const float*>(rows), kTileSide, reinterpret_cast<float*>(out) + j, kPanel);
    }
}

// Sums that are to become outputs, a few rows after each step of the next products.
struct TileOutputs {
  Epilogue epilogue;
  const float *sums = nullptr, *bias = nullptr;  // [32][32], of its first column
  int64_t row = 0, column = 0, rows = 0, columns = 0, done = 0, pace = 1;
  char *soon = nullptr, *soon_end = nullptr;  // outputs of the sums at hand, asked for before they are written
  int64_t soon_stride = 0;

  void finish(int64_t to) {
    if (to > rows) to = rows;
    if (done >= to) return;
    epilogue.activation == Activation::kGelu   ? finish_rows<Activation::kGelu>(to)
    : epilogue.activation == Activation::kSilu ? finish_rows<Activation::kSilu>(to)
                                               : finish_rows<Activation::kNone>(to);
  }
  template <Activation kActivation>
  LORA_KERNELS_APART void finish_rows(int64_t to) {
    for (; done < to; ++done)
      for (int64_t j = 0; j < columns; j += kLanes) {
        const int64_t at = (row + done) * epilogue.out_features + column + j;
        bf16* y = static_cast<bf16*>(epilogue.y) + at;
        const bf16* residual = epilogue.residual ? static_cast<const bf16*>(epilogue.residual) + at : nullptr;
        F v = activate(load(sums + done * kMacroColumns + j) + load(bias + j), kActivation);
        if (columns - j >= kLanes) {
          store(y, residual ? v + load(residual) : v);
        } else {
          const int left = static_cast<int>(columns - j);
          store_n(y, residual ? v + load_n(residual, left) : v, left);
        }
      }
  }
  void step() {
    finish(done + pace);
    for (int64_t i = 0; i < pace && soon < soon_end; ++i, soon += soon_stride) prefetch_to_write(soon);
  }
};

// The sums of two groups of 16 rows and 32 columns, over the steps of the base and those of LoRA-up.
struct TileOperands {
  const bf16 *a, *b;
  int64_t a_stride, steps;  // between the groups; of 32 k
};
inline void multiply_tiles(const TileOperands& o, TileOutputs& outputs) {
  const bf16 *a = o.a, *b = o.b;
  for (int64_t step = 0; step < o.steps; ++step, a += kTileBytes / 2, b += kTileDepthBf16 * kPanel) {
    tile_load<4>(a, kTileRowBytes);
    tile_load<6>(b, kPanel * 4);
    tile_load<7>(b + 2 * kTileSide, kPanel * 4);
    tile_load<5>(a + o.a_stride, kTileRowBytes);
    tile_dot_bf16<0, 4, 6>();
    tile_dot_bf16<1, 4, 7>();
    tile_dot_bf16<2, 5, 6>();
    tile_dot_bf16<3, 5, 7>();
    outputs.step();
  }
}
LORA_KERNELS_APART inline void macro_tile(const TileOperands& base, const TileOperands& branch, TileOutputs& outputs,
                                          float* sums) {
  tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  multiply_tiles(base, outputs);
  multiply_tiles(branch, outputs);
  outputs.finish(kMacroRows);
  tile_store<0>(sums, kMacroColumns * 4);
  tile_store<1>(sums + kTileSide, kMacroColumns * 4);
  tile_store<2>(sums + kTileSide * kMacroColumns, kMacroColumns * 4);
  tile_store<3>(sums + kTileSide * kMacroColumns + kTileSide, kMacroColumns * 4);
}

struct TileTask {
  const LoraLinearProblem& p;
  const LoraLinearArgs& args;
  const Bank& bank;
  const TileGrid& grid;
  const bf16* packed;  // W, all blocks
  TileScratch s;
  LoraPlanes planes;
  Dropout dropout;
  int64_t first_block, last_block;
  TileOutputs outputs;
  int64_t first = 0, end = 0;  // rows of the chunk
  AdapterRanks adapter = {};
  int64_t turn = 0;

  // 16 rows from row i of the chunk on: x, and t.
  void prepare(int64_t i) {
    const int64_t K = p.in_features, rows = end - first - i;
    const bf16* from = static_cast<const bf16*>(args.x) + (first + i) * args.x_stride;
    bf16* x = s.x + i / kTileSide * s.x_stride;
    for (int64_t k = 0; k < K; k += kTileDepthBf16)
      copy_tile(from + k, args.x_stride, rows, K - k, x + k / kTileDepthBf16 * (kTileBytes / 2));
    // Every task of these rows makes their t; the one with the first columns keeps it for the gradients.
    KeptRows kept;
    if (p.keeps_t && first_block == 0 && rows > 0) {
      kept.stride = kept_t_columns(p.lora);
      kept.t = static_cast<float*>(args.t) + (first + i) * kept.stride;
      kept.rows = rows < kTileSide ? rows : kTileSide;
      memset(kept.t, 0, static_cast<size_t>(kept.rows * kept.stride) * sizeof(float));
    }
    if (adapter.rank == 0) return;
    bf16* t = s.t + i / kTileSide * s.t_stride;
    if (planes.count == 1 && !dropout) return down_tile_rows(planes, adapter, x, s.x_stride, s.down, K, t, kept);
    for (int64_t r = 0; r < kTileSide; ++r) {
      if (r < rows) convert_row(from + r * args.x_stride, K, s.row);
      if (r < rows && dropout) drop(dropout, static_cast<uint64_t>((first + i + r) * K), K, s.row);
      if (r >= rows) memset(s.row, 0, static_cast<size_t>(K) * sizeof(float));
      store_tile_row(planes, s.row, K, r, s.planes, s.x_stride);
    }
    down_tile_rows(planes, adapter, s.planes, s.x_stride, s.down, K, t, kept);
  }

  void run_chunk() {
    const int64_t block_size = grid.block_size(), most = kGroupBytes / 2 / (block_size + 1) + 1;
    const int64_t groups = (last_block - first_block + most - 1) / most;
    const int64_t up_steps = adapter.rank > 0 ? planes.depth(adapter.rank) / kTileDepthBf16 : 0;
    for (int64_t group = 0; group < groups; ++group)
      for (int64_t i = 0; i < end - first; i += kMacroRows) {
        if (group == 0) prepare(i), prepare(i + kTileSide);
        const int64_t begin = first_block + (last_block - first_block) * group / groups;
        const int64_t stop = first_block + (last_block - first_block) * (group + 1) / groups;
        for (int64_t block = begin; block < stop; ++block)
          for (int64_t c = 0; c < kPanel && block * kPanel + c < p.out_features; c += kMacroColumns) {
            float* sums = s.sums + turn++ % 2 * kMacroRows * kMacroColumns;
            const int64_t at = block - first_block, rows = end - first - i;
            const int64_t column = block * kPanel + c, columns = p.out_features - column;
            outputs.soon_stride = p.out_features * static_cast<int64_t>(sizeof(bf16));
            outputs.soon = static_cast<char*>(args.y) + (first + i) * outputs.soon_stride + column * 2;
            outputs.soon_end = outputs.soon + (rows < kMacroRows ? rows : kMacroRows) * outputs.soon_stride;
            macro_tile({s.x + i / kTileSide * s.x_stride, packed + block * block_size + c * 2, s.x_stride, grid.steps},
                       {s.t + i / kTileSide * s.t_stride, s.up + at * s.up_stride + c * 2, s.t_stride, up_steps},
                       outputs, sums);
            outputs.sums = sums, outputs.bias = s.bias + at * kPanel + c;
            outputs.row = first + i, outputs.rows = rows < kMacroRows ? rows : kMacroRows;
            outputs.column = column, outputs.columns = columns < kMacroColumns ? columns : kMacroColumns;
            outputs.done = 0;
          }
      }
  }

  void run(int64_t row_begin, int64_t row_end) {
    for (int64_t block = first_block; block < last_block; ++block) {
      float* bias = s.bias + (block - first_block) * kPanel;
      memset(bias, 0, kPanel * sizeof(float));
      if (p.has_bias)
        with_type(p.bias_dtype, args.bias, [&](auto* values) {
          for (int64_t c = 0; c < kPanel; c += kLanes)
            store(bias + c, load_at(values + block * kPanel, c, p.out_features - block * kPanel));
        });
    }
    int64_t packed_adapter = -1;
    for (first = row_begin; first < row_end; first = end) {
      end = first + s.rows < row_end ? first + s.rows : row_end;
      if (bank.present()) {
        end = bank.run_end(first, end);
        const int64_t id = bank.adapter_of(first);
        adapter = bank.ranks(id);
        if (adapter.rank > 0 && packed_adapter != id) {
          pack_down_tiles(planes, bank, adapter, p.in_features, s.down);
          for (int64_t block = first_block; block < last_block; ++block)
            pack_up_tiles(planes, bank, adapter, block * kPanel, p.out_features - block * kPanel,
                          s.up + (block - first_block) * s.up_stride);
          packed_adapter = id;
        }
      }
      run_chunk();
    }
    outputs.finish(kMacroRows);
  }
};

inline void configure_tiles(const DeviceInfo& device, LoraLinearPlan* plan) {
  configure(device, plan);
  const LoraLinearProblem& p = plan->problem;
  if (!takes_tiles(p)) return;
  plan->bf16_dot = true;
  // A fork and join costs a few microseconds, in which one core does five million multiply-adds.
  const double work = static_cast<double>(p.rows * p.out_features) * static_cast<double>(p.in_features) / 5e6;
  const int64_t tasks = work < device.threads ? static_cast<int64_t>(work) + 1 : device.threads;
  const TileGrid grid(p, tasks);
  plan->tasks = static_cast<int>(grid.tasks());
  Workspace w{nullptr};
  TileScratch scratch(w, p, grid);
  plan->workspace = (w.used * plan->tasks + grid.blocks * grid.block_size() / 2) * static_cast<int64_t>(sizeof(float));
}

inline void run_tiles(const LoraLinearPlan& plan, const LoraLinearArgs& args, const Executor& executor) {
  const LoraLinearProblem& p = plan.problem;
  if (!takes_tiles(p)) return run_forward(plan, args, executor);
  const Bank bank = Bank::forward(p.lora, args.lora, p.rows);
  const TileGrid grid(p, plan.tasks);
  auto* packed = static_cast<bf16*>(args.workspace);
  float* scratch = static_cast<float*>(args.workspace) + grid.blocks * grid.block_size() / 2;
  const int64_t tasks = grid.tasks();
  for_each_task(executor, tasks, [&](int64_t task) {
    for (int64_t block = grid.blocks * task / tasks; block < grid.blocks * (task + 1) / tasks; ++block)
      pack_weight_tiles(static_cast<const bf16*>(args.weight) + block * kPanel * args.weight_stride, args.weight_stride,
                        p.out_features - block * kPanel, p.in_features, packed + block * grid.block_size());
  });
  for_each_task(executor, tasks, [&](int64_t index) {
    Workspace sizes{nullptr};
    TileScratch(sizes, p, grid);
    Workspace w{scratch + index * sizes.used};
    const int64_t row_part = index / grid.block_parts, block_part = index % grid.block_parts;
    TileOutputs outputs{epilogue_of(p, args)};
    outputs.pace = grid.steps > 0 ? (kMacroRows + grid.steps - 1) / grid.steps : kMacroRows;
    const TileRegisters registers;
    TileTask{p,
             args,
             bank,
             grid,
             packed,
             TileScratch(w, p, grid),
             planes_of(p),
             {p.dropout_p, args.dropout_seed},
             grid.blocks * block_part / grid.block_parts,
             grid.blocks * (block_part + 1) / grid.block_parts,
             outputs}
        .run(p.rows * row_part / grid.row_parts, p.rows * (row_part + 1) / grid.row_parts);
  });
}
