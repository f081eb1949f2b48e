// Gradients of lora_linear. With g = dy, t = s dropout(x) At (of the forward pass, or made again) and u = s g Bt. To
// have t takes 0.97 to 0.99 of the time of a step, forward and backward, and 0.84 to 0.92 with dropout, whose numbers
// are then not drawn once more (rank 16, 1500 x 512 x 512 to 1500 x 2048 x 512, fp32, AVX-512, one core):
//   dx = g W + mask (u A) / (1 - p)     a panel product like the forward pass, W read along the other axis
//   dB = tt g      [R, N]               sums over rows, in row order: the same bits every time
//   dA = ut dropout(x)  [R, K]
//   dW = gt x, dbias = column sums of g, only where asked
// FLOPs: 2 M N K for dx, 2 M N K for dW, 2 M r (K + N) for each of u, t, dA, dB and the branch of dx.

constexpr int64_t kSumRows =
    256;  // rows packed at a time for the sums over rows: a panel of them fits the second cache

// out[i, j] += sum over rows m in [begin, end) of a[m * a_stride + i] * w[m, j] for one panel of columns from n on.
struct RowSum {
  const float* a;  // element (m, i) at m * a_stride + i
  int64_t a_stride;
  const void* w;  // [rows, columns] of w_dtype, rows of stride w_stride
  DType w_dtype;
  int64_t w_stride, columns;
  Dropout dropout;  // of w, by element index m * columns + j
  float* out;       // [.., columns] fp32
};

inline void pack_rows(const RowSum& s, int64_t begin, int64_t end, int64_t n, int64_t columns, float* panel) {
  with_type(s.w_dtype, s.w, [&](auto* w) {
    pack_panel(w + begin * s.w_stride + n, 1, s.w_stride, columns, end - begin, panel, kPanel);
  });
  if (s.dropout)
    for (int64_t m = begin; m < end; ++m)
      drop(s.dropout, static_cast<uint64_t>(m * s.columns + n), columns, panel + (m - begin) * kPanel);
}

// Adds the packed rows [begin, end) into out rows [first, first + count).
inline void add_row_sum(const RowSum& s, int64_t begin, int64_t end, int64_t n, int64_t columns, const float* panel,
                        int64_t first, int64_t count) {
  for (int64_t i = 0; i < count;) {
    const int64_t rows = tile_rows(count - i, kTileRows);
    with_rows<kTileRows>(rows, [&](auto tag) {
      Tile<decltype(tag)::value, kTileVectors> c;
      clear(c);
      accumulate(c, s.a + begin * s.a_stride + i, 1, s.a_stride, panel, kPanel, end - begin);
      for (int r = 0; r < decltype(tag)::value; ++r)
        for (int j = 0; j * kLanes < columns; ++j) {
          float* out = s.out + (first + i + r) * s.columns + n + j * kLanes;
          const int lanes = columns - j * kLanes < kLanes ? static_cast<int>(columns - j * kLanes) : kLanes;
          store_n(out, load_n(out, lanes) + c.sum[r][j], lanes);
        }
    });
    i += rows;
  }
}

// Sums over all rows, tasks over panels of columns. With a bank: rows go to the rank rows of their adapter.
inline void row_sums(const RowSum& s, int64_t rows, int64_t out_rows, const Bank* bank, const Executor& executor,
                     int tasks, float* scratch) {
  memset(s.out, 0, static_cast<size_t>(out_rows * s.columns) * sizeof(float));
  const int64_t panels = (s.columns + kPanel - 1) / kPanel;
  for_each_task(executor, tasks, [&](int64_t task) {
    float* panel = scratch + task * kSumRows * kPanel;
    for (int64_t p = panels * task / tasks; p < panels * (task + 1) / tasks; ++p) {
      const int64_t n = p * kPanel, columns = s.columns - n < kPanel ? s.columns - n : kPanel;
      for (int64_t m = 0; m < rows;) {
        int64_t end = m + kSumRows < rows ? m + kSumRows : rows;
        AdapterRanks adapter{0, out_rows, 1};
        if (bank) {
          end = bank->run_end(m, end);
          adapter = bank->ranks(bank->adapter_of(m));
        }
        if (adapter.rank > 0) {
          pack_rows(s, m, end, n, columns, panel);
          add_row_sum(s, m, end, n, columns, panel, adapter.begin, adapter.rank);
        }
        m = end;
      }
    }
  });
}

inline PanelCut backward_cut(const LoraLinearBackwardPlan& plan) {
  const LoraLinearProblem& p = plan.problem.forward;
  return PanelCut(plan.tasks, p.rows, p.out_features, plan.l2_bytes);
}

