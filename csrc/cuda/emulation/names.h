// CUDA's names for what threads are and do together, over the engine. Only what our kernels use.
#pragma once

#include <algorithm>
#include <cmath>

#include "cuda/emulation/emulation.h"

#define LORA_KERNELS_AT const char *file = __builtin_FILE(), int line = __builtin_LINE()

#define threadIdx (::lora_kernels::emulation::self().thread)
#define blockIdx (::lora_kernels::emulation::self().block)
#define blockDim (::lora_kernels::emulation::self().block_size)
#define gridDim (::lora_kernels::emulation::self().grid_size)

inline void __syncthreads(LORA_KERNELS_AT) { lora_kernels::emulation::barrier({"__syncthreads", file, line}); }

inline void __syncwarp(uint32_t mask = ~0u, LORA_KERNELS_AT) {
  lora_kernels::emulation::collective(
      mask, {"__syncwarp", file, line}, nullptr, 0, [](lora_kernels::emulation::Slot*, uint32_t) {}, true);
}

namespace lora_kernels::emulation {

inline int lane() {
  const Self& s = self();
  return static_cast<int>((s.thread.x + s.block_size.x * (s.thread.y + s.block_size.y * s.thread.z)) % 32);
}

template <class T>
T shuffled(uint32_t mask, T value, int from, const Call& call) {
  static_assert(sizeof(T) <= 8, "shuffles move up to 8 bytes");
  Shuffle s{0, from};
  __builtin_memcpy(&s.value, &value, sizeof value);
  return meet<T>(mask, call, s, shuffle);
}

}  // namespace lora_kernels::emulation

template <class T>
T __shfl_sync(uint32_t mask, T value, int from, int width = 32, LORA_KERNELS_AT) {
  const int base = lora_kernels::emulation::lane() & ~(width - 1);
  return lora_kernels::emulation::shuffled(mask, value, base + (from & (width - 1)), {"__shfl_sync", file, line});
}

template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32, LORA_KERNELS_AT) {
  const int lane = lora_kernels::emulation::lane(), from = lane ^ bits;
  return lora_kernels::emulation::shuffled(mask, value, from < (lane & ~(width - 1)) + width ? from : lane,
                                           {"__shfl_xor_sync", file, line});
}

template <class T>
T __shfl_down_sync(uint32_t mask, T value, unsigned by, int width = 32, LORA_KERNELS_AT) {
  const int lane = lora_kernels::emulation::lane(), from = lane + static_cast<int>(by);
  return lora_kernels::emulation::shuffled(mask, value, from < (lane & ~(width - 1)) + width ? from : lane,
                                           {"__shfl_down_sync", file, line});
}

inline uint32_t __ballot_sync(uint32_t mask, int predicate, LORA_KERNELS_AT) {
  return lora_kernels::emulation::meet<uint32_t>(mask, {"__ballot_sync", file, line}, predicate,
                                                 lora_kernels::emulation::ballot);
}

inline int __any_sync(uint32_t mask, int predicate, LORA_KERNELS_AT) {
  return lora_kernels::emulation::meet<uint32_t>(mask, {"__any_sync", file, line}, predicate,
                                                 lora_kernels::emulation::ballot) != 0;
}

// Integers only: the order of floating-point sums would matter, and our results do not depend on it.
template <class T>
T atomicAdd(T* p, T value) {
  static_assert(std::is_integral_v<T>, "atomics whose order matters are not used");
  return __atomic_fetch_add(p, value, __ATOMIC_RELAXED);
}

inline void __threadfence() {}
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline float __int_as_float(int i) {
  float f;
  __builtin_memcpy(&f, &i, sizeof f);
  return f;
}
inline int __float_as_int(float f) {
  int i;
  __builtin_memcpy(&i, &f, sizeof i);
  return i;
}
inline uint32_t __float_as_uint(float f) { return static_cast<uint32_t>(__float_as_int(f)); }
inline float __uint_as_float(uint32_t u) { return __int_as_float(static_cast<int>(u)); }

using std::max;
using std::min;
