// 16 bytes at a time: plain loads and stores, and copies from global to shared memory that land later (cp.async,
// sm_80 on; before, they go through registers and have landed at once).
#pragma once

#include "cuda/primitives/shared.h"

namespace lora_kernels::cuda {

__device__ inline Vector load16(const void* from) {
#if defined(LORA_KERNELS_EMULATION)
  if (reinterpret_cast<uintptr_t>(from) % 16) emulation::refuse("a load of 16 bytes from a misaligned address");
#endif
  return *static_cast<const Vector*>(from);
}

// The same through the read-only path, for what no kernel writes while this grid is resident: not for what a kernel
// before one that starts early makes.
__device__ inline Vector load16_constant(const void* from) {
#if defined(LORA_KERNELS_EMULATION)
  return load16(from);
#else
  const uint4 u = __ldg(static_cast<const uint4*>(from));
  return {{u.x, u.y, u.z, u.w}};
#endif
}

__device__ inline void store16(void* to, const Vector& v) {
#if defined(LORA_KERNELS_EMULATION)
  if (reinterpret_cast<uintptr_t>(to) % 16) emulation::refuse("a store of 16 bytes to a misaligned address");
  emulation::wrote(to);
#endif
  *static_cast<Vector*>(to) = v;
}

// Asks that `bytes` from `from` on come to L2, shared out among `threads` of which this is `thread`. L2 holds nothing
// that is stale, so this may come before wait_for_kernel_before(), where a load may not.
__device__ inline void prefetch(const void* from, int64_t bytes, int thread, int threads) {
  constexpr int kLine = 128;
  const char* line = static_cast<const char*>(from);
  for (int64_t i = int64_t{thread} * kLine; i < bytes; i += int64_t{threads} * kLine) {
#if defined(LORA_KERNELS_EMULATION)
    static_cast<void>(*static_cast<const volatile char*>(line + i));  // it has to be there
#else
    asm volatile("prefetch.global.L2 [%0];" ::"l"(line + i));
#endif
  }
}

// 16 bytes, of which the first `valid` come from `from` (aligned to 16) and the rest are zero.
__device__ inline void copy16_async(void* to, const void* from, int valid) {
#if defined(LORA_KERNELS_EMULATION)
  if (reinterpret_cast<uintptr_t>(to) % 16 || (valid && reinterpret_cast<uintptr_t>(from) % 16))
    emulation::refuse("cp.async of a misaligned address");
  emulation::start_copy(to, from, 16, valid, [](void* to, const void* from, int bytes, int valid) {
    // in pairs of bytes, so that sanitizers see who copies
    for (int i = 0; i < bytes / 2; ++i)
      static_cast<uint16_t*>(to)[i] = 2 * i < valid ? static_cast<const uint16_t*>(from)[i] : uint16_t{0};
  });
#else
  if constexpr (kArch >= 80) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid)
                 : "memory");
  } else {
    Vector v = {{0, 0, 0, 0}};
    if (valid == 16) {
      v = load16(from);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (2 * i < valid) v.v[i / 2] |= static_cast<uint32_t>(static_cast<const uint16_t*>(from)[i]) << 16 * (i % 2);
    }
    store16(to, v);
  }
#endif
}

// Ends a group of copies, perhaps an empty one.
__device__ inline void commit_copies() {
#if defined(LORA_KERNELS_EMULATION)
  emulation::commit_copies();
#else
  if constexpr (kArch >= 80) asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// All but this thread's newest kNewest groups have landed. Other threads see them after a barrier.
template <int kNewest>
__device__ inline void wait_copies() {
#if defined(LORA_KERNELS_EMULATION)
  emulation::wait_copies(kNewest);
#else
  if constexpr (kArch >= 80) asm volatile("cp.async.wait_group %0;" ::"n"(kNewest) : "memory");
#endif
}

}  // namespace lora_kernels::cuda
