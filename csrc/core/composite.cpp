#include "lora_kernels/composite.h"

#include <algorithm>

#include "core/team.h"
#include "cuda/int8_shapes.h"

namespace lora_kernels {
namespace {

// Problem, Plan and Args of an operator stand at the same place of their variants.
template <size_t I = 0>
Status plan_stage(const StageProblem& problem, const DeviceInfo& device, StagePlan* chosen) {
  if constexpr (I + 1 < std::variant_size_v<StageProblem>)
    if (problem.index() != I) return plan_stage<I + 1>(problem, device, chosen);
  return plan(std::get<I>(problem), device, &chosen->emplace<I>());
}

template <size_t I = 0>
Status run_stage(const StagePlan& plan, const StageArgs& args, void* workspace, const Executor& executor) {
  if constexpr (I + 1 < std::variant_size_v<StagePlan>)
    if (plan.index() != I) return run_stage<I + 1>(plan, args, workspace, executor);
  auto own = std::get<I>(args);
  own.workspace = workspace;
  return run(std::get<I>(plan), own, executor);
}

// The products that stand in a row from `first` on.
struct Products {
  static constexpr size_t kMost = cuda::kInt8MostTogether;
  const Int8LoraLinearPlan* plans[kMost];
  const Int8LoraLinearArgs* args[kMost];
  int count = 0;

  Products(const CompositePlan& plan, const CompositeArgs& all, size_t first) {
    for (size_t i = first; i < plan.stages.size() && i - first < kMost; ++i, ++count) {
      plans[count] = std::get_if<Int8LoraLinearPlan>(&plan.stages[i]);
      args[count] = std::get_if<Int8LoraLinearArgs>(&all.stages[i]);
      if (!plans[count] || !args[count]) return;
    }
  }
};

// How many stages from `first` on one launch makes.
int stages_together(const CompositePlan& plan, const CompositeArgs& args, size_t first) {
  const Products products(plan, args, first);
  return products.count > 1 ? together(products.plans, products.args, products.count) : 1;
}

// These need no workspace.
Status run_together(const CompositePlan& plan, const CompositeArgs& args, size_t first, int count,
                    const Executor& executor) {
  const Products products(plan, args, first);
  return run(products.plans, products.args, count, executor);
}

Status run_stages(const CompositePlan& plan, const CompositeArgs& args, const Executor& executor) {
  for (size_t i = 0; i < plan.stages.size();) {
    const int count = stages_together(plan, args, i);
    Status status = count > 1 ? run_together(plan, args, i, count, executor)
                              : run_stage(plan.stages[i], args.stages[i], args.workspace, executor);
    if (!status.ok()) return status;
    i += static_cast<size_t>(count);
  }
  return {};
}

}  // namespace

Status plan(const CompositeProblem& problem, const DeviceInfo& device, CompositePlan* chosen) {
  chosen->stages.clear();
  chosen->threads = device.threads;
  chosen->workspace = 0;
  for (const StageProblem& stage : problem.stages) {
    StagePlan stage_plan;
    const Status status = plan_stage(stage, device, &stage_plan);
    if (!status.ok()) return status;
    const int64_t bytes = std::visit([](const auto& p) { return workspace_bytes(p); }, stage_plan);
    chosen->workspace = std::max(chosen->workspace, bytes);
    chosen->stages.push_back(std::move(stage_plan));
  }
  return {};
}

int64_t workspace_bytes(const CompositePlan& plan) { return plan.workspace; }

Status run(const CompositePlan& plan, const CompositeArgs& args, const Executor& executor) {
  if (args.stages.size() != plan.stages.size())
    return Status::invalid("composite: args: expected one for each of " + std::to_string(plan.stages.size()) +
                           " stages, got " + std::to_string(args.stages.size()) +
                           "; add an argument with every problem");
  for (size_t i = 0; i < plan.stages.size(); ++i)
    if (args.stages[i].index() != plan.stages[i].index())
      return Status::invalid("composite: args: stage " + std::to_string(i) +
                             " is of another operator than its plan; keep both in one order");
  if (plan.threads <= 1) return run_stages(plan, args, executor);
  TeamBoard board;
  Status status;
  for_each_task(executor, plan.threads, [&](int64_t index) {
    TeamMember member(&board, index, plan.threads);
    // Every member comes to the same status: it depends on what they all read.
    Status own = run_stages(plan, args, member.executor());
    if (index == 0) status = std::move(own);
    member.leave();
  });
  return status;
}

std::string to_string(const CompositeProblem& problem) {
  std::string text = "composite of " + std::to_string(problem.stages.size()) + " stages";
  for (const StageProblem& stage : problem.stages)
    text += "\n  " + std::visit([](const auto& p) { return to_string(p); }, stage);
  return text;
}

std::string to_string(const CompositePlan& plan) {
  std::string text =
      "composite threads=" + std::to_string(plan.threads) + " workspace=" + std::to_string(plan.workspace);
  for (const StagePlan& stage : plan.stages)
    text += "\n  " + std::visit([](const auto& p) { return to_string(p); }, stage);
  return text;
}

}  // namespace lora_kernels
