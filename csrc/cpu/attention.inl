// The pieces of an attention step in the vocabulary of simd/*.h: scores, softmax, weighted sums of values, appending.
// K and V are read as they lie in memory and converted in registers. A query's sums are formed by the same operations
// in the same order whatever other queries are computed beside it.

// exp(-64) is 1e-28: nothing beside the largest weight, 1. Far smaller ones would make denormal products, at which a
// core stops for a hundred cycles each.
constexpr float kVanishing = -64.0f;

constexpr int kQueries = kTileRows;
// Queries whose sums over four positions fit in the register file beside K: 24 + 4 + 1 of 32, 8 + 4 + 1 of 16.
constexpr int kScoreQueries = kLanes == 16 ? 6 : 2;
constexpr int64_t kAheadBytes = 2048;
constexpr int64_t kValueBlockBytes = 16384;  // of V, in the first cache while the panels of columns pass over it

template <class T>
inline void prefetch_bytes(const T* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) prefetch(reinterpret_cast<const char*>(from) + i);
}

// The vectors of one head at consecutive positions.
template <class T>
struct Consecutive {
  using Element = T;
  const T* base;
  int64_t head_size;
  int64_t count;
  int64_t row_bytes() const { return head_size * static_cast<int64_t>(sizeof(T)); }
  const T* at(int64_t p) const { return base + p * head_size; }
  // Asks for what lies kAheadBytes behind `rows` rows from p on; beyond the last one that is the next head.
  void ahead(int64_t p, int64_t rows) const {
    prefetch_bytes(reinterpret_cast<const char*>(at(p)) + kAheadBytes, rows * row_bytes());
  }
  // Asks for the n-th 256 bytes.
  void early(int64_t n) const {
    if (n * 256 < count * row_bytes()) prefetch_bytes(reinterpret_cast<const char*>(base) + n * 256, 256);
  }
};

// The same where each position lives in a cache row of its own.
template <class T>
struct Gathered {
  using Element = T;
  const T* base;
  int64_t head_size;
  int64_t count;
  const int32_t* slots;
  int64_t slot_stride;
  int64_t rows_ahead;  // kAheadBytes, at least 4 rows
  int64_t row_bytes() const { return head_size * static_cast<int64_t>(sizeof(T)); }
  const T* at(int64_t p) const { return base + p * head_size + slots[p] * slot_stride; }
  void ahead(int64_t p, int64_t rows) const {
    p += rows_ahead;
    for (const int64_t end = p + rows < count ? p + rows : count; p < end; ++p) prefetch_bytes(at(p), row_bytes());
  }
  void early(int64_t n) const {
    if (n < count) prefetch_bytes(at(n), row_bytes());
  }
};

// Columns of K and V are read by two vectors. Where bf16 can be paired, the first holds their even and the second their
// odd columns, which takes one operation each; q and the sums of V then have this order too.
template <class T>
constexpr bool kPaired = kHasBf16Pairs && std::is_same_v<T, bf16>;

template <int kPart, class T>
inline F load_part(const T* p) {
  if constexpr (!kPaired<T>)
    return load(p + kPart * kLanes);
  else
    return kPart == 0 ? load_even(p) : load_odd(p);
}

// Brings columns into the order that load_part() has (kInto) or back.
template <class T, bool kInto>
inline void order_columns(float* x, int64_t head_size) {
  if constexpr (kPaired<T>) {
    for (int64_t d = 0; d + 2 * kLanes <= head_size; d += 2 * kLanes) {
      float copy[2 * kLanes];
      memcpy(copy, x + d, sizeof copy);
      for (int i = 0; i < kLanes; ++i) {
        x[d + (kInto ? i : 2 * i)] = copy[kInto ? 2 * i : i];
        x[d + (kInto ? kLanes + i : 2 * i + 1)] = copy[kInto ? 2 * i + 1 : kLanes + i];
      }
    }
  }
}

// sum[i][j] += q[i] . b[j], one vector
template <int NQ>
inline void add_scores(F sum[NQ][4], const F b[4], const float* q, int64_t q_stride) {
#pragma GCC unroll 8
  for (int i = 0; i < NQ; ++i) {
    const F a = load(q + i * q_stride);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) fma_into(sum[i][j], a, b[j]);
  }
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
  for (; d + 2 * kLanes <= head_size; d += 2 * kLanes) {
    F b[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) b[j] = load_part<0>(k[j] + d);
    add_scores<NQ>(sum, b, q + d, q_stride);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) b[j] = load_part<1>(k[j] + d);
    add_scores<NQ>(sum, b, q + d + kLanes, q_stride);
  }
  if (d < head_size) {
    F b[4];
    if (d + kLanes <= head_size) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) b[j] = load(k[j] + d);
      add_scores<NQ>(sum, b, q + d, q_stride);
      d += kLanes;
    }
    if (const int rest = static_cast<int>(head_size - d)) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) b[j] = load_n(k[j] + d, rest);
      add_scores<NQ>(sum, b, q + d, q_stride);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < NQ; ++i) reduce_add4(sum[i][0], sum[i][1], sum[i][2], sum[i][3], scores + i * stride);
}

