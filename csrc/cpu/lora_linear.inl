// lora_linear on a CPU, forward. Two paths (LoraLinearPath):
//
// kDot, few rows. Bound by the bytes of W. Tasks own ranges of columns; each computes the (small) t = s x At for itself,
//   which costs r K bytes per task and saves a fork. W is read once, as it lies: rows of W against rows of x.
// kPanel, many rows. Bound by arithmetic. First all tasks compute t (and x in fp32, if it is stored otherwise), then each
//   packs panels of W to [K][kPanel] and runs register tiles over the rows. Packing costs as much as a few rows; LoRA-up
//   is r more steps over k on the same sums; bias, activation and residual happen before the sums leave the registers.

constexpr int64_t kDotRows = 12;    // up to here the dot path wins: beyond, packing W pays for itself
constexpr int64_t kChunkRows = 48;  // rows converted at a time for the down-projection: they stay in the second cache

// What a panel product multiplies: y = finish(a w + t up).
struct PanelProduct {
  int64_t rows, depth, columns;
  const float* a;         // [rows, depth], or pairs of bf16 as floats
  int64_t a_stride;       // in floats
  bool pairs;
  const void* w;          // element (column, k) at column * column_stride + k * k_stride
  DType w_dtype;
  int64_t column_stride, k_stride;
  const Bank* bank;       // null: no LoRA branch
  const float* t;         // [rows, padded rank]
  Dropout up_dropout;     // of the branch's result (dx), by element index row * columns + column
  Epilogue epilogue;
};

inline int64_t panel_scratch(int64_t depth, int64_t max_rank) { return (depth + max_rank) * kPanel; }

template <int MR>
inline void panel_tile(const PanelProduct& p, int64_t m, int64_t n, const float* panel, float* up_scratch,
                       int64_t* last, UpPanel* up) {
  Tile<MR, kTileVectors> c;
  clear(c);
  const float* a = p.a + m * p.a_stride;
  if constexpr (kHasBf16Dot) {
    if (p.pairs)
      accumulate<true>(c, a, p.a_stride, 1, panel, kPanel, p.depth);
    else
      accumulate(c, a, p.a_stride, 1, panel, kPanel, p.depth);
  } else {
    accumulate(c, a, p.a_stride, 1, panel, kPanel, p.depth);
  }
  const int64_t columns = p.columns - n < kPanel ? p.columns - n : kPanel;
  if (p.bank) {
    const float* t = p.t + m * padded_rank(p.bank->shape);
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

// Units of (panel, block of rows), split evenly over the tasks; a task packs a panel once for its consecutive blocks.
inline void panel_product(const PanelProduct& p, const Executor& executor, int tasks, float* scratch) {
  const int64_t panels = (p.columns + kPanel - 1) / kPanel;
  const int64_t blocks = panels % tasks == 0 ? 1 : tasks;  // rows are split only where panels do not divide evenly
  const int64_t block_rows = (p.rows + blocks - 1) / blocks, units = panels * blocks;
  const int64_t max_rank = p.bank ? p.bank->shape.max_rank : 0;
  for_each_task(executor, tasks, [&](int64_t task) {
    float* panel = scratch + task * panel_scratch(p.depth, max_rank);
    float* up_scratch = panel + p.depth * kPanel;
    UpPanel up;
    int64_t packed = -1, last = -1;
    for (int64_t unit = units * task / tasks; unit < units * (task + 1) / tasks; ++unit) {
      const int64_t n = unit / blocks * kPanel, first = unit % blocks * block_rows;
      const int64_t end = first + block_rows < p.rows ? first + block_rows : p.rows;
      if (packed != n) {
        const int64_t columns = p.columns - n < kPanel ? p.columns - n : kPanel;
        with_type(p.pairs ? DType::kFloat32 : p.w_dtype, p.w, [&](auto* w) {
          pack_panel(w + n * p.column_stride, p.column_stride, p.k_stride, columns, p.depth, panel, kPanel);
        });
        packed = n;
        last = -1;
      }
      for (int64_t m = first; m < end;) {
        const int64_t count = tile_rows(end - m, kTileRows);
        with_rows<kTileRows>(count, [&](auto tag) {
          panel_tile<decltype(tag)::value>(p, m, n, panel, up_scratch, &last, &up);
        });
        m += count;
      }
    }
  });
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
    down_rows(bank, rows.data - m * rows.stride, rows.stride, m, stop, depth, t + m * width, scratch);
  }
}

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

struct PanelScratch {
  float *x, *t, *panels, *down, *chunks;
  int64_t down_size, chunk_size;
  PanelScratch(Workspace& w, const LoraLinearPlan& plan) {
    const LoraLinearProblem& p = plan.problem;
    const bool lora = p.lora.present();
    const bool converts = p.dtype != DType::kFloat32 || p.dropout_p > 0;
    x = w.take(p.dtype == DType::kFloat32 || plan.bf16_dot ? 0 : p.rows * p.in_features);
    t = w.take(lora ? p.rows * padded_rank(p.lora) : 0);
    panels = w.take(plan.tasks * panel_scratch(p.in_features, lora ? p.lora.max_rank : 0));
    down_size = lora ? round_up(down_scratch(p.lora, p.in_features), 16) : 0;
    chunk_size = lora && converts ? round_up(kChunkRows * p.in_features, 16) : 0;
    down = w.take(plan.tasks * down_size);
    chunks = w.take(plan.tasks * chunk_size);
  }
};

inline void configure(const DeviceInfo& device, LoraLinearPlan* plan) {
  const LoraLinearProblem& p = plan->problem;
  plan->path = p.rows <= kDotRows ? LoraLinearPath::kDot : LoraLinearPath::kPanel;
  plan->bf16_dot = kHasBf16Dot && plan->path == LoraLinearPath::kPanel && p.dtype == DType::kBFloat16 &&
                   p.in_features % 2 == 0 && (device.isa & kIsaAvx512Bf16);
  // A fork and join costs a few microseconds, in which one core reads about 100 KB or does half a million multiply-adds.
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
    PanelScratch scratch(w, *plan);
    plan->workspace = w.used * static_cast<int64_t>(sizeof(float));
  }
}

