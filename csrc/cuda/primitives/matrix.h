// Tensor-core products and the loads of their operands. Lane l of a warp is in group g = l / 4 and column t = l % 4.
#pragma once

#include "cuda/primitives/shared.h"

namespace lora_kernels::cuda {

// Four 8x8 matrices of 16-bit elements (or 8x4 of 32 bits). Lane l gives the address of row l % 8 of matrix l / 8, and
// receives of each matrix the two elements at (g, 2 t), or one of 32 bits at (g, t).
__device__ inline void ldmatrix(uint32_t (&r)[4], const void* row LORA_KERNELS_CALLER) {
#if defined(LORA_KERNELS_EMULATION)
  if (reinterpret_cast<uintptr_t>(row) % 16) emulation::refuse("ldmatrix from a misaligned row");
  for (int i = 0; i < 4; ++i) emulation::expect_written(static_cast<const uint32_t*>(row) + i, "ldmatrix");
  emulation::MatrixRow in;
  memcpy(in.words, row, sizeof in.words);
  in.address = reinterpret_cast<uintptr_t>(row);
  const Vector out = emulation::meet<Vector>(~0u, {"ldmatrix", file, line}, in, emulation::ldmatrix);
  for (int i = 0; i < 4; ++i) r[i] = out.v[i];
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
#endif
}

// The same with each matrix of 16-bit elements transposed: lane l receives the elements at (2 t, g) and (2 t + 1, g).
__device__ inline void ldmatrix_trans(uint32_t (&r)[4], const void* row LORA_KERNELS_CALLER) {
#if defined(LORA_KERNELS_EMULATION)
  if (reinterpret_cast<uintptr_t>(row) % 16) emulation::refuse("ldmatrix.trans from a misaligned row");
  for (int i = 0; i < 4; ++i) emulation::expect_written(static_cast<const uint32_t*>(row) + i, "ldmatrix.trans");
  emulation::MatrixRow in;
  memcpy(in.words, row, sizeof in.words);
  in.address = reinterpret_cast<uintptr_t>(row);
  const Vector out = emulation::meet<Vector>(~0u, {"ldmatrix.trans", file, line}, in, emulation::ldmatrix_trans);
  for (int i = 0; i < 4; ++i) r[i] = out.v[i];
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
#endif
}

#if defined(LORA_KERNELS_EMULATION)
namespace detail {
template <int kA, int kB>
void meet_mma(float (&c)[4], const uint32_t* a, const uint32_t* b, const emulation::Call& call,
              emulation::Compute compute) {
  struct In {
    uint32_t a[kA], b[kB];
    float c[4];
  } in;
  struct Out {
    float c[4];
  };
  for (int i = 0; i < kA; ++i) in.a[i] = a[i];
  for (int i = 0; i < kB; ++i) in.b[i] = b[i];
  for (int i = 0; i < 4; ++i) in.c[i] = c[i];
  const Out out = emulation::meet<Out>(~0u, call, in, compute);
  for (int i = 0; i < 4; ++i) c[i] = out.c[i];
}
}  // namespace detail
#endif

#define LORA_KERNELS_MMA(shape_and_types)                                                       \
  asm("mma.sync.aligned." shape_and_types " {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};" \
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                          \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))

// c[16x8] += a[16x8] b[8x8], all that sm_75 has: a[0] at (g, 2 t), a[1] at (g + 8, 2 t), b at (k = 2 t, n = g).
__device__ inline void mma_m16n8k8_f16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b0 LORA_KERNELS_CALLER) {
#if defined(LORA_KERNELS_EMULATION)
  const uint32_t a[2] = {a0, a1};
  detail::meet_mma<2, 1>(c, a, &b0, {"mma.m16n8k8", file, line}, emulation::mma_m16n8k8_f16);
#else
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5},{%6},{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(b0));
#endif
}

