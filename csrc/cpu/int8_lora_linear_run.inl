// The functions of int8_lora_linear's implementations: they choose between the tasks of int8_lora_linear.inl, which
// read all weights, and those of int8_screen.inl, and merge what the tasks found where the largest outputs are asked
// for.

inline void configure(const DeviceInfo& device, Int8LoraLinearPlan* plan) {
  const Int8LoraLinearProblem& p = plan->problem;
  // A fork and join costs a few microseconds, in which one core reads about 100 KB or does two million multiply-adds.
  const double bytes = static_cast<double>(p.out_features) * static_cast<double>(p.in_features);
  const double by_bytes = bytes / 100e3, by_work = bytes * static_cast<double>(p.rows) / 2e6;
  const double worth = by_bytes > by_work ? by_bytes : by_work;
  int64_t tasks = device.threads;
  if (worth < static_cast<double>(tasks)) tasks = static_cast<int64_t>(worth) + 1;
  const Int8Grid grid = int8_grid(p, tasks);
  plan->tasks = static_cast<int>(grid.row_parts * grid.block_parts);
  plan->bf16_dot = kHasBf16Dot && (device.isa & kIsaAvx512Bf16) && device.fast_bf16_dot && p.lora.present() &&
                   p.lora.dtype == DType::kBFloat16 && p.in_features % 2 == 0 && p.rows >= kPairRows &&
                   (p.lora.groups == 0 || p.rows / p.lora.groups >= kPairRows);
  int64_t floats = Int8Scratch(nullptr, *plan, grid).used * plan->tasks;
  if (p.top_k) floats += p.rows * grid.block_parts * TopList::floats(p.top_k, p.log_sum);
  if (int8_screens(p)) floats += int8_screen_floats(p, grid);
  plan->workspace = floats * static_cast<int64_t>(sizeof(float));
}

inline void run_forward(const Int8LoraLinearPlan& plan, const Int8LoraLinearArgs& args, const Executor& executor) {
  const Int8LoraLinearProblem& p = plan.problem;
  Bank bank = Bank::forward(p.lora, args.lora, p.rows);
  bank.pairs = plan.bf16_dot;
  const Int8Grid grid = int8_grid(p, plan.tasks);
  const int64_t scratch = Int8Scratch(nullptr, plan, grid).used, list = TopList::floats(p.top_k, p.log_sum);
  float* memory = static_cast<float*>(args.workspace);
  float* lists = memory + scratch * plan.tasks;  // [block_parts][rows], for top_k
  if (int8_screens(p))
    int8_run_screened(plan, args, grid, memory, lists, executor);
  else
    for_each_task(executor, plan.tasks, [&](int64_t index) {
      int8_run_task(plan, args, bank, grid, index, memory + index * scratch, lists);
    });
  if (!p.top_k) return;
  in_one_task(executor, [&] {
    for (int64_t m = 0; m < p.rows; ++m) {
      TopList top(lists + m * list, p.top_k, p.log_sum);
      for (int64_t part = 1; part < grid.block_parts; ++part)
        top.merge(TopList(lists + (part * p.rows + m) * list, p.top_k, p.log_sum));
      for (int64_t i = 0; i < p.top_k; ++i) {
        args.top_columns[m * p.top_k + i] = top.columns[i];
        if (args.top_values) args.top_values[m * p.top_k + i] = top.values[i];
      }
      if (p.log_sum) args.log_sum[m] = top.log_of_sum();
    }
  });
}
