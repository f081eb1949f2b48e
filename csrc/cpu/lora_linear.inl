// lora_linear on a CPU, forward. Two paths (LoraLinearPath):
//
// kDot, few rows. Bound by the bytes of W. Tasks own ranges of columns; each computes the (small) t = s x At for
// itself,
//   which costs r K bytes per task and saves a fork. W is read once, as it lies: rows of W against rows of x.
// kPanel, many rows. Bound by arithmetic. W is repacked to panels [K][kPanel], which costs as much as a few rows; then
//   register tiles run over blocks of rows that stay in the second cache: t = s x At of the block first, then every
//   panel. LoRA-up is r more steps over k on the same sums; bias, activation and residual happen before the sums leave
//   the core. Tried and lost: t of all rows first, then panels outside and rows inside: x came from memory twice.

constexpr int64_t kDotRows = 8;      // up to here the dot path wins: beyond, packing W pays for itself
constexpr int64_t kBlockRows = 510;  // measured at K = 2048: 128 rows in the cache 1.11 of MKL, 512 rows beyond it 1.06
constexpr int64_t kChunkRows = 48;   // rows converted at a time for the down-projection: they stay in the second cache

// ---------- Workspace: floats, each part rounded to a cache line. One description serves the size and the pointers.
struct Workspace {
  float* base;
  int64_t used = 0;
  float* take(int64_t floats) {
    float* p = base + used;
    used += round_up(floats, 16);
    return p;
  }
};

// What a panel product multiplies: y = finish(x w + t up) with t = s dropout(x) down.
struct PanelProduct {
  int64_t rows, depth, columns;
  const void* x;  // [rows, depth], rows of stride x_stride
  DType x_dtype;
  int64_t x_stride;
  const void* w;  // element (column, k) at column * column_stride + k * k_stride
  DType w_dtype;
  int64_t column_stride, k_stride;
  bool pairs;            // x and w are bf16 with k_stride 1: two k per step
  const Bank* bank;      // null: no LoRA branch
  Dropout down_dropout;  // of x on its way into t (forward)
  Dropout up_dropout;    // of t up (dx), by element index row * columns + column
  Epilogue epilogue;
  float* kept_t = nullptr;  // [rows, kept_stride]: t for the gradients to come, or null
  int64_t kept_stride = 0;
};

// How it is cut: tasks own ranges of rows, and of panels where there are too few rows. A task takes a block of rows at
// a time that stays in its second cache, with t, for all panels. W is packed once for all tasks if there are several
// blocks, else panel by panel on the way.
struct PanelCut {
  int row_tasks, panel_tasks;
  int64_t block_rows;
  bool shared_pack;

  PanelCut(int tasks, int64_t rows, int64_t depth, int64_t l2_bytes) {
    constexpr int64_t kFewRows = 4 * kTileRows;  // fewer rows per task would pack and read W for too little work
    const int64_t most = (rows + kFewRows - 1) / kFewRows;
    row_tasks = static_cast<int>(most < tasks ? most : tasks);
    if (row_tasks < 1) row_tasks = 1;
    panel_tasks = tasks / row_tasks;
    // Half of the second cache for the rows, but not fewer than kBlockRows: every block reads all panels again.
    block_rows = l2_bytes / 2 / (depth * static_cast<int64_t>(sizeof(float)) + 1) / kTileRows * kTileRows;
    if (block_rows < kBlockRows) block_rows = kBlockRows;
    const int64_t task_rows = (rows + row_tasks - 1) / row_tasks;
    if (block_rows > task_rows) block_rows = task_rows;
    shared_pack = row_tasks > 1 || task_rows > block_rows;
  }
};