struct BackwardScratch {
  float *dy, *t, *down, *chunks, *sums;
  int64_t down_size, chunk_size;
  PanelScratch dx;  // its t is u
  BackwardScratch(Workspace& w, const LoraLinearBackwardPlan& plan)
      : dx(w, backward_cut(plan), plan.tasks, plan.problem.forward.rows, plan.problem.forward.out_features,
           plan.problem.forward.in_features, plan.problem.forward.lora, false, false) {
    const LoraLinearProblem& p = plan.problem.forward;
    const bool lora = p.lora.present();
    dy = w.take(p.dtype == DType::kFloat32 ? 0 : p.rows * p.out_features);
    const bool makes_t = lora && !plan.problem.has_t;
    t = w.take(makes_t ? p.rows * padded_rank(p.lora) : 0);
    const int64_t deepest = p.in_features > p.out_features ? p.in_features : p.out_features;
    down_size = lora ? round_up(down_scratch(p.lora, deepest), 16) : 0;
    chunk_size = makes_t ? round_up(kChunkRows * p.in_features, 16) : 0;
    down = w.take(plan.tasks * down_size);
    chunks = w.take(plan.tasks * chunk_size);
    sums = w.take(plan.tasks * kSumRows * kPanel);
  }
};

inline void configure_backward(const DeviceInfo& device, LoraLinearBackwardPlan* plan) {
  const LoraLinearProblem& p = plan->problem.forward;
  const double work = static_cast<double>(p.rows * p.out_features) * p.in_features / 500e3;
  plan->tasks = work < device.threads ? static_cast<int>(work) + 1 : device.threads;
  plan->l2_bytes = device.l2_bytes;
  Workspace w{nullptr};
  BackwardScratch scratch(w, *plan);
  plan->workspace = w.used * static_cast<int64_t>(sizeof(float));
}

inline void column_sums(const float* rows, int64_t count, int64_t columns, float* out) {
  memset(out, 0, static_cast<size_t>(columns) * sizeof(float));
  for (int64_t m = 0; m < count; ++m)
    for (int64_t j = 0; j < columns; j += kLanes) {
      const int lanes = columns - j < kLanes ? static_cast<int>(columns - j) : kLanes;
      store_n(out + j, load_n(out + j, lanes) + load_n(rows + m * columns + j, lanes), lanes);
    }
}

inline void run_backward(const LoraLinearBackwardPlan& plan, const LoraLinearBackwardArgs& args,
                         const Executor& executor) {
  const LoraLinearBackwardProblem& b = plan.problem;
  const LoraLinearProblem& p = b.forward;
  const int64_t M = p.rows, N = p.out_features, K = p.in_features;
  const Bank forward = Bank::forward(p.lora, args.lora, M), backward = Bank::backward(p.lora, args.lora, M);
  const Dropout dropout{p.dropout_p, args.dropout_seed};
  const bool lora = forward.present();
  Workspace w{static_cast<float*>(args.workspace)};
  const BackwardScratch s(w, plan);
  const float* dy = p.dtype == DType::kFloat32 ? static_cast<const float*>(args.dy) : s.dy;

  for_each_task(executor, plan.tasks, [&](int64_t task) {
    const int64_t begin = M * task / plan.tasks, end = M * (task + 1) / plan.tasks;
    if (dy == s.dy) fp32_rows(args.dy, p.dtype, N, begin, end, N, Dropout(), s.dy + begin * N);
    if (!lora || !b.needs_dlora) return;
    float* down = s.down + task * s.down_size;
    if (!b.has_t)
      down_chunks(forward, args.x, p.dtype, args.x_stride, begin, end, K, dropout, s.t + begin * padded_rank(p.lora),
                  s.chunks + task * s.chunk_size, down);
    if (!b.needs_dx)  // otherwise u comes with dx
      down_rows(backward, dy, N, begin, end, N, s.dx.t + begin * padded_rank(p.lora), down);
  });
  if (b.needs_dx) {
    PanelProduct product{};
    product.rows = M;
    product.depth = N;
    product.columns = K;
    product.x = dy;
    product.x_dtype = DType::kFloat32;
    product.x_stride = N;
    product.w = args.weight;
    product.w_dtype = p.dtype;
    product.column_stride = 1;
    product.k_stride = args.weight_stride;
    product.bank = lora ? &backward : nullptr;
    product.up_dropout = dropout;
    product.epilogue = {nullptr, p.dtype, Activation::kNone, nullptr, args.dx, p.dtype, K};
    panel_product(product, backward_cut(plan), s.dx, executor, plan.tasks);
  }
  if (b.needs_dlora && lora) {
    const int64_t width = padded_rank(p.lora);
    const float* t = b.has_t ? static_cast<const float*>(args.t) : s.t;
    const int64_t t_width = b.has_t ? kept_t_columns(p.lora) : width;
    row_sums({t, t_width, dy, DType::kFloat32, N, N, Dropout(), args.dlora_b}, M, p.lora.total_rank, &forward, executor,
             plan.tasks, s.sums);
    row_sums({s.dx.t, width, args.x, p.dtype, args.x_stride, K, dropout, args.dlora_a}, M, p.lora.total_rank, &forward,
             executor, plan.tasks, s.sums);
  }
  if (b.needs_dweight)
    row_sums({dy, N, args.x, p.dtype, args.x_stride, K, Dropout(), args.dweight}, M, N, nullptr, executor, plan.tasks,
             s.sums);
  if (b.needs_dbias) column_sums(dy, M, N, args.dbias);
}
