// In place of the CUDA sources in a library built without them: plans can be made, and nothing runs.
#include "cuda/int8_lora_linear.h"
#include "cuda/kv_attention_step.h"
#include "cuda/kv_pack.h"
#include "cuda/kv_relative_step.h"

namespace lora_kernels {
namespace {

Status absent(const char* what) {
  return Status::unsupported(
      std::string(what) +
      ": this library was built without its CUDA kernels; build it with LORA_KERNELS_CUDA=ON and "
      "nvcc on the path, or move the operands with .to('cpu')");
}

}  // namespace

Status cuda_device(int, DeviceInfo*) { return absent("cuda_device"); }

Status int8_unpack_cuda(const uint8_t*, int64_t, int64_t, int8_t*, float*, void*) { return absent("int8_unpack"); }

namespace cuda {

Status launch(const LoraLinearPlan&, const LoraLinearArgs&, const Executor&) { return absent("lora_linear"); }
Status launch_backward(const LoraLinearBackwardPlan&, const LoraLinearBackwardArgs&, const Executor&) {
  return absent("lora_linear_backward");
}
Status launch(const Int8LoraLinearPlan&, const Int8LoraLinearArgs&, const Executor&) {
  return absent("int8_lora_linear");
}
Status launch_together(const Int8LoraLinearPlan* const*, const Int8LoraLinearArgs* const*, int, const Executor&) {
  return absent("int8_lora_linear");
}
Status launch(const KvAttentionStepPlan&, const KvAttentionStepArgs&, const Executor&) {
  return absent("kv_attention_step");
}
Status launch(const KvPackPlan&, const KvPackArgs&, const Executor&) { return absent("kv_pack"); }
Status launch(const KvRelativeStepPlan&, const KvRelativeStepArgs&, const Executor&) {
  return absent("kv_relative_step");
}

}  // namespace cuda
}  // namespace lora_kernels