struct PanelScratch {
  float *packed, *t, *panels, *up, *down, *blocks, *chunks;
  int64_t panel_size, up_size, down_size, block_size, chunk_size;
  // depth, columns of the product; `converts`: x is not fp32 and has to be; `lora` may be absent
  PanelScratch(Workspace& w, const PanelCut& cut, int tasks, int64_t rows, int64_t depth, int64_t columns,
               const LoraShape& lora, bool converts, bool chunked) {
    const bool present = lora.present();
    const int64_t panels_of_w = (columns + kPanel - 1) / kPanel;
    packed = w.take(cut.shared_pack ? panels_of_w * depth * kPanel : 0);
    t = w.take(present ? rows * padded_rank(lora) * cut.panel_tasks : 0);
    panel_size = cut.shared_pack ? 0 : round_up(depth * kPanel, 16);
    up_size = present ? round_up(lora.max_rank * kPanel, 16) : 0;
    down_size = present ? round_up(down_scratch(lora, depth), 16) : 0;
    block_size = converts ? round_up(cut.block_rows * depth, 16) : 0;
    chunk_size = present && chunked ? round_up(kChunkRows * depth, 16) : 0;
    panels = w.take(tasks * panel_size);
    up = w.take(tasks * up_size);
    down = w.take(tasks * down_size);
    blocks = w.take(tasks * block_size);
    chunks = w.take(tasks * chunk_size);
  }
};

inline void pack_one_panel(const PanelProduct& p, int64_t n, float* panel) {
  const int64_t columns = p.columns - n < kPanel ? p.columns - n : kPanel;
  if (p.pairs) {  // a pair of bf16 moves as one float
    pack_panel(static_cast<const float*>(p.w) + n * p.column_stride / 2, p.column_stride / 2, 1, columns, p.depth / 2,
               panel, kPanel);
    return;
  }
  with_type(p.w_dtype, p.w, [&](auto* w) {
    pack_panel(w + n * p.column_stride, p.column_stride, p.k_stride, columns, p.depth, panel, kPanel);
  });
}

// One tile: rows m ... m + MR of the product. `a` and `t` point to row m of x (fp32, or pairs) and of t.
template <int MR>
inline void panel_tile(const PanelProduct& p, int64_t m, int64_t n, const float* a, int64_t a_stride, const float* t,
                       const float* panel, float* up_scratch, int64_t* last, UpPanel* up) {
  Tile<MR, kTileVectors> c;
  clear(c);
  if constexpr (kHasBf16Dot) {
    if (p.pairs)
      accumulate<true>(c, a, a_stride, 1, panel, kPanel, p.depth / 2);
    else
      accumulate(c, a, a_stride, 1, panel, kPanel, p.depth);
  } else {
    accumulate(c, a, a_stride, 1, panel, kPanel, p.depth);
  }
  if (p.bank) {
    const int64_t columns = p.columns - n < kPanel ? p.columns - n : kPanel;
    if (!p.up_dropout) {
      add_lora(c, *p.bank, m, t, n, columns, up_scratch, last, up);
    } else {
      Tile<MR, kTileVectors> branch;
      clear(branch);
      add_lora(branch, *p.bank, m, t, n, columns, up_scratch, last, up);
      for (int i = 0; i < MR; ++i) {
        alignas(64) float row[kPanel];
        for (int j = 0; j < kTileVectors; ++j) store(row + j * kLanes, branch.sum[i][j]);
        drop(p.up_dropout, static_cast<uint64_t>((m + i) * p.columns + n), columns, row);
        for (int j = 0; j < kTileVectors; ++j) c.sum[i][j] = c.sum[i][j] + load(row + j * kLanes);
      }
    }
  }
  finish(p.epilogue, m, n, c);
}

// Rows [begin, end) of x as fp32, with dropout: x itself where nothing has to be done, else a copy in `copy`.
struct Rows {
  const float* data;
  int64_t stride;
};
inline Rows fp32_rows(const void* x, DType dtype, int64_t x_stride, int64_t begin, int64_t end, int64_t depth,
                      const Dropout& dropout, float* copy) {
  if (dtype == DType::kFloat32 && !dropout) return {static_cast<const float*>(x) + begin * x_stride, x_stride};
  with_type(dtype, x, [&](auto* rows) {
    for (int64_t m = begin; m < end; ++m) {
      float* out = copy + (m - begin) * depth;
      convert_row(rows + m * x_stride, depth, out);
      if (dropout) drop(dropout, static_cast<uint64_t>(m * depth), depth, out);
    }
  });
  return {copy, depth};
}

