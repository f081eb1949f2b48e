// INT8 products of a warpgroup on sm_90a, with the left operand in registers (wgmma.h: fences, groups and waits).
//
//   wgmma_s8  c [64, N] += a [64, 32] b [N, 32]t, signed bytes, sums int32; N 128, 160 or 256
//
// Layouts by the PTX ISA, wgmma.mma_async with .s8: warp w of the group holds rows 16 w ... of a as it would for
// mma.m16n8k32 (lane l, g = l / 4, t = l % 4: a[0] at (g, 4 t), a[1] at (g + 8, 4 t), a[2] at (g, 4 t + 16), a[3] at
// (g + 8, 4 t + 16), four bytes each), and the same rows of c, c[j] as after mma.sync at columns 8 j. b is a tile of
// rows of 128 bytes of depth in the 128-byte swizzle: wgmma_operand(), of which a step of 32 k is kWgmmaStep. Integers
// have neither signs nor transposed operands.
//
// The registers of `a` are read while the product is made: until its wait they may not change.
#pragma once

#include "cuda/primitives/wgmma.h"

namespace lora_kernels::cuda {

#if defined(LORA_KERNELS_EMULATION)
namespace detail {

// 32 bytes of a row of an operand.
inline void read_bytes(int8_t (&out)[32], uint64_t operand, int row) {
  bool written = false;
  for (uint32_t half = 0; half < 2; ++half) {
    const void* chunk = row_chunk(operand, row, half);
    memcpy(out + half * 16, chunk, 16);
    for (uint32_t i = half * 16; i < half * 16 + 16; ++i) written |= out[i] != -1;
  }
  if (!written) emulation::refuse("wgmma reads shared memory that nothing has written");
}

// The part of one thread; a: the registers of its four lanes of a row, one lane's after the other's.
template <int kColumns>
void multiply_bytes(void* registers, const uint32_t (&a)[16], uint64_t b) {
  auto& c = *static_cast<int32_t (*)[kColumns / 8][4]>(registers);
  int8_t rows[2][32], of_column[32];
  for (int word = 0; word < 16; ++word)
    for (int e = 0; e < 4; ++e)
      rows[word % 2][word / 4 * 4 + word % 4 / 2 * 16 + e] = static_cast<int8_t>(a[word] >> 8 * e);
  const int t = static_cast<int>(threadIdx.x) % 4;
  for (int j = 0; j < kColumns / 8; ++j)
    for (int e = 0; e < 2; ++e) {
      read_bytes(of_column, b, j * 8 + t * 2 + e);
      for (int h = 0; h < 2; ++h)
        for (int k = 0; k < 32; ++k) c[j][2 * h + e] += rows[h][k] * of_column[k];
    }
}

}  // namespace detail
#endif

#if defined(LORA_KERNELS_WGMMA)
#define LORA_KERNELS_4_INTEGERS(j) "+r"(c[j][0]), "+r"(c[j][1]), "+r"(c[j][2]), "+r"(c[j][3])
#define LORA_KERNELS_16_INTEGERS(j)                                                           \
  LORA_KERNELS_4_INTEGERS(j), LORA_KERNELS_4_INTEGERS(j + 1), LORA_KERNELS_4_INTEGERS(j + 2), \
      LORA_KERNELS_4_INTEGERS(j + 3)
#define LORA_KERNELS_64_INTEGERS(j)                                                              \
  LORA_KERNELS_16_INTEGERS(j), LORA_KERNELS_16_INTEGERS(j + 4), LORA_KERNELS_16_INTEGERS(j + 8), \
      LORA_KERNELS_16_INTEGERS(j + 12)
#endif

template <int kColumns>
__device__ inline void wgmma_s8(int32_t (&c)[kColumns / 8][4], const uint32_t (&a)[4], uint64_t b LORA_KERNELS_CALLER) {
  static_assert(kColumns == 128 || kColumns == 160 || kColumns == 256, "widths that are used");
#if defined(LORA_KERNELS_EMULATION)
  emulation::start_product(&c, a, b, detail::multiply_bytes<kColumns>, {"wgmma", file, line});
#elif defined(LORA_KERNELS_WGMMA)
  if constexpr (kColumns == 128)
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,"
        "%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,"
        "%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, {%64,%65,%66,%67}, %68, 1;"
        : LORA_KERNELS_64_INTEGERS(0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  else if constexpr (kColumns == 160)
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n160k32.s32.s8.s8 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,"
        "%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,"
        "%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,%64,%65,%66,%67,%68,"
        "%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79}, {%80,%81,%82,%83}, %84, 1;"
        : LORA_KERNELS_64_INTEGERS(0), LORA_KERNELS_16_INTEGERS(16)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  else
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n256k32.s32.s8.s8 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,"
        "%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,"
        "%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,"
        "%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,"
        "%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,"
        "%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127}, {%128,%129,%130,%131}, %132, 1;"
        : LORA_KERNELS_64_INTEGERS(0), LORA_KERNELS_64_INTEGERS(16)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
#endif
}
#if defined(LORA_KERNELS_WGMMA)
#undef LORA_KERNELS_4_INTEGERS
#undef LORA_KERNELS_16_INTEGERS
#undef LORA_KERNELS_64_INTEGERS
#endif

}  // namespace lora_kernels::cuda
