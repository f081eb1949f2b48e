// What a CUDA device says of itself, asked once.
#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <string>

#include "cuda/primitives/platform.h"
#include "lora_kernels/device.h"

namespace lora_kernels {
namespace {

// Whether what such a device runs of CMAKE_CUDA_ARCHITECTURES (slashes for semicolons) was made for sm_90 or later:
// machine code of the same major, or text that its driver compiles; of a number with an `a` for that alone, with an `f`
// for its family. Older text has no clusters, wherever it runs. Names in the place of numbers (native) say nothing.
bool made_for_clusters(const std::string& built_for, int arch) {
  for (size_t at = 0; at < built_for.size();) {
    const size_t end = std::min(built_for.find('/', at), built_for.size());
    const std::string one = built_for.substr(at, end - at);
    at = end + 1;
    const int made_for = std::atoi(one.c_str());
    const size_t digits = one.find_first_not_of("0123456789");
    const char suffix = digits == std::string::npos ? ' ' : one[digits];
    const bool of_family = suffix == 'f' || one.find("-real") != std::string::npos;
    const bool fits = suffix == 'a' ? made_for == arch : made_for <= arch && (!of_family || made_for / 10 == arch / 10);
    if (made_for >= 90 && fits) return true;
  }
  return false;
}

}  // namespace

Status cuda_device(int index, DeviceInfo* device) {
  constexpr int kMost = 64;
  static std::mutex mutex;
  static CudaDevice known[kMost];
  if (index < 0 || index >= kMost)
    return Status::invalid("cuda_device: index: expected 0 to " + std::to_string(kMost - 1) + ", got " +
                           std::to_string(index));
  std::lock_guard<std::mutex> lock(mutex);
  CudaDevice& d = known[index];
  if (!d.arch) {
    CudaDevice found;
    int major = 0, minor = 0, shared = 0, l2 = 0, clock = 0, memory_clock = 0, width = 0;
    // Without the first four there is no plan. The others order paths, and not every device says them (a part of one
    // under virtualisation, a module whose memory is the CPU's): a plan takes 0 for unknown.
    struct {
      int* value;
      cudaDeviceAttr attribute;
      bool needed;
    } const wanted[] = {
        {&major, cudaDevAttrComputeCapabilityMajor, true},
        {&minor, cudaDevAttrComputeCapabilityMinor, true},
        {&found.multiprocessors, cudaDevAttrMultiProcessorCount, true},
        {&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, true},
        {&l2, cudaDevAttrL2CacheSize, false},
        {&clock, cudaDevAttrClockRate, false},
        {&memory_clock, cudaDevAttrMemoryClockRate, false},
        {&width, cudaDevAttrGlobalMemoryBusWidth, false},
    };
    for (const auto& w : wanted) {
      const cudaError_t error = cudaDeviceGetAttribute(w.value, w.attribute, index);
      if (error == cudaSuccess) continue;
      cudaGetLastError();
      *w.value = 0;
      if (!w.needed) continue;
      return Status::unsupported("cuda_device: device " + std::to_string(index) +
                                 " could not be asked: " + cudaGetErrorName(error) + ", " + cudaGetErrorString(error));
    }
    found.arch = major * 10 + minor;
    found.shared_bytes = shared;
#if defined(LORA_KERNELS_SM90A)
    found.wgmma = found.arch == 90;
#endif
    found.clusters = made_for_clusters(LORA_KERNELS_CUDA_ARCHITECTURES, found.arch);
    found.l2_bytes = l2;
    found.clock_hz = clock * 1e3;
    found.memory_bytes_per_second = 2e3 * memory_clock * width / 8;  // two transfers per clock
    d = found;
  }
  *device = on_cuda(d);
  return {};
}

}  // namespace lora_kernels
