// In place of the CUDA sources in a library built without them: plans can be made, and nothing runs.
#include "cuda/lora_linear.h"

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

namespace cuda {

Status launch(const LoraLinearPlan&, const LoraLinearArgs&, const Executor&) { return absent("lora_linear"); }
Status launch_backward(const LoraLinearBackwardPlan&, const LoraLinearBackwardArgs&, const Executor&) {
  return absent("lora_linear_backward");
}

}  // namespace cuda
}  // namespace lora_kernels