// t for rows [begin, end) of x, a chunk of rows at a time. `chunk` has kChunkRows * depth floats.
inline void down_chunks(const Bank& bank, const void* x, DType dtype, int64_t x_stride, int64_t begin, int64_t end,
                        int64_t depth, const Dropout& dropout, float* t, float* chunk, float* scratch) {
  const int64_t width = padded_rank(bank.shape);
  const bool direct = dtype == DType::kFloat32 && !dropout;
  const int64_t step = direct ? end - begin : kChunkRows;
  for (int64_t m = begin; m < end; m += step) {
    const int64_t stop = m + step < end ? m + step : end;
    const Rows rows = fp32_rows(x, dtype, x_stride, m, stop, depth, dropout, chunk);
    down_rows(bank, rows.data - m * rows.stride, rows.stride, m, stop, depth, t + (m - begin) * width, scratch);
  }
}

// t of the rows [first, end) for the gradients to come.
inline void keep_t(const float* t, int64_t width, int64_t first, int64_t end, float* kept, int64_t kept_stride) {
  for (int64_t m = first; m < end; ++m) {
    float* row = kept + m * kept_stride;
    memcpy(row, t + (m - first) * width, static_cast<size_t>(width) * sizeof(float));
    memset(row + width, 0, static_cast<size_t>(kept_stride - width) * sizeof(float));
  }
}

// The rows [first, end) of a task against its panels; `t` receives their t, rows of padded_rank floats from `first` on.
inline void panel_block(const PanelProduct& p, const PanelCut& cut, const PanelScratch& s, int64_t task, int64_t first,
                        int64_t end, int64_t panel_begin, int64_t panel_end, float* t) {
  const int64_t width = p.bank ? padded_rank(p.bank->shape) : 0;
  Rows a{static_cast<const float*>(p.x) + first * p.x_stride / 2, p.x_stride / 2};  // pairs
  if (!p.pairs)
    a = fp32_rows(p.x, p.x_dtype, p.x_stride, first, end, p.depth, Dropout(), s.blocks + task * s.block_size);
  if (p.bank) {
    float *chunk = s.chunks + task * s.chunk_size, *scratch = s.down + task * s.down_size;
    if (p.pairs || p.down_dropout)
      down_chunks(*p.bank, p.x, p.x_dtype, p.x_stride, first, end, p.depth, p.down_dropout, t, chunk, scratch);
    else
      down_rows(*p.bank, a.data - first * a.stride, a.stride, first, end, p.depth, t, scratch);
    if (p.kept_t && panel_begin == 0) keep_t(t, width, first, end, p.kept_t, p.kept_stride);
  }
  for (int64_t index = panel_begin; index < panel_end; ++index) {
    const int64_t n = index * kPanel;
    float* panel = cut.shared_pack ? s.packed + index * p.depth * kPanel : s.panels + task * s.panel_size;
    if (!cut.shared_pack) pack_one_panel(p, n, panel);
    UpPanel up;
    int64_t last = -1;
    for (int64_t m = first; m < end;) {
      const int64_t count = tile_rows(end - m, kTileRows);
      with_rows<kTileRows>(count, [&](auto tag) {
        panel_tile<decltype(tag)::value>(p, m, n, a.data + (m - first) * a.stride, a.stride, t + (m - first) * width,
                                         panel, s.up + task * s.up_size, &last, &up);
      });
      m += count;
    }
  }
}

