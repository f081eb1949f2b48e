// What kernels are written in: CUDA's names on the device, the emulation's under a host compiler
// (LORA_KERNELS_EMULATION). Primitives differ between the two in primitives/*.h and nowhere else; each is compared on
// both sides by the GPU tests.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(LORA_KERNELS_EMULATION)
#include "cuda/emulation/names.h"
#define LORA_KERNELS_CALLER , LORA_KERNELS_AT
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define LORA_KERNELS_CALLER
#endif

namespace lora_kernels::cuda {

// The architecture that device code is compiled for. The emulation takes the newest paths unless told otherwise.
#if defined(__CUDA_ARCH__)
constexpr int kArch = __CUDA_ARCH__ / 10;
#elif defined(LORA_KERNELS_EMULATED_ARCH)
constexpr int kArch = LORA_KERNELS_EMULATED_ARCH;
#else
constexpr int kArch = 90;
#endif

// Four registers: 16 bytes, the widest access.
struct alignas(16) Vector {
  uint32_t v[4];
};

}  // namespace lora_kernels::cuda
