// The integer vocabulary (see simd/int8_generic.h) in AVX-512 with VNNI.

constexpr bool kUnsignedActivations = true;  // vpdpbusd takes u8 times s8
// 6 x 4 accumulators + 4 vectors of weights + 1 or 2 broadcasts = 29 or 30 of 32 registers
constexpr int kInt8TileRows = 6, kInt8TileVectors = 4, kInt8RowVectors = 4;

typedef __m512i Weights;
inline Weights load_weights(const uint8_t* p) { return _mm512_loadu_si512(p); }
// As an instruction on purpose: with intrinsics g++ 12 copies accumulators and spills them.
inline void int8_dot_into(I& c, I x, const Weights& w) { asm("vpdpbusd %2, %1, %0" : "+v"(c) : "v"(x), "v"(w)); }

inline void int8_dot_positive_into(I& c, I x, const Weights& w) { int8_dot_into(c, x, w); }

struct Nibbles {
  __m512i low, high;
};
inline Nibbles load_nibbles(const uint8_t* p) {
  const __m512i w = _mm512_loadu_si512(p), low = _mm512_set1_epi8(15);
  return {_mm512_and_si512(w, low), _mm512_and_si512(_mm512_srli_epi16(w, 4), low)};
}
inline void nibble_dot_into(I& c, I x, I y, const Nibbles& w) {  // the nibbles are the unsigned ones here
  asm("vpdpbusd %2, %1, %0" : "+v"(c) : "v"(w.low), "v"(x));
  asm("vpdpbusd %2, %1, %0" : "+v"(c) : "v"(w.high), "v"(y));
}

inline I max_int(I a, I b) { return (I)_mm512_max_epi32((__m512i)a, (__m512i)b); }
inline int32_t reduce_max_int(I v) { return _mm512_reduce_max_epi32((__m512i)v); }

inline void store_activations(uint8_t* q, I a, I b, I c, I d) {
  // The packs work within 128-bit lanes: dwords a0 b0 c0 d0, a1 b1 ... are put in order afterwards.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i packed =
      _mm512_packs_epi16(_mm512_packs_epi32((__m512i)a, (__m512i)b), _mm512_packs_epi32((__m512i)c, (__m512i)d));
  const __m512i bytes = _mm512_permutexvar_epi32(order, packed);
  _mm512_storeu_si512(q, _mm512_xor_si512(bytes, _mm512_set1_epi8(static_cast<char>(0x80))));
}

inline void store_bytes(uint8_t* to, I v) { _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8((__m512i)v)); }

inline void store_pairs(uint8_t* to, int64_t stride, I a, I b) {
  // Of each 128-bit lane the low bytes of a and of b in its first eight, then those of all lanes together: half as many
  // operations on the port of shuffles as two narrowings and two interleavings.
  const __m512i bytes = (__m512i)((a & 255) | (b << 8));
  const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 0, 4, 8, 12, 1, 5, 9, 13));
  const __m512i pairs =
      _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 0, 2, 4, 6), _mm512_shuffle_epi8(bytes, order));
  const __m128i first = _mm512_castsi512_si128(pairs), second = _mm512_extracti32x4_epi32(pairs, 1);
  _mm_storel_epi64((__m128i*)to, first);
  _mm_storeh_pi((__m64*)(to + stride), (__m128)first);
  _mm_storel_epi64((__m128i*)(to + 2 * stride), second);
  _mm_storeh_pi((__m64*)(to + 3 * stride), (__m128)second);
}