// Where row m's t is found after panel_product: s.t + m * padded_rank (the copy of the first group of panels).
inline void panel_product(const PanelProduct& p, const PanelCut& cut, const PanelScratch& s, const Executor& executor,
                          int tasks) {
  const int64_t panels = (p.columns + kPanel - 1) / kPanel;
  const int64_t width = p.bank ? padded_rank(p.bank->shape) : 0;
  if (cut.shared_pack)
    for_each_task(executor, tasks, [&](int64_t task) {
      for (int64_t i = panels * task / tasks; i < panels * (task + 1) / tasks; ++i)
        pack_one_panel(p, i * kPanel, s.packed + i * p.depth * kPanel);
    });
  for_each_task(executor, static_cast<int64_t>(cut.row_tasks) * cut.panel_tasks, [&](int64_t task) {
    const int64_t row_task = task / cut.panel_tasks, panel_task = task % cut.panel_tasks;
    const int64_t last = p.rows * (row_task + 1) / cut.row_tasks;
    for (int64_t first = p.rows * row_task / cut.row_tasks; first < last; first += cut.block_rows)
      panel_block(p, cut, s, task, first, first + cut.block_rows < last ? first + cut.block_rows : last,
                  panels * panel_task / cut.panel_tasks, panels * (panel_task + 1) / cut.panel_tasks,
                  s.t + (panel_task * p.rows + first) * width);
  });
}

struct DotScratch {
  float *x, *dropped, *t, *down, *sums, *up;
  DotScratch(Workspace& w, const LoraLinearProblem& p) {
    x = w.take(p.dtype == DType::kFloat32 ? 0 : p.rows * p.in_features);
    dropped = w.take(p.lora.present() && p.dropout_p > 0 ? p.rows * p.in_features : 0);
    t = w.take(p.lora.present() ? p.rows * padded_rank(p.lora) : 0);
    down = w.take(p.lora.present() ? down_scratch(p.lora, p.in_features) : 0);
    sums = w.take(p.rows * kPanel);
    up = w.take(p.lora.present() ? p.lora.max_rank * kPanel : 0);
  }
};

inline PanelCut forward_cut(const LoraLinearPlan& plan) {
  return PanelCut(plan.tasks, plan.problem.rows, plan.problem.in_features, plan.l2_bytes);
}
inline PanelScratch forward_scratch(Workspace& w, const LoraLinearPlan& plan) {
  const LoraLinearProblem& p = plan.problem;
  return PanelScratch(w, forward_cut(plan), plan.tasks, p.rows, p.in_features, p.out_features, p.lora,
                      p.dtype != DType::kFloat32 && !plan.bf16_dot, plan.bf16_dot || p.dropout_p > 0);
}

inline void configure(const DeviceInfo& device, LoraLinearPlan* plan) {
  const LoraLinearProblem& p = plan->problem;
  plan->l2_bytes = device.l2_bytes;
  plan->path = p.rows <= kDotRows ? LoraLinearPath::kDot : LoraLinearPath::kPanel;
  plan->bf16_dot = kHasBf16Dot && plan->path == LoraLinearPath::kPanel && p.dtype == DType::kBFloat16 &&
                   p.in_features % 2 == 0 && (device.isa & kIsaAvx512Bf16) && device.fast_bf16_dot;
  // A fork and join costs a few microseconds, in which one core reads about 100 KB or does half a million
  // multiply-adds.
  const double work = plan->path == LoraLinearPath::kDot
                          ? static_cast<double>(p.out_features * p.in_features) * size_of(p.dtype) / 100e3
                          : static_cast<double>(p.rows * p.out_features) * p.in_features / 500e3;
  const int64_t panels = (p.out_features + kPanel - 1) / kPanel;
  int64_t most = plan->path == LoraLinearPath::kDot ? panels : panels * ((p.rows + kTileRows - 1) / kTileRows);
  if (work < most) most = static_cast<int64_t>(work) + 1;
  plan->tasks = static_cast<int>(device.threads < most ? device.threads : most);
  Workspace w{nullptr};
  if (plan->path == LoraLinearPath::kDot) {
    DotScratch scratch(w, p);
    plan->workspace = w.used * plan->tasks * static_cast<int64_t>(sizeof(float));
  } else {
    forward_scratch(w, *plan);
    plan->workspace = w.used * static_cast<int64_t>(sizeof(float));
  }
}