// All scores of NQ queries over the positions of `keys`. Up to three more per query are written beyond.
template <int NQ, class Positions>
LORA_KERNELS_APART void score_positions(const Positions& keys, const float* q, int64_t q_stride, float* scores,
                                        int64_t stride) {
  constexpr int kStep = NQ < kScoreQueries ? NQ : kScoreQueries;
  for (int64_t p = 0; p < keys.count; p += 4) {
    const typename Positions::Element* k[4];
    const int64_t last = keys.count - 1 - p;
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) k[j] = keys.at(p + (j < last ? j : last));
    keys.ahead(p, 4);
    int i = 0;
    for (; i + kStep <= NQ; i += kStep)
      score_tile<kStep>(k, keys.head_size, q + i * q_stride, q_stride, scores + i * stride + p, stride);
    if constexpr (NQ % kStep != 0)
      score_tile<NQ % kStep>(k, keys.head_size, q + i * q_stride, q_stride, scores + i * stride + p, stride);
  }
}

inline void scale_by(float* x, const float* factors, int64_t count) {
  int64_t p = 0;
  for (; p + kLanes <= count; p += kLanes) store(x + p, load(x + p) * load(factors + p));
  if (const int rest = static_cast<int>(count - p))
    store_n(x + p, load_n(x + p, rest) * load_n(factors + p, rest), rest);
}

// scores[0 ... count) become exp(score - largest), 0 below kVanishing; returns their sum. The rest of the last vector
// is overwritten. Calls meanwhile(n) for the n-th vector, to have memory work while nothing here needs it.
template <class Meanwhile>
LORA_KERNELS_APART float exponentials(float* scores, int64_t count, const Meanwhile& meanwhile) {
  const float infinity = __builtin_inff();
  for (int64_t p = count; p < round_up(count, kLanes); ++p) scores[p] = -infinity;
  F top[4] = {set(-infinity), set(-infinity), set(-infinity), set(-infinity)};  // in turns, to hide the latency
  int64_t at = 0;
  for (; at + 4 * kLanes <= count; at += 4 * kLanes)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) top[j] = max(load(scores + at + j * kLanes), top[j]);  // so a NaN is passed over
  for (; at < count; at += kLanes) top[0] = max(load(scores + at), top[0]);
  const F largest = set(reduce_max(max(max(top[0], top[1]), max(top[2], top[3]))));
  F sum = zero();
  for (int64_t p = 0; p < count; p += kLanes) {
    const F x = load(scores + p) - largest;
    const F e = select(x < set(kVanishing), zero(), exp_within(x));
    sum = sum + e;
    store(scores + p, e);
    meanwhile(p / kLanes);
  }
  return reduce_add(sum);
}

// acc[i, d] += sum over positions [begin, end) of weights[i * stride + p] * V[p, d], for NQ queries and columns d ...
// of NV vectors; of one vector only `columns` when kPartial.
template <int NQ, int NV, bool kPartial, class Positions>
LORA_KERNELS_APART void add_panel(const Positions& values, int64_t begin, int64_t end, int64_t d, int columns,
                                  const float* weights, int64_t stride, float* acc, int64_t acc_stride) {
  F sum[NQ][NV];
#pragma GCC unroll 8
  for (int i = 0; i < NQ; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) sum[i][j] = load(acc + i * acc_stride + d + j * kLanes);
  for (int64_t p = begin; p < end; ++p) {
    const auto* v = values.at(p) + d;
    if (d == 0) values.ahead(p, 1);
    F b[NV];
    if constexpr (NV == 1) {
      b[0] = kPartial ? load_n(v, columns) : load(v);
    } else {
#pragma GCC unroll 8
      for (int j = 0; j < NV; j += 2) {
        b[j] = load_part<0>(v + j * kLanes);
        b[j + 1] = load_part<1>(v + j * kLanes);
      }
    }
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

// acc[i] += sum over positions [begin, end) of weights[i, p] * V[p], all columns, in the order of load_part().
template <int NQ, class Positions>
inline void add_values(const Positions& values, int64_t begin, int64_t end, const float* weights, int64_t stride,
                       float* acc, int64_t acc_stride) {
  // The widest panel that leaves room for V and a broadcast; one query takes 8 vectors for enough sums in flight.
  constexpr int NV = NQ == 1 ? 8 : NQ == 2 ? 4 : kTileVectors;
  const int64_t head_size = values.head_size, vectors = head_size / kLanes;
  int64_t block = end - begin;
  const bool single = head_size % kLanes == 0 && vectors <= NV && (vectors & (vectors - 1)) == 0;
  if (!single) {  // several panels pass over a block of positions while it is in the first cache
    block = kValueBlockBytes / (head_size * static_cast<int64_t>(sizeof(typename Positions::Element)));
    if (block < 16) block = 16;
  }
  for (int64_t p = begin; p < end; p += block) {
    const int64_t stop = p + block < end ? p + block : end;
    int64_t d = 0;
    const auto panels = [&](auto tag) {
      constexpr int kWidth = decltype(tag)::value;
      if constexpr (kWidth <= NV)
        for (; d + kWidth * kLanes <= head_size; d += kWidth * kLanes)
          add_panel<NQ, kWidth, false>(values, p, stop, d, 0, weights, stride, acc, acc_stride);
    };
    panels(std::integral_constant<int, 8>());
    panels(std::integral_constant<int, 4>());
    panels(std::integral_constant<int, 2>());
    panels(std::integral_constant<int, 1>());
    if (d < head_size)
      add_panel<NQ, 1, true>(values, p, stop, d, static_cast<int>(head_size - d), weights, stride, acc, acc_stride);
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
