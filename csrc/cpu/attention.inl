// The pieces of an attention step in the vocabulary of simd/*.h: scores, softmax, weighted sums of values, appending.
// K and V are read as they lie in memory and converted in registers. A query's sums are formed by the same operations
// in the same order whatever other queries are computed beside it.

// A function of its own: g++ unrolls loops over registers only to a depth of 8, and inlined into a task's loops the
// sums would live on the stack.
#define LORA_KERNELS_APART __attribute__((noinline))

constexpr int kQueries = kTileRows;
// Queries whose sums over four positions fit in the register file beside K: 24 + 4 + 1 of 32, 8 + 4 + 1 of 16.
constexpr int kScoreQueries = kLanes == 16 ? 6 : 2;
constexpr int64_t kAheadBytes = 2048;
constexpr int64_t kValueBlockBytes = 16384;  // of V, in the first cache while the panels of columns pass over it

// The vectors of one head at the positions of one row of q: consecutive, or gathered through a table of cache rows.
template <class T>
struct Positions {
  const T* base;
  int64_t head_size;
  const int32_t* slots;  // null: consecutive
  int64_t slot_stride;
  const T* at(int64_t p) const { return base + p * head_size + (slots ? slots[p] * slot_stride : 0); }
};

template <class T>
inline void prefetch_row(const T* row, int64_t head_size) {
  const char* p = reinterpret_cast<const char*>(row);
  for (int64_t i = 0; i < head_size * static_cast<int64_t>(sizeof(T)); i += 64) prefetch(p + i);
}

template <class T>
inline int64_t rows_ahead(int64_t head_size) {
  const int64_t rows = kAheadBytes / (head_size * static_cast<int64_t>(sizeof(T)));
  return rows < 4 ? 4 : rows;
}