// c[16x8] += a[16x16] b[16x8]. a: (g, 2 t), (g + 8, 2 t), (g, 2 t + 8), (g + 8, 2 t + 8), two elements each;
// b: (k = 2 t, n = g), (k = 2 t + 8, n = g); c: (g, 2 t), (g, 2 t + 1), (g + 8, 2 t), (g + 8, 2 t + 1).
__device__ inline void mma_step(__half, float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                uint32_t b1 LORA_KERNELS_CALLER) {
  if constexpr (kArch < 80) {
    mma_m16n8k8_f16(c, a[0], a[1], b0);
    mma_m16n8k8_f16(c, a[2], a[3], b1);
  } else {
#if defined(LORA_KERNELS_EMULATION)
    const uint32_t b[2] = {b0, b1};
    detail::meet_mma<4, 2>(c, a, b, {"mma.m16n8k16", file, line}, emulation::mma_m16n8k16_f16);
#else
    LORA_KERNELS_MMA("m16n8k16.row.col.f32.f16.f16.f32");
#endif
  }
}

__device__ inline void mma_step(__nv_bfloat16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                uint32_t b1 LORA_KERNELS_CALLER) {
#if defined(LORA_KERNELS_EMULATION)
  const uint32_t b[2] = {b0, b1};
  detail::meet_mma<4, 2>(c, a, b, {"mma.m16n8k16", file, line}, emulation::mma_m16n8k16_bf16);
#else
  if constexpr (kArch >= 80) LORA_KERNELS_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
#endif
}

// c[16x8] += a[16x8] b[8x8] of tf32: fp32 bits whose low 13 are not looked at. a: (g, t), (g + 8, t), (g, t + 4),
// (g + 8, t + 4); b: (k = t, n = g), (k = t + 4, n = g).
__device__ inline void mma_step(float, float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                uint32_t b1 LORA_KERNELS_CALLER) {
#if defined(LORA_KERNELS_EMULATION)
  const uint32_t b[2] = {b0, b1};
  detail::meet_mma<4, 2>(c, a, b, {"mma.m16n8k8.tf32", file, line}, emulation::mma_m16n8k8_tf32);
#else
  if constexpr (kArch >= 80) LORA_KERNELS_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
#endif
}

// c[8x8] += a[8x16] b[16x8] of signed bytes, all that sm_75 has: a at (g, 4 t), b at (k = 4 t, n = g), c at (g, 2 t),
// (g, 2 t + 1).
__device__ inline void mma_m8n8k16_s8(int32_t& c0, int32_t& c1, uint32_t a, uint32_t b LORA_KERNELS_CALLER) {
#if defined(LORA_KERNELS_EMULATION)
  struct In {
    uint32_t a, b;
    int32_t c[2];
  } in{a, b, {c0, c1}};
  struct Out {
    int32_t c[2];
  };
  const Out out = emulation::meet<Out>(~0u, {"mma.m8n8k16.s8", file, line}, in, emulation::mma_m8n8k16_s8);
  c0 = out.c[0];
  c1 = out.c[1];
#else
  asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0,%1},{%2},{%3},{%0,%1};"
      : "+r"(c0), "+r"(c1)
      : "r"(a), "r"(b));
#endif
}

// c[16x8] += a[16x32] b[32x8] of signed bytes: four to a register, columns 4 t; registers as in products of 16 bits.
__device__ inline void mma_m16n8k32_s8(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                       uint32_t b1 LORA_KERNELS_CALLER) {
  if constexpr (kArch < 80) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      mma_m8n8k16_s8(c[2 * h], c[2 * h + 1], a[h], b0);
      mma_m8n8k16_s8(c[2 * h], c[2 * h + 1], a[h + 2], b1);
    }
  } else {
#if defined(LORA_KERNELS_EMULATION)
    struct In {
      uint32_t a[4], b[2];
      int32_t c[4];
    } in{{a[0], a[1], a[2], a[3]}, {b0, b1}, {c[0], c[1], c[2], c[3]}};
    struct Out {
      int32_t c[4];
    };
    const Out out = emulation::meet<Out>(~0u, {"mma.m16n8k32.s8", file, line}, in, emulation::mma_m16n8k32_s8);
    for (int i = 0; i < 4; ++i) c[i] = out.c[i];
#else
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
  }
}

// fp32 rounded to tf32 (to nearest, halves away from zero), and what that leaves.
__device__ inline uint32_t round_to_tf32(float x) {
#if defined(LORA_KERNELS_EMULATION)
  const uint32_t bits = __float_as_uint(x);
  return (bits & 0x7F800000u) == 0x7F800000u ? bits : (bits + 0x1000u) & 0xFFFFE000u;
#else
  uint32_t r = 0;
  if constexpr (kArch >= 80) asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
  return r;
#endif
}

}  // namespace lora_kernels::cuda
