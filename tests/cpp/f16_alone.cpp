// In the place of the kernels of other types than fp16, for builds that look for planted faults: these compile anew
// each time, and one type shows them.
#include "cuda/int8_lora_linear.h"
#include "cuda/kv_attention_step.h"
#include "cuda/kv_pack.h"
#include "cuda/kv_relative_step.h"
#include "cuda/lora_linear_kernels.h"
#include "cuda/primitives/platform.h"

namespace lora_kernels::cuda {
namespace {

Status left_out() { return Status::failed("this build has kernels of float16 alone (LORA_KERNELS_F16_ALONE)"); }

}  // namespace

template <class T>
Status LoraLinearKernels<T>::forward(const LoraLinearPlan&, const LoraLinearArgs&, void*) {
  return left_out();
}
template <class T>
Status LoraLinearKernels<T>::backward(const LoraLinearBackwardPlan&, const LoraLinearBackwardArgs&, void*) {
  return left_out();
}
template <class T>
Status Int8LoraLinearKernels<T>::forward(const Int8LoraLinearPlan&, const Int8LoraLinearArgs&, void*) {
  return left_out();
}
template <class T>
Status Int8LoraLinearKernels<T>::forward_together(const Int8LoraLinearPlan* const*, const Int8LoraLinearArgs* const*,
                                                  int, void*) {
  return left_out();
}

template <class Q>
Status KvAttentionStepKernels<Q>::run(const KvAttentionStepPlan&, const KvAttentionStepArgs&, void*) {
  return left_out();
}
template <class T>
Status KvPackKernels<T>::run(const KvPackPlan&, const KvPackArgs&, void*) {
  return left_out();
}
template <class Q>
Status KvRelativeStepKernels<Q>::run(const KvRelativeStepPlan&, const KvRelativeStepArgs&, void*) {
  return left_out();
}

template struct LoraLinearKernels<__nv_bfloat16>;
template struct LoraLinearKernels<float>;
template struct Int8LoraLinearKernels<__nv_bfloat16>;
template struct Int8LoraLinearKernels<float>;
template struct KvAttentionStepKernels<__nv_bfloat16>;
template struct KvAttentionStepKernels<float>;
template struct KvPackKernels<__nv_bfloat16>;
template struct KvPackKernels<float>;
template struct KvRelativeStepKernels<__nv_bfloat16>;
template struct KvRelativeStepKernels<float>;

}  // namespace lora_kernels::cuda
