// The special function unit: one instruction each, of a multiprocessor's 16 lanes per clock. Both take denormals for
// zero, and give zero for them. By the PTX ISA they are off by no more than 2 (exp2) and 1 (reciprocal) units in the
// last place; the emulation's are the host's, right to one.
#pragma once

#include "cuda/primitives/platform.h"

namespace lora_kernels::cuda {

#if defined(LORA_KERNELS_EMULATION)
namespace detail {
inline float without_denormals(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
}  // namespace detail
#endif

__device__ inline float exp2_approx(float x) {
#if defined(LORA_KERNELS_EMULATION)
  return detail::without_denormals(exp2f(detail::without_denormals(x)));
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

__device__ inline float reciprocal_approx(float x) {
#if defined(LORA_KERNELS_EMULATION)
  return detail::without_denormals(1.0f / detail::without_denormals(x));
#else
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

}  // namespace lora_kernels::cuda
