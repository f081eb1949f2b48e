// Which type's kernels a call of kv_attention_step, kv_relative_step or kv_pack takes, and the plan in the message if a
// launch fails.
#include "cuda/kv_attention_step.h"
#include "cuda/kv_pack.h"
#include "cuda/kv_relative_step.h"
#include "cuda/primitives/platform.h"

namespace lora_kernels::cuda {

extern template struct KvAttentionStepKernels<__half>;
extern template struct KvAttentionStepKernels<__nv_bfloat16>;
extern template struct KvAttentionStepKernels<float>;
extern template struct KvPackKernels<__half>;
extern template struct KvPackKernels<__nv_bfloat16>;
extern template struct KvPackKernels<float>;
extern template struct KvRelativeStepKernels<__half>;
extern template struct KvRelativeStepKernels<__nv_bfloat16>;
extern template struct KvRelativeStepKernels<float>;

namespace {

template <template <class> class Kernels, class Plan, class Args>
Status launch_of(const char* op, const Plan& plan, const Args& args, const Executor& executor) {
  Status status;
  switch (plan.problem.dtype) {
    case DType::kFloat16: status = Kernels<__half>::run(plan, args, executor.stream); break;
    case DType::kBFloat16: status = Kernels<__nv_bfloat16>::run(plan, args, executor.stream); break;
    default: status = Kernels<float>::run(plan, args, executor.stream);
  }
  if (!status.ok()) status.text = std::string(op) + ": " + status.text + "; the plan was: " + to_string(plan);
  return status;
}

}  // namespace

Status launch(const KvAttentionStepPlan& plan, const KvAttentionStepArgs& args, const Executor& executor) {
  return launch_of<KvAttentionStepKernels>("kv_attention_step", plan, args, executor);
}

Status launch(const KvRelativeStepPlan& plan, const KvRelativeStepArgs& args, const Executor& executor) {
  return launch_of<KvRelativeStepKernels>("kv_relative_step", plan, args, executor);
}

Status launch(const KvPackPlan& plan, const KvPackArgs& args, const Executor& executor) {
  return launch_of<KvPackKernels>("kv_pack", plan, args, executor);
}

}  // namespace lora_kernels::cuda
