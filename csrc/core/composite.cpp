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

// What stands at stage `first` and, where that is a product on a device, the products behind it that one launch makes
// with it.
struct Together {
  static constexpr int kMost = cuda::kInt8MostTogether;
  const Int8LoraLinearPlan* plans[kMost];
  const Int8LoraLinearArgs* args[kMost];
  int count = 1;

  Together(const CompositePlan& plan, const CompositeArgs& all, size_t first) {
    int products = 0;
    for (size_t i = first; i < plan.stages.size() && products < kMost; ++i, ++products) {
      plans[products] = std::get_if<Int8LoraLinearPlan>(&plan.stages[i]);
      if (!plans[products] || !plans[products]->cuda.arch) break;
      args[products] = std::get_if<Int8LoraLinearArgs>(&all.stages[i]);
    }
    if (products > 1) count = together(plans, args, products);
  }
};

Status run_stages(const CompositePlan& plan, const CompositeArgs& args, const Executor& executor) {
  for (size_t i = 0; i < plan.stages.size();) {
    const Together stage(plan, args, i);
    // Several need no workspace.
    Status status = stage.count > 1 ? run(stage.plans, stage.args, stage.count, executor)
                                    : run_stage(plan.stages[i], args.stages[i], args.workspace, executor);
    if (!status.ok()) return status;
    i += static_cast<size_t>(stage.count);
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