inline Epilogue epilogue_of(const LoraLinearProblem& p, const LoraLinearArgs& args) {
  return {p.has_bias ? args.bias : nullptr, p.bias_dtype, p.activation, p.has_residual ? args.residual : nullptr,
          args.y, p.dtype, p.out_features};
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
      const Rows dropped =
          dropout ? fp32_rows(args.x, p.dtype, args.x_stride, 0, M, K, dropout, s.dropped) : x;
      down_rows(bank, dropped.data, dropped.stride, 0, M, K, s.t, s.down);
    }
    for (int64_t panel = panels * task / plan.tasks; panel < panels * (task + 1) / plan.tasks; ++panel) {
      const int64_t n = panel * kPanel, columns = N - n < kPanel ? N - n : kPanel;
      with_type(p.dtype, args.weight, [&](auto* weight) {
        dots(x.data, x.stride, M, weight + n * args.weight_stride, args.weight_stride, columns, K, s.sums, kPanel);
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
  const int64_t M = p.rows, K = p.in_features;
  const Bank bank = Bank::forward(p.lora, args.lora, M);
  Workspace w{static_cast<float*>(args.workspace)};
  const PanelScratch s(w, plan);
  const bool convert = p.dtype != DType::kFloat32 && !plan.bf16_dot;
  const Dropout dropout{p.dropout_p, args.dropout_seed};
  if (bank.present() || convert) {
    for_each_task(executor, plan.tasks, [&](int64_t task) {
      const int64_t begin = M * task / plan.tasks, end = M * (task + 1) / plan.tasks;
      if (convert) fp32_rows(args.x, p.dtype, args.x_stride, begin, end, K, Dropout(), s.x + begin * K);
      if (!bank.present()) return;
      const bool use_copy = convert && !dropout;
      down_chunks(bank, use_copy ? s.x : args.x, use_copy ? DType::kFloat32 : p.dtype, use_copy ? K : args.x_stride,
                  begin, end, K, dropout, s.t, s.chunks + task * s.chunk_size, s.down + task * s.down_size);
    });
  }
  PanelProduct product{};
  product.rows = M;
  product.columns = p.out_features;
  product.pairs = plan.bf16_dot;
  const int64_t elements = plan.bf16_dot ? 2 : 1;  // per float of a and of W
  product.depth = K / elements;
  product.a = convert ? s.x : static_cast<const float*>(args.x);
  product.a_stride = convert ? K : args.x_stride / elements;
  product.w = args.weight;
  product.w_dtype = p.dtype;
  product.column_stride = args.weight_stride / elements;
  product.k_stride = 1;
  product.bank = bank.present() ? &bank : nullptr;
  product.t = s.t;
  product.epilogue = epilogue_of(p, args);
  panel_product(product, executor, plan.tasks, s.panels);
}

inline void run_forward(const LoraLinearPlan& plan, const LoraLinearArgs& args, const Executor& executor) {
  plan.path == LoraLinearPath::kDot ? run_dot(plan, args, executor) : run_panel(plan, args, executor);
}
