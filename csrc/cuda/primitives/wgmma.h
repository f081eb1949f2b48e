// Products of a warpgroup (four warps that follow one another, 128 threads) on sm_90a: asynchronous, with both operands
// in shared memory and sums in registers. Layouts by the PTX ISA, sections on wgmma.mma_async.
//
//   fence_proxy      what this thread has written to shared memory (copies: that have landed) is seen by wgmma, which
//                    reads through another proxy, in all threads that meet this one at a barrier afterwards
//   wgmma_fence      registers are ready: before the first product of a group
//   wgmma            c [64, N] += a [64, 16] b [N, 16]t; or b [16, N], whose depth then lies across its rows
//   commit_products  ends a group of them
//   wait_products    all but the newest groups are done: only now are their sums there, and their operands free
//   tie              of sums in registers, behind their zeros and behind the last wait: what uses or sets them stays on
//                    this side of it. To the compiler a product is over where it is asked for.
//   leave_registers, take_registers  this warpgroup goes on with so many (a multiple of eight) for each thread: fewer
//                    than the launch gave it, or more, which others have to have left
//
// An operand is a tile of rows of 128 bytes of depth (64 elements), from a multiple of 1024 bytes on, whose chunks of
// 16 bytes are exchanged by bits 7 to 9 of their address (the 128-byte swizzle): Tile<T, rows, 64> of tile.h. With
// depth across its rows b is such tiles of 64 of depth by 64 columns, one behind the other.
#pragma once

#include <type_traits>

#include "cuda/primitives/shared.h"

