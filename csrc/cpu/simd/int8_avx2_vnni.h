// The integer vocabulary (see simd/int8_generic.h) in AVX2 with AVX-VNNI, as CPUs without AVX-512 have it since 2021.

constexpr bool kUnsignedActivations = true;  // vpdpbusd takes u8 times s8
// 6 x 2 accumulators + 2 vectors of weights + 1 or 2 broadcasts = 15 or 16 of 16 registers. One row: 8 accumulators, so
// that a step reads its 256 bytes of weights in order.
constexpr int kInt8TileRows = 6, kInt8TileVectors = 2, kInt8RowVectors = 8;

typedef __m256i Weights;
inline Weights load_weights(const uint8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
// As an instruction on purpose: with intrinsics g++ 12 copies accumulators and spills them. {vex}: the encoding without
// AVX-512.
inline void int8_dot_into(I& c, I x, const Weights& w) {
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(c) : "x"(x), "x"(w));
}
inline void int8_dot_positive_into(I& c, I x, const Weights& w) { int8_dot_into(c, x, w); }

#include "cpu/simd/int8_avx2_moves.inl"

inline void nibble_dot_into(I& c, I x, I y, const Nibbles& w) {  // the nibbles are the unsigned ones here
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(c) : "x"(w.low), "x"(x));
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(c) : "x"(w.high), "x"(y));
}