inline Epilogue epilogue_of(const LoraLinearProblem& p, const LoraLinearArgs& args) {
  return {p.has_bias ? args.bias : nullptr,
          p.bias_dtype,
          p.activation,
          p.has_residual ? args.residual : nullptr,
          args.y,
          p.dtype,
          p.out_features};
}

inline void run_dot(const LoraLinearPlan& plan, const LoraLinearArgs& args, const Executor& executor) {
  const LoraLinearProblem& p = plan.problem;
  const int64_t M = p.rows, N = p.out_features, K = p.in_features, panels = (N + kPanel - 1) / kPanel;
  const Bank bank = Bank::forward(p.lora, args.lora, M);
  const Epilogue epilogue = epilogue_of(p, args);
  const int64_t width = padded_rank(p.lora);
  for_each_task(executor, plan.tasks, [&](int64_t task) {
    Workspace w{static_cast<float*>(args.workspace) + task * (plan.workspace / 4 / plan.tasks)};
    const DotScratch s(w, p);
    const Rows x = fp32_rows(args.x, p.dtype, args.x_stride, 0, M, K, Dropout(), s.x);
    if (bank.present()) {
      const Dropout dropout{p.dropout_p, args.dropout_seed};
      const Rows dropped = dropout ? fp32_rows(args.x, p.dtype, args.x_stride, 0, M, K, dropout, s.dropped) : x;
      down_rows(bank, dropped.data, dropped.stride, 0, M, K, s.t, s.down);
      if (p.keeps_t && task == 0) keep_t(s.t, width, 0, M, static_cast<float*>(args.t), kept_t_columns(p.lora));
    }
    for (int64_t panel = panels * task / plan.tasks; panel < panels * (task + 1) / plan.tasks; ++panel) {
      const int64_t n = panel * kPanel, columns = N - n < kPanel ? N - n : kPanel;
      with_type(p.dtype, args.weight, [&](auto* weight) {
        NextRows ahead;
        dots(x.data, x.stride, M, weight + n * args.weight_stride, args.weight_stride, columns, K, s.sums, kPanel,
             ahead);
      });
      int64_t last = -1;
      UpPanel up;
      for (int64_t m = 0; m < M; ++m) {
        Tile<1, kTileVectors> c;
        for (int j = 0; j < kTileVectors; ++j) c.sum[0][j] = load(s.sums + m * kPanel + j * kLanes);
        if (bank.present()) add_lora(c, bank, m, s.t + m * width, n, columns, s.up, &last, &up);
        finish(epilogue, m, n, c);
      }
    }
  });
}

inline void run_panel(const LoraLinearPlan& plan, const LoraLinearArgs& args, const Executor& executor) {
  const LoraLinearProblem& p = plan.problem;
  const Bank bank = Bank::forward(p.lora, args.lora, p.rows);
  Workspace w{static_cast<float*>(args.workspace)};
  const PanelScratch s = forward_scratch(w, plan);
  PanelProduct product{};
  product.rows = p.rows;
  product.depth = p.in_features;
  product.columns = p.out_features;
  product.x = args.x;
  product.x_dtype = p.dtype;
  product.x_stride = args.x_stride;
  product.w = args.weight;
  product.w_dtype = p.dtype;
  product.column_stride = args.weight_stride;
  product.k_stride = 1;
  product.pairs = plan.bf16_dot;
  product.bank = bank.present() ? &bank : nullptr;
  product.down_dropout = {p.dropout_p, args.dropout_seed};
  product.epilogue = epilogue_of(p, args);
  product.kept_t = p.keeps_t ? static_cast<float*>(args.t) : nullptr;
  product.kept_stride = kept_t_columns(p.lora);
  panel_product(product, forward_cut(plan), s, executor, plan.tasks);
}

inline void run_forward(const LoraLinearPlan& plan, const LoraLinearArgs& args, const Executor& executor) {
  plan.path == LoraLinearPath::kDot ? run_dot(plan, args, executor) : run_panel(plan, args, executor);
}
