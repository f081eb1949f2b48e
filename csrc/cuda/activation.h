// Activations of the epilogues in fp32, without a branch: a few fused multiply-adds around two instructions of the
// special function unit (primitives/special.h).
//
// Their relative error in fp32, wherever the exact value is a normal number, is below 6.5e-7 (GELU) and 4e-7 (SiLU)
// with exp2 and reciprocal rounded: over all of fp32 it is 6.05e-7 and 3.7e-7, and tests/cpp/emulation_activation.cpp
// looks at a part. With those of the device off by 2 units and 1 in the last place, all the same way, it came to 9.4e-7
// and 8.9e-7. NaN gives NaN, +inf itself, -inf zero. Below the normal numbers results are off by a few units of the
// smallest, and GELU's are zero where the exponential is no normal number.
//
// What rounding takes from an argument of exp2 costs the result about as many units in the last place as the argument
// is large. So what it took from GELU's square, and from products with log2(e), is found by fma and put back as a
// factor.
#pragma once

#include "cuda/primitives/special.h"
#include "lora_kernels/types.h"

namespace lora_kernels::cuda {

// x Phi(x) = max(x, 0) - u Q(u), of u = |x|, with Q(u) = exp(-u^2 / 2) g(u) the upper tail of the normal distribution.
// g falls slowly: in t = 1 / (1 + c u) the function (1 + c u) g(u) is a polynomial of degree 7 but for 8.4e-8 of it,
// up to the u = 13.2 where the exponential is the smallest normal number. c is what makes that least; the coefficients
// are half of the minimax polynomial's (exchange algorithm, relative errors), since what is put back is 2 + d.
__device__ inline float gelu(float x) {
  const float u = fminf(fabsf(x), 16.0f);  // the exponential is zero there; infinity would make NaN of it
  const float t = reciprocal_approx(fmaf(u, 0.304f, 1.0f));
  float g = 0x1.2dfbaep-6f;
  g = fmaf(g, t, -0x1.3e1758p-4f);
  g = fmaf(g, t, 0x1.89ab30p-4f);
  g = fmaf(g, t, -0x1.618f1ap-6f);
  g = fmaf(g, t, 0x1.fa2348p-5f);
  g = fmaf(g, t, 0x1.a380fep-5f);
  g = fmaf(g, t, 0x1.f46a16p-5f);
  g = fmaf(g, t, 0x1.f093b8p-5f);
  const float square = u * u, exponent = square * -0.72134752f;  // log2(e) / 2
  // -u^2 - 2 ln(2) exponent: fp32's ln(2) is right to 2.8e-9, which is 2.4e-7 of the smallest result
  const float d = fmaf(exponent, -1.38629436f, -square) + fmaf(-u, u, square);
  const float tail = u * t * g * (2.0f + d);
  return fmaf(-exp2_approx(exponent), tail, x < 0.0f ? 0.0f : x);
}

// The same for results of sixteen bits: off by 4e-5 at most, a sixth of what rounding to fp16 takes at least of some.
// The polynomial has degree 4 and is off by 2.7e-5; what rounding takes from the exponent is not put back.
__device__ inline float gelu_of_16_bits(float x) {
  const float u = fminf(fabsf(x), 16.0f);
  const float t = reciprocal_approx(fmaf(u, 0.37537f, 1.0f));
  float g = -0.09127754f;
  g = fmaf(g, t, 0.20094315f);
  g = fmaf(g, t, 0.0830386f);
  g = fmaf(g, t, 0.15809993f);
  g = fmaf(g, t, 0.14918313f);
  return fmaf(-exp2_approx(u * u * -0.72134752f), u * t * g, x < 0.0f ? 0.0f : x);
}

// x / (1 + exp(-x)) with the exponential of -|x|, h squared, whose smallest value would be no normal number.
__device__ inline float silu(float x) {
  const float u = fminf(fabsf(x), 128.0f);
  const float exponent = u * -0.72134752f;  // of h: log2(e) / 2
  // -u - 2 ln(2) exponent, with what fp32's ln(2) lacks: the end of the range is further away than GELU's
  const float d = fmaf(exponent, 3.8093093e-9f, fmaf(exponent, -1.38629436f, -u));
  const float h = exp2_approx(exponent), more = fmaf(h, d, h);
  const float share = reciprocal_approx(fmaf(h, more, 1.0f));
  return (x < 0.0f ? -u * h * more : x) * share;
}

// For a result of type T.
template <class T>
__device__ inline float activate(float x, Activation activation) {
  if (activation == Activation::kGelu) return sizeof(T) == 2 ? gelu_of_16_bits(x) : gelu(x);
  if (activation == Activation::kSilu) return silu(x);
  return x;
}

}  // namespace lora_kernels::cuda
