// Which storage type's kernels a call takes, and the plan in the message if a launch fails.
#include "cuda/lora_linear.h"
#include "cuda/lora_linear_kernels.h"
#include "cuda/primitives/platform.h"

namespace lora_kernels::cuda {

extern template struct LoraLinearKernels<__half>;
extern template struct LoraLinearKernels<__nv_bfloat16>;
extern template struct LoraLinearKernels<float>;

namespace {

Status with_plan(Status status, const std::string& plan) {
  if (!status.ok()) status.text = "lora_linear: " + status.text + "; the plan was: " + plan;
  return status;
}

}  // namespace

Status launch(const LoraLinearPlan& plan, const LoraLinearArgs& args, const Executor& executor) {
  Status status;
  switch (plan.problem.dtype) {
    case DType::kFloat16: status = LoraLinearKernels<__half>::forward(plan, args, executor.stream); break;
    case DType::kBFloat16: status = LoraLinearKernels<__nv_bfloat16>::forward(plan, args, executor.stream); break;
    default: status = LoraLinearKernels<float>::forward(plan, args, executor.stream);
  }
  return status.ok() ? status : with_plan(std::move(status), to_string(plan));
}

Status launch_backward(const LoraLinearBackwardPlan& plan, const LoraLinearBackwardArgs& args,
                       const Executor& executor) {
  Status status;
  switch (plan.problem.forward.dtype) {
    case DType::kFloat16: status = LoraLinearKernels<__half>::backward(plan, args, executor.stream); break;
    case DType::kBFloat16: status = LoraLinearKernels<__nv_bfloat16>::backward(plan, args, executor.stream); break;
    default: status = LoraLinearKernels<float>::backward(plan, args, executor.stream);
  }
  return status.ok() ? status : with_plan(std::move(status), to_string(plan));
}

}  // namespace lora_kernels::cuda
