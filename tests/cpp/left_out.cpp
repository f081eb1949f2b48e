// In the place of the kernels of types that a build leaves out (LORA_KERNELS_TYPES): builds that look for planted
// faults, which compile anew each time, and those that are only loaded.
#include "cuda/int8_lora_linear.h"
#include "cuda/kv_attention_step.h"
#include "cuda/kv_pack.h"
#include "cuda/kv_relative_step.h"
#include "cuda/lora_linear_kernels.h"
#include "cuda/primitives/platform.h"

namespace lora_kernels::cuda {
namespace {

Status left_out() { return Status::failed("this build has no kernels of this type (LORA_KERNELS_TYPES)"); }

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

#define LEFT_OUT(T)                          \
  template struct LoraLinearKernels<T>;      \
  template struct Int8LoraLinearKernels<T>;  \
  template struct KvAttentionStepKernels<T>; \
  template struct KvPackKernels<T>;          \
  template struct KvRelativeStepKernels<T>;
#if defined(LORA_KERNELS_WITHOUT_BF16)
LEFT_OUT(__nv_bfloat16)
#endif
#if defined(LORA_KERNELS_WITHOUT_F32)
LEFT_OUT(float)
#endif

}  // namespace lora_kernels::cuda
