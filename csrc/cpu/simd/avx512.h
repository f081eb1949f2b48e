// The vector vocabulary (see simd/generic.h) in AVX-512 F, BW, DQ, VL: 16 lanes, 32 registers.

constexpr int kLanes = 16;
typedef __m512 F;
typedef int32_t I __attribute__((vector_size(64)));

// 6 x 4 accumulators + 4 panel vectors + 1 or 2 broadcasts = 29 or 30 of 32 registers; a row of a panel is 4 cache
// lines.
constexpr int kTileRows = 6, kTileVectors = 4;
constexpr int kNarrowTileRows = 12;
constexpr bool kHasBf16Dot = true;    // bf16_dot_into(), store_for_dot()
constexpr bool kHasBf16Pairs = true;  // load_even(), load_odd()
constexpr bool kHasTables = true;     // lookup() is as cheap as arithmetic

inline F set(float v) { return _mm512_set1_ps(v); }
inline F zero() { return _mm512_setzero_ps(); }
inline I set_int(int32_t v) { return (I)_mm512_set1_epi32(v); }
inline I bits_of(F v) { return (I)v; }
inline F from_bits(I v) { return (F)v; }
inline F select(I mask, F a, F b) { return _mm512_mask_mov_ps(b, _mm512_movepi32_mask((__m512i)mask), a); }

inline F max(F a, F b) { return _mm512_max_ps(a, b); }
inline F min(F a, F b) { return _mm512_min_ps(a, b); }
inline F abs(F a) { return _mm512_abs_ps(a); }
// As instructions on purpose: with intrinsics g++ 12 folds the broadcasts into every multiply-add, copies accumulators
// and spills them.
inline void fma_into(F& c, F a, F b) { asm("vfmadd231ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b)); }
// c += the two bf16 products of each lane; the CPU must have AVX512-BF16.
inline void bf16_dot_into(F& c, F a, F b) { asm("vdpbf16ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b)); }

// Rounds as store() does, in one operation, but subnormals to zero; the CPU must have AVX512-BF16.
inline void store_for_dot(bf16* p, F v) {
  __m256i bits;
  asm("vcvtneps2bf16 %1, %0" : "=v"(bits) : "v"(v));
  _mm256_storeu_si256((__m256i*)p, bits);
}

inline I to_int(F v) { return (I)_mm512_cvtps_epi32(v); }
inline F to_float(I v) { return _mm512_cvtepi32_ps((__m512i)v); }
// table[index & 31] of each lane
inline F lookup(const float* table, I index) {
  return _mm512_permutex2var_ps(_mm512_load_ps(table), (__m512i)index, _mm512_load_ps(table + 16));
}
inline float reduce_add(F v) { return _mm512_reduce_add_ps(v); }
inline float reduce_max(F v) { return _mm512_reduce_max_ps(v); }

inline void reduce_add4(F a, F b, F c, F d, float* out) {
  const F ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const F cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const F s = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(s), _mm512_extractf32x8_ps(s, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}

inline __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
inline F from_bf16_bits(__m256i v) { return (F)_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16); }
inline __m256i to_bf16_bits(F v) {
  const __m512i u = (__m512i)v;
  __m512i r = _mm512_add_epi32(u, _mm512_set1_epi32(0x7fff));
  r = _mm512_add_epi32(r, _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1)));
  r = _mm512_srli_epi32(r, 16);
  r = _mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
  return _mm512_cvtepi32_epi16(r);
}

inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline F load(const bf16* p) { return from_bf16_bits(_mm256_loadu_si256((const __m256i*)p)); }
inline F load(const fp16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
// The even or odd ones of 2 * kLanes elements: one operation each.
inline F load_even(const bf16* p) { return (F)_mm512_slli_epi32(_mm512_loadu_si512(p), 16); }
inline F load_odd(const bf16* p) {
  return (F)_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
}
inline F load(const int8_t* p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p))); }
inline F load_n(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
inline F load_n(const bf16* p, int n) { return from_bf16_bits(_mm256_maskz_loadu_epi16(first(n), p)); }
inline F load_n(const fp16* p, int n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p)); }
inline F load_n(const int8_t* p, int n) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first(n), p)));
}
inline void store(float* p, F v) { _mm512_storeu_ps(p, v); }
inline void store(bf16* p, F v) { _mm256_storeu_si256((__m256i*)p, to_bf16_bits(v)); }
inline void store(fp16* p, F v) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }
inline void store_n(float* p, F v, int n) { _mm512_mask_storeu_ps(p, first(n), v); }
inline void store_n(bf16* p, F v, int n) { _mm256_mask_storeu_epi16(p, first(n), to_bf16_bits(v)); }
inline void store_n(fp16* p, F v, int n) {
  _mm256_mask_storeu_epi16(p, first(n), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
inline void store_int(int32_t* p, I v) { _mm512_storeu_si512(p, (__m512i)v); }
inline I load_int(const int32_t* p) { return (I)_mm512_loadu_si512(p); }
inline void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }

inline void transpose_block(const float* p, int64_t stride, float* out, int64_t out_stride) {
  __m512 r[16], t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(p + i * stride);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512 a = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88), b = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
    const __m512 c = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88),
                 d = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
    _mm512_storeu_ps(out + i * out_stride, _mm512_shuffle_f32x4(a, c, 0x88));
    _mm512_storeu_ps(out + (i + 4) * out_stride, _mm512_shuffle_f32x4(b, d, 0x88));
    _mm512_storeu_ps(out + (i + 8) * out_stride, _mm512_shuffle_f32x4(a, c, 0xdd));
    _mm512_storeu_ps(out + (i + 12) * out_stride, _mm512_shuffle_f32x4(b, d, 0xdd));
  }
}
