// The CUDA device of the calling thread, which is the one that TensorRT enqueues on.
#include "operator.h"

#ifdef LORA_KERNELS_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace lora_kernels::tensorrt {

#ifdef LORA_KERNELS_WITH_CUDA

namespace {

Status failure(const char* call, cudaError_t error) {
  return Status::failed(std::string(call) + ": " + cudaGetErrorName(error) + ", " + cudaGetErrorString(error));
}

}  // namespace

Status operands_device(DeviceInfo* device) {
  int index = 0;
  if (const cudaError_t error = cudaGetDevice(&index); error != cudaSuccess) return failure("cudaGetDevice", error);
  return cuda_device(index, device);
}

Status copy_on_stream(void* to, const void* from, size_t bytes, void* stream) {
  const cudaError_t error =
      cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? Status{} : failure("cudaMemcpyAsync", error);
}

#else

Status operands_device(DeviceInfo* device) { return cuda_device(0, device); }  // refuses, and says why

Status copy_on_stream(void*, const void*, size_t, void*) {
  return Status::unsupported("this plugin library was built without its CUDA kernels");
}

#endif

}  // namespace lora_kernels::tensorrt
