// The vector vocabulary (see simd/generic.h) in AVX2, FMA and F16C: 8 lanes, 16 registers.

constexpr int kLanes = 8;
typedef __m256 F;
typedef int32_t I __attribute__((vector_size(32)));

// 6 x 2 accumulators + 2 panel vectors + 1 broadcast = 15 of 16 registers; 12 chains cover 2 multiply-adds per cycle of
// latency 4 or 5.
constexpr int kTileRows = 6, kTileVectors = 2;
constexpr int kNarrowTileRows = 10;
constexpr bool kHasBf16Dot = false;   // bf16_dot_into(), store_for_dot()
constexpr bool kHasBf16Pairs = true;  // load_even(), load_odd()
constexpr bool kHasTables = false;    // lookup() is not as cheap as arithmetic

inline F set(float v) { return _mm256_set1_ps(v); }
inline F zero() { return _mm256_setzero_ps(); }
inline I set_int(int32_t v) { return (I)_mm256_set1_epi32(v); }
inline I bits_of(F v) { return (I)v; }
inline F from_bits(I v) { return (F)v; }
inline F select(I mask, F a, F b) { return _mm256_blendv_ps(b, a, (F)mask); }

inline F max(F a, F b) { return _mm256_max_ps(a, b); }
inline F min(F a, F b) { return _mm256_min_ps(a, b); }
inline F abs(F a) { return _mm256_and_ps(a, (F)_mm256_set1_epi32(0x7fffffff)); }
// As an instruction on purpose: with intrinsics g++ 12 copies accumulators and spills them.
inline void fma_into(F& c, F a, F b) { asm("vfmadd231ps %2, %1, %0" : "+x"(c) : "x"(a), "x"(b)); }

inline I to_int(F v) { return (I)_mm256_cvtps_epi32(v); }
inline F to_float(I v) { return _mm256_cvtepi32_ps((__m256i)v); }
// table[index & 31] of each lane
inline F lookup(const float* table, I index) { return _mm256_i32gather_ps(table, (__m256i)(index & 31), 4); }

inline float reduce_add(F v) {
  __m128 a = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  a = _mm_add_ps(a, _mm_movehl_ps(a, a));
  return _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)));
}
inline float reduce_max(F v) {
  __m128 a = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  a = _mm_max_ps(a, _mm_movehl_ps(a, a));
  return _mm_cvtss_f32(_mm_max_ss(a, _mm_movehdup_ps(a)));
}

inline void reduce_add4(F a, F b, F c, F d, float* out) {
  const F s = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
}

inline F load(const float* p) { return _mm256_loadu_ps(p); }
inline F from_bf16_bits(__m128i v) { return (F)_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16); }
inline __m128i to_bf16_bits(F v) {
  const I u = bits_of(v);
  I r = u + 0x7fff + ((I)_mm256_srli_epi32((__m256i)u, 16) & 1);
  r = (I)_mm256_srli_epi32((__m256i)r, 16);
  r = (I)_mm256_blendv_epi8((__m256i)r, _mm256_set1_epi32(0x7fc0), (__m256i)(v != v));
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)r, (__m256i)r), 0x08));
}
inline F load(const bf16* p) { return from_bf16_bits(_mm_loadu_si128((const __m128i*)p)); }
inline F load(const fp16* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
// The even or odd ones of 2 * kLanes elements: one operation each.
inline F load_even(const bf16* p) { return (F)_mm256_slli_epi32(_mm256_loadu_si256((const __m256i*)p), 16); }
inline F load_odd(const bf16* p) {
  return (F)_mm256_and_si256(_mm256_loadu_si256((const __m256i*)p), _mm256_set1_epi32(static_cast<int>(0xffff0000u)));
}
inline F load(const int8_t* p) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))); }
inline void store(float* p, F v) { _mm256_storeu_ps(p, v); }
inline void store(bf16* p, F v) { _mm_storeu_si128((__m128i*)p, to_bf16_bits(v)); }
inline void store(fp16* p, F v) { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }

// Tails go through a small buffer: never a byte beyond the end is touched.
template <class T>
inline F load_n(const T* p, int n) {
  if (n < 0 || n > kLanes) __builtin_unreachable();
  T buffer[kLanes] = {};
  memcpy(buffer, p, n * sizeof(T));
  return load(buffer);
}
template <class T>
inline void store_n(T* p, F v, int n) {
  if (n < 0 || n > kLanes) __builtin_unreachable();
  T buffer[kLanes];
  store(buffer, v);
  memcpy(p, buffer, n * sizeof(T));
}
inline void store_int(int32_t* p, I v) { _mm256_storeu_si256((__m256i*)p, (__m256i)v); }
inline I load_int(const int32_t* p) { return (I)_mm256_loadu_si256((const __m256i*)p); }
inline void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }

inline void transpose_block(const float* p, int64_t stride, float* out, int64_t out_stride) {
  __m256 r[8], t[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(p + i * stride);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(out + i * out_stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
    _mm256_storeu_ps(out + (i + 4) * out_stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
  }
}