namespace lora_kernels::cuda {

// Whether this code is compiled for a device that has them: the features of sm_90a are of no other architecture.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define LORA_KERNELS_WGMMA 1
constexpr bool kWgmma = true;
#elif defined(LORA_KERNELS_EMULATION)
constexpr bool kWgmma = kArch == 90;
#else
constexpr bool kWgmma = false;
#endif

// What a step of sixteen k (32 bytes of a row) adds to an operand.
constexpr uint64_t kWgmmaStep = 32 >> 4;
constexpr int kWgmmaAlignment = 1024;
// The same with depth across rows, where sixteen k are sixteen rows; and the bytes from 64 columns to the next.
constexpr uint64_t kWgmmaStepAcross = 16 * 128 >> 4;
constexpr uint64_t kWgmmaAcrossBytes = 64 * 128;

// The descriptor of a tile, or of rows of it from a multiple of eight on: address, 1024 bytes from eight rows to the
// next eight, swizzle of 128 bytes; each in units of sixteen bytes. (The leading offset, 1, has no meaning here.)
__device__ inline uint64_t wgmma_operand(const void* tile, uint64_t leading = 16) {
#if defined(LORA_KERNELS_EMULATION)
  const uint64_t at = emulation::shared_offset(tile);
#else
  const uint64_t at = shared_address(tile);
#endif
  return (at & 0x3FFFF) >> 4 | leading >> 4 << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

// Of b with depth across its rows: eight of depth are 1024 bytes, and the leading offset leads to 64 columns more.
__device__ inline uint64_t wgmma_operand_across(const void* tiles) { return wgmma_operand(tiles, kWgmmaAcrossBytes); }

__device__ inline void fence_proxy() {
#if defined(LORA_KERNELS_EMULATION)
  emulation::fence_proxy();
#elif defined(LORA_KERNELS_WGMMA)
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

__device__ inline void wgmma_fence() {
#if defined(LORA_KERNELS_EMULATION)
  emulation::fence_products();
#elif defined(LORA_KERNELS_WGMMA)
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

__device__ inline void commit_products() {
#if defined(LORA_KERNELS_EMULATION)
  emulation::commit_products();
#elif defined(LORA_KERNELS_WGMMA)
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

template <int kNewest>
__device__ inline void wait_products() {
#if defined(LORA_KERNELS_EMULATION)
  emulation::wait_products(kNewest);
#elif defined(LORA_KERNELS_WGMMA)
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kNewest) : "memory");
#endif
}

template <int kRegisters>
__device__ inline void leave_registers() {
#if defined(LORA_KERNELS_WGMMA)
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}
template <int kRegisters>
__device__ inline void take_registers() {
#if defined(LORA_KERNELS_WGMMA)
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

template <class T>
__device__ inline void tie(T& sums) {
#if defined(LORA_KERNELS_EMULATION)
  static_cast<void>(sums);
#else
  if constexpr (std::is_array_v<T>) {
#pragma unroll
    for (auto& part : sums) tie(part);
  } else if constexpr (std::is_same_v<T, float>) {
    asm volatile("" : "+f"(sums)::"memory");
  } else {
    asm volatile("" : "+r"(sums)::"memory");
  }
#endif
}

#if defined(LORA_KERNELS_EMULATION)
namespace detail {

// The 16 bytes so far behind the address of an operand, which may be read.
inline const void* operand_chunk(uint64_t operand, uint32_t offset) {
  const uint32_t start = static_cast<uint32_t>(operand & 0x3FFF) << 4;
  if (operand >> 46 != uint64_t{1} << 16) emulation::refuse("wgmma: the emulation knows the 128-byte swizzle alone");
  if (start >> 7 & 7) emulation::refuse("wgmma: the operand's rows do not begin at a multiple of 1024 bytes");
  uint32_t at = start + offset;
  at ^= (at >> 7 & 7) << 4;
  const void* chunk = emulation::shared_at(at);
  emulation::expect_visible(chunk);
  return chunk;
}

// Sixteen bytes of a row of an operand: the first or the second half of a step.
inline const void* row_chunk(uint64_t operand, int row, uint32_t half) {
  const uint32_t stride = static_cast<uint32_t>(operand >> 32 & 0x3FFF) << 4;
  if ((operand >> 16 & 0x3FFF) != 1) emulation::refuse("wgmma: a leading offset where depth lies along rows");
  return operand_chunk(operand,
                       static_cast<uint32_t>(row) / 8 * stride + static_cast<uint32_t>(row) % 8 * 128 + half * 16);
}

template <class T>
float operand_element(uint16_t bits) {
  if constexpr (std::is_same_v<T, __half>)
    return emulation::half_values()[bits];
  else
    return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}

// Sixteen elements of a row of an operand.
template <class T>
void read_operand(float (&out)[16], uint64_t operand, int row) {
  for (uint32_t half = 0; half < 2; ++half) {
    const void* chunk = row_chunk(operand, row, half);
    for (int i = 0; i < 4; ++i) emulation::expect_written(static_cast<const uint32_t*>(chunk) + i, "wgmma");
    uint16_t bits[8];
    memcpy(bits, chunk, sizeof bits);
    for (int i = 0; i < 8; ++i) out[half * 8 + static_cast<uint32_t>(i)] = operand_element<T>(bits[i]);
  }
}

// Sixteen elements of two columns, an even one and the next, of an operand with depth across its rows.
template <class T>
void read_operand_across(float (&out)[2][16], uint64_t operand, int column) {
  const uint32_t leading = static_cast<uint32_t>(operand >> 16 & 0x3FFF) << 4;
  const uint32_t stride = static_cast<uint32_t>(operand >> 32 & 0x3FFF) << 4;
  if (leading == 0 || leading % 1024 || stride == 0 || stride % 1024)
    emulation::refuse("wgmma: with depth across rows, offsets that are no multiples of 1024 bytes");
  const uint32_t begin = static_cast<uint32_t>(column) / 64 * leading, in_row = static_cast<uint32_t>(column) % 64 * 2;
  for (uint32_t k = 0; k < 16; ++k) {
    const void* chunk = operand_chunk(operand, begin + k / 8 * stride + k % 8 * 128 + in_row / 16 * 16);
    const void* word = static_cast<const char*>(chunk) + in_row % 16;
    emulation::expect_written(word, "wgmma");
    uint16_t bits[2];
    memcpy(bits, word, sizeof bits);
    for (int e = 0; e < 2; ++e) out[e][k] = operand_element<T>(bits[e]);
  }
}

// The part of one thread.
template <class T, int kColumns, bool kAcross>
void multiply_operands(void* registers, uint64_t a, uint64_t b) {
  auto& c = *static_cast<float (*)[kColumns / 8][4]>(registers);
  const int thread = static_cast<int>(threadIdx.x) % 128, g = thread % 32 / 4, t = thread % 4;
  float low[16], high[16], of_columns[2][16];
  read_operand<T>(low, a, thread / 32 * 16 + g);
  read_operand<T>(high, a, thread / 32 * 16 + g + 8);
  for (int j = 0; j < kColumns / 8; ++j) {
    const int column = j * 8 + t * 2;
    if constexpr (kAcross) read_operand_across<T>(of_columns, b, column);
    for (int e = 0; e < 2; ++e) {
      if constexpr (!kAcross) read_operand<T>(of_columns[e], b, column + e);
      for (int k = 0; k < 16; ++k) {
        c[j][e] += low[k] * of_columns[e][k];
        c[j][2 + e] += high[k] * of_columns[e][k];
      }
    }
  }
}

}  // namespace detail
#endif

#if defined(LORA_KERNELS_WGMMA)
#define LORA_KERNELS_4_SUMS(j) "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])
#define LORA_KERNELS_16_SUMS(j) \
  LORA_KERNELS_4_SUMS(j), LORA_KERNELS_4_SUMS(j + 1), LORA_KERNELS_4_SUMS(j + 2), LORA_KERNELS_4_SUMS(j + 3)
#define LORA_KERNELS_WGMMA_N128(types)                                                                               \
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." types                                                  \
               " "                                                                                                   \
               "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,"     \
               "%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,"        \
               "%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, "                                      \
               "%64, %65, 1, 1, 1, 0, %66;"                                                                          \
               : LORA_KERNELS_16_SUMS(0), LORA_KERNELS_16_SUMS(4), LORA_KERNELS_16_SUMS(8), LORA_KERNELS_16_SUMS(12) \
               : "l"(a), "l"(b), "n"(int{kAcross}))
#define LORA_KERNELS_WGMMA_N256(types)                                                                                \
  asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32." types                                                   \
               " "                                                                                                    \
               "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,"      \
               "%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,"         \
               "%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,"         \
               "%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,"         \
               "%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,"      \
               "%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127}, "                                  \
               "%128, %129, 1, 1, 1, 0, %130;"                                                                        \
               : LORA_KERNELS_16_SUMS(0), LORA_KERNELS_16_SUMS(4), LORA_KERNELS_16_SUMS(8), LORA_KERNELS_16_SUMS(12), \
                 LORA_KERNELS_16_SUMS(16), LORA_KERNELS_16_SUMS(20), LORA_KERNELS_16_SUMS(24),                        \
                 LORA_KERNELS_16_SUMS(28)                                                                             \
               : "l"(a), "l"(b), "n"(int{kAcross}))
#endif

// T: __half or __nv_bfloat16. Thread l of warp w has, as after mma.sync, the sums c[j] of rows 16 w + l / 4 (elements 0
// and 1) and 8 more (2 and 3), columns 8 j + 2 (l % 4) and the next. kAcross: the depth of b lies across its rows.
template <class T, int kColumns, bool kAcross = false>
__device__ inline void wgmma(float (&c)[kColumns / 8][4], uint64_t a, uint64_t b LORA_KERNELS_CALLER) {
  static_assert(kColumns == 128 || kColumns == 256, "widths that are used");
#if defined(LORA_KERNELS_EMULATION)
  const uint64_t operands[2] = {a, b};
  emulation::collective(~0u, {"wgmma", file, line}, operands, sizeof operands, emulation::same_operands, false);
  emulation::start_product(&c, a, b, detail::multiply_operands<T, kColumns, kAcross>);
#elif defined(LORA_KERNELS_WGMMA)
  if constexpr (std::is_same_v<T, __half> && kColumns == 128)
    LORA_KERNELS_WGMMA_N128("f16.f16");
  else if constexpr (std::is_same_v<T, __half>)
    LORA_KERNELS_WGMMA_N256("f16.f16");
  else if constexpr (kColumns == 128)
    LORA_KERNELS_WGMMA_N128("bf16.bf16");
  else
    LORA_KERNELS_WGMMA_N256("bf16.bf16");
#endif
}

}  // namespace lora_kernels::cuda
