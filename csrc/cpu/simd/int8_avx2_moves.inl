// What the two integer vocabularies on 256 bits share: everything but the products.

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
  const __m256i bytes = _mm256_permutevar8x32_epi32(packed, order);
  const __m256i offset = _mm256_set1_epi8(static_cast<char>(kUnsignedActivations ? 0x80 : 0));
  _mm256_storeu_si256((__m256i*)q, _mm256_xor_si256(bytes, offset));
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

struct Nibbles {
  __m256i low, high;
};
inline Nibbles load_nibbles(const uint8_t* p) {
  const __m256i w = _mm256_loadu_si256((const __m256i*)p), low = _mm256_set1_epi8(15);
  return {_mm256_and_si256(w, low), _mm256_and_si256(_mm256_srli_epi16(w, 4), low)};
}