// scores[i * stride + j] = q[i] . k[j] for NQ queries and four positions. q has its rest up to kLanes zero.
template <int NQ, class T>
inline void score_tile(const T* const k[4], int64_t head_size, const float* q, int64_t q_stride, float* scores,
                       int64_t stride) {
  F sum[NQ][4];
#pragma GCC unroll 8
  for (int i = 0; i < NQ; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sum[i][j] = zero();
  int64_t d = 0;
  for (; d + kLanes <= head_size; d += kLanes) {
    F b[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) b[j] = load(k[j] + d);
#pragma GCC unroll 8
    for (int i = 0; i < NQ; ++i) {
      const F a = load(q + i * q_stride + d);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) fma_into(sum[i][j], a, b[j]);
    }
  }
  if (const int rest = static_cast<int>(head_size - d)) {
    F b[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) b[j] = load_n(k[j] + d, rest);
#pragma GCC unroll 8
    for (int i = 0; i < NQ; ++i) {
      const F a = load(q + i * q_stride + d);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) fma_into(sum[i][j], a, b[j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < NQ; ++i) reduce_add4(sum[i][0], sum[i][1], sum[i][2], sum[i][3], scores + i * stride);
}

// All scores of NQ queries over positions [0, count). Up to three more per query are written beyond.
template <int NQ, class T>
LORA_KERNELS_APART void score_positions(const Positions<T>& keys, int64_t count, const float* q, int64_t q_stride,
                                        float* scores, int64_t stride) {
  const int64_t head_size = keys.head_size, ahead = rows_ahead<T>(head_size), last = count - 1;
  for (int64_t p = 0; p < count; p += 4) {
    const T* k[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      k[j] = keys.at(p + j < last ? p + j : last);
      if (p + j + ahead <= last) prefetch_row(keys.at(p + j + ahead), head_size);
    }
    constexpr int kStep = NQ < kScoreQueries ? NQ : kScoreQueries;
    int i = 0;
    for (; i + kStep <= NQ; i += kStep)
      score_tile<kStep>(k, head_size, q + i * q_stride, q_stride, scores + i * stride + p, stride);
    if constexpr (NQ % kStep != 0)
      score_tile<NQ % kStep>(k, head_size, q + i * q_stride, q_stride, scores + i * stride + p, stride);
  }
}

inline void scale_by(float* x, const float* factors, int64_t count) {
  int64_t p = 0;
  for (; p + kLanes <= count; p += kLanes) store(x + p, load(x + p) * load(factors + p));
  if (const int rest = static_cast<int>(count - p))
    store_n(x + p, load_n(x + p, rest) * load_n(factors + p, rest), rest);
}

// scores[0 ... count) become exp(score - largest); returns their sum. The rest of the last vector is overwritten. Calls
// meanwhile(p) for every vector, to have memory work while nothing here needs it.
template <class Meanwhile>
LORA_KERNELS_APART float exponentials(float* scores, int64_t count, const Meanwhile& meanwhile) {
  const float infinity = __builtin_inff();
  for (int64_t p = count; p < round_up(count, kLanes); ++p) scores[p] = -infinity;
  F top = set(-infinity);
  for (int64_t p = 0; p < count; p += kLanes) top = max(load(scores + p), top);  // in this order a NaN is passed over
  const F largest = set(reduce_max(top));
  F sum = zero();
  for (int64_t p = 0; p < count; p += kLanes) {
    const F e = exp(load(scores + p) - largest);
    sum = sum + e;
    store(scores + p, e);
    meanwhile(p);
  }
  return reduce_add(sum);
}

// acc[i, d] += sum over positions [begin, end) of weights[i * stride + p] * V[p, d], for NQ queries and columns d ...
// of NV vectors, of which the last has `rest` columns when kPartial.
template <int NQ, int NV, bool kPartial, class T>
LORA_KERNELS_APART void add_panel(const Positions<T>& values, int64_t begin, int64_t end, int64_t last, int64_t d,
                                  int rest, const float* weights, int64_t stride, float* acc, int64_t acc_stride) {
  const int64_t head_size = values.head_size, ahead = rows_ahead<T>(head_size);
  F sum[NQ][NV];
#pragma GCC unroll 8
  for (int i = 0; i < NQ; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) sum[i][j] = load(acc + i * acc_stride + d + j * kLanes);
  for (int64_t p = begin; p < end; ++p) {
    const T* v = values.at(p) + d;
    if (d == 0 && p + ahead < last) prefetch_row(values.at(p + ahead), head_size);
    F b[NV];
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) b[j] = kPartial && j == NV - 1 ? load_n(v + j * kLanes, rest) : load(v + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < NQ; ++i) {
      const F a = set(weights[i * stride + p]);
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) fma_into(sum[i][j], a, b[j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < NQ; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) store(acc + i * acc_stride + d + j * kLanes, sum[i][j]);
}

// acc[i] += sum over positions [begin, end) of weights[i, p] * V[p], all columns.
template <int NQ, class T>
inline void add_values(const Positions<T>& values, int64_t begin, int64_t end, const float* weights, int64_t stride,
                       float* acc, int64_t acc_stride) {
  // The widest panel that leaves room for V and a broadcast; one query takes 8 vectors for enough sums in flight.
  constexpr int NV = NQ == 1 ? 8 : NQ == 2 ? 4 : kTileVectors;
  const int64_t head_size = values.head_size;
  int64_t block = kValueBlockBytes / (head_size * static_cast<int64_t>(sizeof(T)));
  if (block < 16) block = 16;
  if (head_size <= NV * kLanes && (head_size / kLanes & (head_size / kLanes - 1)) == 0 && head_size % kLanes == 0)
    block = end - begin;  // a single panel
  for (int64_t p = begin; p < end; p += block) {
    const int64_t stop = p + block < end ? p + block : end;
    int64_t d = 0;
    const auto panels = [&](auto tag) {
      constexpr int kWidth = decltype(tag)::value;
      if constexpr (kWidth <= NV)
        for (; d + kWidth * kLanes <= head_size; d += kWidth * kLanes)
          add_panel<NQ, kWidth, false>(values, p, stop, end, d, 0, weights, stride, acc, acc_stride);
    };
    panels(std::integral_constant<int, 8>());
    panels(std::integral_constant<int, 4>());
    panels(std::integral_constant<int, 2>());
    panels(std::integral_constant<int, 1>());
    if (d < head_size)
      add_panel<NQ, 1, true>(values, p, stop, end, d, static_cast<int>(head_size - d), weights, stride, acc,
                             acc_stride);
  }
}

// ---------- Appending

// One vector of new K or V to the cache, and its scale if the cache is int8: q = clamp(rint(x * (127 / amax))), scale =
// amax / 127. A zero vector, or one so small that 127 / amax overflows, gives 0 and scale 0; one that is not finite
// gives 0 and scale NaN, so that whoever attends to it sees NaN.
template <class X, class T>
inline void append_vector(const X* x, int64_t head_size, T* to, float* scale) {
  if constexpr (std::is_same_v<T, int8_t>) {
    const auto vectors = [&](const auto& body) {
      int64_t d = 0;
      for (; d + kLanes <= head_size; d += kLanes) body(d, load(x + d), kLanes);
      if (d < head_size) body(d, load_n(x + d, static_cast<int>(head_size - d)), static_cast<int>(head_size - d));
    };
    F top = zero(), poison = zero();
    vectors([&](int64_t, F v, int) {
      top = max(abs(v), top);
      poison = poison + (v - v);  // NaN for an infinity or NaN
    });
    const float amax = reduce_max(top), inverse = 127.0f / amax, finite = reduce_add(poison);
    const bool usable = finite == 0 && inverse <= 3.4028235e38f;
    *scale = finite != 0 ? __builtin_nanf("") : usable ? amax / 127.0f : 0.0f;
    vectors([&](int64_t d, F v, int n) {
      alignas(64) int32_t rounded[kLanes];
      const F scaled = usable ? min(max(v * set(inverse), set(-127.0f)), set(127.0f)) : zero();
      store_int(rounded, to_int(scaled));
      for (int i = 0; i < n; ++i) to[d + i] = static_cast<int8_t>(rounded[i]);
    });
  } else {
    int64_t d = 0;
    for (; d + kLanes <= head_size; d += kLanes) store(to + d, load(x + d));
    if (const int rest = static_cast<int>(head_size - d)) store_n(to + d, load_n(x + d, rest), rest);
  }
}
