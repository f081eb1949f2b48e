// The integer vocabulary (see simd/int8_generic.h) in AVX2.

constexpr bool kUnsignedActivations = false;
// 4 x 2 accumulators + 2 vectors of weights and their magnitudes + broadcast, ones and a product = 15 of 16 registers.
// One row: 8 accumulators, so that a step reads its 256 bytes of weights in order.
constexpr int kInt8TileRows = 4, kInt8TileVectors = 2, kInt8RowVectors = 8;

struct Weights {
  __m256i magnitude, value;
};
inline Weights load_weights(const uint8_t* p) {
  const __m256i w = _mm256_loadu_si256((const __m256i*)p);
  return {_mm256_abs_epi8(w), w};
}
// |w| * (x with w's sign) = w * x. Both are in [-127, 127], so the sum of two products, at most 2 * 127 * 127 = 32258,
// fits the int16 that vpmaddubsw saturates to: exact.
inline void int8_dot_into(I& c, I x, const Weights& w) {
  const __m256i pairs = _mm256_maddubs_epi16(w.magnitude, _mm256_sign_epi8((__m256i)x, w.value));
  c = (I)_mm256_add_epi32((__m256i)c, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

inline void int8_dot_positive_into(I& c, I x, const Weights& w) {  // 2 * 127 * 127 fits here, too
  const __m256i pairs = _mm256_maddubs_epi16((__m256i)x, w.value);
  c = (I)_mm256_add_epi32((__m256i)c, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

#include "cpu/simd/int8_avx2_moves.inl"

inline void nibble_dot_into(I& c, I x, I y, const Nibbles& w) {  // 4 * 15 * 127 fits an int16
  const __m256i pairs =
      _mm256_add_epi16(_mm256_maddubs_epi16(w.low, (__m256i)x), _mm256_maddubs_epi16(w.high, (__m256i)y));
  c = (I)_mm256_add_epi32((__m256i)c, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
