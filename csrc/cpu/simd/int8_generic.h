// The integer vocabulary without any instruction set: products of int8 activations and weights, four k per int32 lane.
// simd/int8_avx2.h and simd/int8_avx512.h define the same names; the sums are exact, hence equal in all of them.

constexpr bool kUnsignedActivations = false;  // activations are stored as q, or as q + 128 (see int8_packing.h)
// Rows and vectors of accumulators of a register tile, and vectors of the tile of a single row.
constexpr int kInt8TileRows = 2, kInt8TileVectors = 4, kInt8RowVectors = 4;

typedef int16_t Shorts __attribute__((vector_size(16)));
struct Weights {  // of each lane's four weights the first and third, and the second and fourth
  Shorts even, odd;
};
inline Weights load_weights(const uint8_t* p) {
  Shorts w;
  memcpy(&w, p, sizeof w);
  return {(Shorts)(w << 8) >> 8, w >> 8};
}
// c += sum of the four products of each lane. Two products of values in [-127, 127] fit an int16: 2 * 127 * 127 =
// 32258.
inline void int8_dot_into(I& c, I x, const Weights& w) {
  const Shorts values = (Shorts)x;
  const Shorts pairs = ((values << 8) >> 8) * w.even + (values >> 8) * w.odd;
  const I lanes = (I)pairs;
  c += ((lanes << 16) >> 16) + (lanes >> 16);
}

// The same for values of x in [0, 127], as which they are also stored where others have 128 added.
inline void int8_dot_positive_into(I& c, I x, const Weights& w) { int8_dot_into(c, x, w); }

// Of each lane eight values in [0, 15], the first four in the low halves of its bytes, and the sum of their products
// with eight in [-127, 127], four in x and four in y, which are never stored with 128 added.
struct Nibbles {
  Shorts bytes;
};
inline Nibbles load_nibbles(const uint8_t* p) {
  Nibbles w;
  memcpy(&w.bytes, p, sizeof w.bytes);
  return w;
}
inline void nibble_dot_into(I& c, I x, I y, const Nibbles& w) {
  const Shorts a = (Shorts)x, b = (Shorts)y, u = w.bytes;
  const Shorts pairs = ((a << 8) >> 8) * (u & 15) + (a >> 8) * ((u >> 8) & 15) + ((b << 8) >> 8) * ((u >> 4) & 15) +
                       (b >> 8) * ((u >> 12) & 15);  // at most 4 * 15 * 127 = 7620
  const I lanes = (I)pairs;
  c += ((lanes << 16) >> 16) + (lanes >> 16);
}

inline I max_int(I a, I b) {
  const I mask = a > b;
  return (a & mask) | (b & ~mask);
}
inline int32_t reduce_max_int(I v) {
  const int32_t a = v[0] > v[1] ? v[0] : v[1], b = v[2] > v[3] ? v[2] : v[3];
  return a > b ? a : b;
}

// 4 * kLanes int32 in [-127, 127] as bytes, in the order a, b, c, d.
inline void store_activations(uint8_t* q, I a, I b, I c, I d) {
  for (int i = 0; i < kLanes; ++i) {
    q[i] = static_cast<uint8_t>(a[i]);
    q[kLanes + i] = static_cast<uint8_t>(b[i]);
    q[2 * kLanes + i] = static_cast<uint8_t>(c[i]);
    q[3 * kLanes + i] = static_cast<uint8_t>(d[i]);
  }
}

// The low bytes of kLanes int32.
inline void store_bytes(uint8_t* to, I v) {
  for (int i = 0; i < kLanes; ++i) to[i] = static_cast<uint8_t>(v[i]);
}

// The low bytes of each four lanes of a and b: eight bytes to `to`, `to` + stride, ...
inline void store_pairs(uint8_t* to, int64_t stride, I a, I b) {
  (void)stride;  // of the next four lanes
  store_bytes(to, a);
  store_bytes(to + 4, b);
}
