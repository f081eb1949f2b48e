// The vector vocabulary without any instruction set: GCC/Clang vector types of 4 lanes, conversions in integers.
// Included once per translation unit, inside its anonymous namespace; simd/avx2.h and simd/avx512.h define the same
// names, and the algorithms (*.inl) are written in them alone.

constexpr int kLanes = 4;
typedef float F __attribute__((vector_size(16)));    // kLanes fp32 lanes
typedef int32_t I __attribute__((vector_size(16)));  // kLanes int32 lanes

// Register tiles: rows x vectors of accumulators that the register file holds beside operands.
constexpr int kTileRows = 4, kTileVectors = 2;
// The same for panels of one vector, where more rows are needed to hide the latency of a multiply-add.
constexpr int kNarrowTileRows = 6;
constexpr bool kHasBf16Dot = false;    // bf16_dot_into(), store_for_dot()
constexpr bool kHasBf16Pairs = false;  // load_even(), load_odd()
constexpr bool kHasTables = false;     // lookup() is not as cheap as arithmetic

inline F set(float v) { return F{v, v, v, v}; }
inline F zero() { return F{}; }
inline I set_int(int32_t v) { return I{v, v, v, v}; }
inline I bits_of(F v) { return (I)v; }
inline F from_bits(I v) { return (F)v; }
inline F select(I mask, F a, F b) { return (F)((mask & (I)a) | (~mask & (I)b)); }  // mask lanes: all ones or zero

inline F max(F a, F b) { return select(a > b, a, b); }
inline F min(F a, F b) { return select(a < b, a, b); }
inline F abs(F a) { return (F)((I)a & 0x7fffffff); }
inline void fma_into(F& c, F a, F b) { c += a * b; }

// Round to nearest even, |v| < 2^22; others keep their sign and stay large.
inline I to_int(F v) {
  I r;
  for (int i = 0; i < kLanes; ++i) r[i] = static_cast<int32_t>(__builtin_lrintf(v[i]));
  return r;
}
inline F to_float(I v) { return __builtin_convertvector(v, F); }
// table[index & 31] of each lane
inline F lookup(const float* table, I index) {
  return F{table[index[0] & 31], table[index[1] & 31], table[index[2] & 31], table[index[3] & 31]};
}

inline float reduce_add(F v) { return (v[0] + v[2]) + (v[1] + v[3]); }
inline float reduce_max(F v) {
  const float a = v[0] > v[1] ? v[0] : v[1], b = v[2] > v[3] ? v[2] : v[3];
  return a > b ? a : b;
}

// The sums of the lanes of a, b, c and d to out[0 ... 3].
inline void reduce_add4(F a, F b, F c, F d, float* out) {
  out[0] = reduce_add(a), out[1] = reduce_add(b), out[2] = reduce_add(c), out[3] = reduce_add(d);
}

inline float float_of(float v) { return v; }
inline float float_of(int8_t v) { return static_cast<float>(v); }
inline float float_of(bf16 v) {
  const uint32_t u = static_cast<uint32_t>(v.bits) << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
inline float float_of(fp16 v) {
  const uint32_t sign = (v.bits & 0x8000u) << 16, rest = v.bits & 0x7fffu;
  uint32_t u;
  float f;
  if (rest >= 0x7c00u) {  // infinity, NaN
    u = sign | 0x7f800000u | (rest & 0x3ffu) << 13;
  } else if (rest >= 0x400u) {
    u = sign | ((rest << 13) + (112u << 23));
  } else {  // zero, subnormal: rest * 2^-24
    f = static_cast<float>(rest) * 5.9604644775390625e-8f;
    memcpy(&u, &f, 4);
    u |= sign;
  }
  memcpy(&f, &u, 4);
  return f;
}
inline void assign(float& to, float v) { to = v; }
inline void assign(bf16& to, float v) {
  uint32_t u;
  memcpy(&u, &v, 4);
  to.bits = v != v ? 0x7fc0 : static_cast<uint16_t>((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}
inline void assign(fp16& to, float v) {
  uint32_t u;
  memcpy(&u, &v, 4);
  const uint16_t sign = static_cast<uint16_t>(u >> 16 & 0x8000u);
  u &= 0x7fffffffu;
  uint32_t h;
  if (u > 0x7f800000u) {
    h = 0x7e00u;
  } else if (u >= 0x47800000u) {  // 65536 and more
    h = 0x7c00u;
  } else if (u < 0x38800000u) {  // below 2^-14: an integer number of 2^-24, rounded half to even
    float a;
    memcpy(&a, &u, 4);
    h = static_cast<uint32_t>(__builtin_lrintf(a * 16777216.0f));
  } else {
    h = (u - (112u << 23) + 0xfffu + (u >> 13 & 1u)) >> 13;  // may round up to infinity
  }
  to.bits = static_cast<uint16_t>(sign | h);
}

template <class T>
inline F load_n(const T* p, int n) {  // lanes beyond n are zero
  F v = {};
  for (int i = 0; i < n; ++i) v[i] = float_of(p[i]);
  return v;
}
template <class T>
inline F load(const T* p) {
  return load_n(p, kLanes);
}
template <class T>
inline void store_n(T* p, F v, int n) {
  for (int i = 0; i < n; ++i) assign(p[i], v[i]);
}
template <class T>
inline void store(T* p, F v) {
  store_n(p, v, kLanes);
}
inline void store_int(int32_t* p, I v) { memcpy(p, &v, sizeof v); }
inline I load_int(const int32_t* p) {
  I v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline void prefetch(const void* p) { __builtin_prefetch(p); }

// Transposes kLanes x kLanes fp32: rows at p + i * stride, column j to out + j * out_stride.
inline void transpose_block(const float* p, int64_t stride, float* out, int64_t out_stride) {
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < kLanes; ++j) out[j * out_stride + i] = p[i * stride + j];
}
