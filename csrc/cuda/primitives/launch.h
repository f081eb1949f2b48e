// Launches, and what one kernel of a stream may do before the one before it has finished.
#pragma once

#include <atomic>
#include <string>
#include <utility>

#include "cuda/primitives/platform.h"
#include "lora_kernels/status.h"

namespace lora_kernels::cuda {

struct Launch {
  const char* kernel;  // its name, for messages
  dim3 grid, block;
  size_t shared_bytes;
  void* stream;
  bool early = false;  // may start before the kernel before it has finished (sm_90 on): wait_for_kernel_before() waits
  // Of a multiprocessor's L1 as much as there can be is shared memory while this runs. It is divided anew only when
  // nothing runs there: for kernels that are to run side by side, of which one takes much.
  bool most_shared = false;
  unsigned cluster = 1;  // neighbouring blocks that run together (sm_90 on): cluster.h
};

// Returns once everything that kernels before this one have written can be read. Everything that only they write must
// be read after it.
#if defined(LORA_KERNELS_EMULATION)
inline void wait_for_kernel_before(LORA_KERNELS_AT) {
  emulation::wait_for_kernel_before({"wait_for_kernel_before", file, line});
}
#else
__device__ inline void wait_for_kernel_before() {
  if constexpr (kArch >= 90) asm volatile("griddepcontrol.wait;" ::: "memory");
}
#endif

// The kernel behind this one may start as soon as every block has said so.
__device__ inline void let_next_kernel_start() {
#if !defined(LORA_KERNELS_EMULATION)
  if constexpr (kArch >= 90) asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// The launches of one call. The emulation runs each of them when the next is there, which may then start early.
class Launches {
#if defined(LORA_KERNELS_EMULATION)

 public:
  Launches() { emulation::hold(); }
  Launches(const Launches&) = delete;
  ~Launches() { end(); }
  // Of what had not run.
  Status end() {
    if (std::exchange(ended_, true)) return {};
    try {
      emulation::finish();
    } catch (const emulation::Error& error) {
      return Status::failed(std::string("emulation: ") + error.what());
    }
    return {};
  }

 private:
  bool ended_ = false;
#else

 public:
  Status end() { return {}; }
#endif
};

#if !defined(LORA_KERNELS_EMULATION)
// CMAKE_CUDA_ARCHITECTURES of this library, slashes in the place of its semicolons.
#if !defined(LORA_KERNELS_CUDA_ARCHITECTURES)
#define LORA_KERNELS_CUDA_ARCHITECTURES "unknown"
#endif

// Where no machine code fits the device: what this library has, and the two ways out.
inline std::string no_machine_code() {
  constexpr const char* kBuiltFor =
      "this library was built with CMAKE_CUDA_ARCHITECTURES=" LORA_KERNELS_CUDA_ARCHITECTURES;
  int device = 0, major = 0, minor = 0;
  const bool known = cudaGetDevice(&device) == cudaSuccess &&
                     cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
                     cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess;
  std::string arch = known ? std::to_string(major * 10 + minor) : "<the device's>";
  if (arch == "90") arch += "a";  // wgmma is of no other
  return std::string("; ") + kBuiltFor + ": rebuild with -DCMAKE_CUDA_ARCHITECTURES=" + arch +
         ", or move the operands to the CPU";
}

inline Status not_launched(const Launch& l, cudaError_t error) {
  std::string text = std::string("kernel ") + l.kernel + " could not be launched with " + std::to_string(l.grid.x) +
                     "x" + std::to_string(l.grid.y) + "x" + std::to_string(l.grid.z) + " blocks of " +
                     std::to_string(l.block.x) + " threads and " + std::to_string(l.shared_bytes) +
                     " bytes of shared memory" +
                     (l.cluster > 1 ? ", in clusters of " + std::to_string(l.cluster) : std::string()) + ": " +
                     cudaGetErrorName(error) + ", " + cudaGetErrorString(error);
  if (error == cudaErrorNoKernelImageForDevice) text += no_machine_code();
  cudaGetLastError();  // it is reported here: later calls should not meet it again
  return Status::failed(text);
}
#endif

// Runs kKernel, which takes one structure. Never synchronises or allocates. A template of the kernel itself, so that
// what is remembered of it is its own.
template <auto kKernel, class Params>
Status launch(const Launch& l, const Params& params) {
#if defined(LORA_KERNELS_EMULATION)
  try {
    emulation::launch({l.kernel, l.grid, l.block, l.shared_bytes, l.early, l.cluster,
                       [](const void* p) { kKernel(*static_cast<const Params*>(p)); }, &params, sizeof params});
  } catch (const emulation::Error& error) {
    return Status::failed(std::string("emulation: ") + error.what());
  }
  return {};
#else
  // More than 48 KB, and the division, have to be asked for, once on each device. All that there is is asked for: a
  // kernel's launches differ in what they need. So two threads may ask at the same time.
  static std::atomic<uint64_t> allowed{0}, divided{0}, asked{0}, waits{0};
  cudaError_t error = cudaSuccess;
  bool early = false;
  if (l.shared_bytes > 48 << 10 || l.most_shared || l.early) {
    int device = 0;
    error = cudaGetDevice(&device);
    const uint64_t bit = uint64_t{1} << (device & 63);
    const auto once = [&](std::atomic<uint64_t>* done, const auto& ask) {
      if (error != cudaSuccess || (device < 64 && done->load(std::memory_order_relaxed) & bit)) return;
      error = ask();
      if (error == cudaSuccess) done->fetch_or(bit, std::memory_order_relaxed);
    };
    if (l.shared_bytes > 48 << 10)
      once(&allowed, [&] {
        int most = 0;
        cudaFuncAttributes kernel{};
        cudaError_t asked = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
        if (asked == cudaSuccess) asked = cudaFuncGetAttributes(&kernel, kKernel);
        if (asked != cudaSuccess) return asked;
        return cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    most - static_cast<int>(kernel.sharedSizeBytes));
      });
    // Machine code made from another architecture's, which a device of sm_90 on may run too, has no wait.
    if (l.early && device < 64) {
      once(&asked, [&] {
        cudaFuncAttributes kernel{};
        const cudaError_t known = cudaFuncGetAttributes(&kernel, kKernel);
        if (known == cudaSuccess && kernel.ptxVersion >= 90) waits.fetch_or(bit, std::memory_order_relaxed);
        return known;
      });
      early = waits.load(std::memory_order_relaxed) & bit;
    }
    if (l.most_shared)
      once(&divided, [&] {
        return cudaFuncSetAttribute(kKernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                    cudaSharedmemCarveoutMaxShared);
      });
  }
  if (error == cudaSuccess) {
    cudaLaunchAttribute attributes[3] = {};
    unsigned count = 0;
    if (early) {
      attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attributes[count++].val.programmaticStreamSerializationAllowed = 1;
    }
    if (l.cluster > 1) {
      attributes[count].id = cudaLaunchAttributeClusterDimension;
      attributes[count++].val.clusterDim = {l.cluster, 1, 1};
      // On one multiprocessor two blocks of a cluster would be in step, and their ends at the same time.
      attributes[count].id = cudaLaunchAttributeClusterSchedulingPolicyPreference;
      attributes[count++].val.clusterSchedulingPolicyPreference = cudaClusterSchedulingPolicySpread;
    }
    cudaLaunchConfig_t config{};
    config.gridDim = l.grid;
    config.blockDim = l.block;
    config.dynamicSmemBytes = l.shared_bytes;
    config.stream = static_cast<cudaStream_t>(l.stream);
    config.attrs = attributes;
    config.numAttrs = count;
    error = cudaLaunchKernelEx(&config, kKernel, params);
  }
  return error == cudaSuccess ? Status{} : not_launched(l, error);
#endif
}

}  // namespace lora_kernels::cuda
