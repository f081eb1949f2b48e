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

inline I max_int(I a, I b) { return (I)_mm256_max_epi32((__m256i)a, (__m256i)b); }
inline int32_t reduce_max_int(I v) {
  __m128i a = _mm_max_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
  a = _mm_max_epi32(a, _mm_shuffle_epi32(a, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(a, _mm_shuffle_epi32(a, 0xb1)));
}

inline void store_activations(uint8_t* q, I a, I b, I c, I d) {
  // The packs work within 128-bit lanes: dwords a0 b0 c0 d0 a1 b1 c1 d1 are put in order afterwards.
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i packed =
      _mm256_packs_epi16(_mm256_packs_epi32((__m256i)a, (__m256i)b), _mm256_packs_epi32((__m256i)c, (__m256i)d));
  _mm256_storeu_si256((__m256i*)q, _mm256_permutevar8x32_epi32(packed, order));
}

inline void store_bytes(uint8_t* to, I v) {
  const __m256i low = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,  //
                                       0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m256i bytes = _mm256_shuffle_epi8((__m256i)v, low);
  _mm_storel_epi64((__m128i*)to, _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1)));
}

inline void store_pairs(uint8_t* to, int64_t stride, I a, I b) {
  // Of each 128-bit lane: the low bytes of a in its first dword, those of b in its second.
  const __m256i words = _mm256_packus_epi32((__m256i)(a & 255), (__m256i)(b & 255));
  const __m256i bytes = _mm256_packus_epi16(words, words);
  _mm_storel_epi64((__m128i*)to, _mm256_castsi256_si128(bytes));
  _mm_storel_epi64((__m128i*)(to + stride), _mm256_extracti128_si256(bytes, 1));
}
