// kv_attention_step over blocked INT8 keys and values (kv_packing.h), on a CPU.
//   scores = (q * k_scales) K, out = v_scales * (softmax V): q * k_scales and the softmax weights become integers of 14
//   bits, 128 * high + low (q of kKvManyQueries tokens or more of 8, high alone), and both products are sums of
//   integers, equal in every implementation; softmax in fp32. Per query 4 integer products per element of K and V (two
//   halves each); bytes: 2 D per position and head, however many queries share them: bound by memory up to three or
//   four queries, then by the products and the softmax.
// A weight below 1/32,512 of the largest one counts as zero; out is divided by the sum of the rounded weights.
//
// Measured on a shared machine (one core with AVX-512 VNNI, 1,500 positions, 6, 8 or 12 heads of 64, caches cold, calls
// through torch, as a fraction of a plain read of the same bytes in the same run): one query 90 to 96 % of the median
// read and 78 to 83 % of the best, where INT8 in rows reaches 74 to 81 % of the median; five queries 63 to 73 %, and 44
// to 47 %. In cache a head takes 2.8 us for one query and 10 us for five, of which the softmax is a fifth and a third;
// AVX2 is bound by its products, 6 us and 28 us.
// Tried and lost: asking for memory 1, 2 or 4 KB early (20, 13 and 3 % slower with five queries); loading both halves
// of a pair at once (broadcasts then take the port of a product: a quarter slower with five queries); asking for twice
// as much of V during the softmax of several queries (waits there for what it gains later).

// Sums that stay in registers beside vectors of K or V and broadcasts of q or weights, 30 of 32 or 15 of 16 in all.
constexpr int kBlockedSums = kLanes == 16 ? 26 : 8;
// Bytes in flight between memory and the registers: latency times the bandwidth of one core.
constexpr int64_t kBlockedAheadBytes = 8192;
constexpr int64_t kBlockedChunkBytes = 16384;  // of V, in the first cache while the panels of columns pass over it

// q and the weights of NQ queries lie as [steps][NQ] pairs of halves, each half four bytes: high, low.
constexpr int64_t kPairBytes = 2 * kKvStep;

// The pairs of kLanes integers in [-kKvMost, kKvMost], `stride` bytes apart; unsigned products want 128 + high.
inline void store_halves(uint8_t* to, int64_t stride, I v, int32_t offset) {
  store_pairs(to, stride, (v >> 7) + offset, v & 127);
}

// Broadcasts four bytes, by the load itself: a broadcast from a general register takes the port of a product.
inline I four_of(const uint8_t* from) {
  int32_t four;
  memcpy(&four, from, sizeof four);
  return set_int(four);
}

// high[i] += x[i].high . w, low[i] += x[i].low . w: one step of NQ queries and NV vectors. High halves of the weights
// are not negative, as all low ones.
template <int NQ, int NV, bool kWeights, bool kLow = true>
inline void add_halves(I high[NQ][NV], I low[NQ][NV], const uint8_t* x, const Weights w[NV]) {
#pragma GCC unroll 8
  for (int i = 0; i < NQ; ++i) {
    const I h = four_of(x + i * kPairBytes);
    const I l = kLow ? four_of(x + i * kPairBytes + kKvStep) : h;
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) {
      kWeights ? int8_dot_positive_into(high[i][j], h, w[j]) : int8_dot_into(high[i][j], h, w[j]);
      if constexpr (kLow) int8_dot_positive_into(low[i][j], l, w[j]);
    }
  }
}

template <int NV>
inline void load_step(const uint8_t* from, Weights w[NV]) {
#pragma GCC unroll 8
  for (int j = 0; j < NV; ++j) {
    w[j] = load_weights(from + j * sizeof(I));
    if (j * sizeof(I) % 64 == 0) prefetch(from + kBlockedAheadBytes + j * sizeof(I));
  }
}

// Scores of NQ queries over NV vectors of positions of a block, from `k` on: factors[i] * (q[i] . k), positions a lane
// each. Unsigned halves have 128 added to the high one, so 128 times the sum of each position's k is taken off again.
// Without kLow the low halves are zero and left out.
template <int NQ, int NV, bool kLow>
LORA_KERNELS_APART void score_vectors(const uint8_t* k, int64_t steps, const uint8_t* q, const float* factors,
                                      float* scores, int64_t stride) {
  I high[NQ][NV], low[NQ][NV], excess[NV];
#pragma GCC unroll 8
  for (int j = 0; j < NV; ++j) {
    excess[j] = set_int(0);
#pragma GCC unroll 8
    for (int i = 0; i < NQ; ++i) high[i][j] = low[i][j] = set_int(0);
  }
  for (int64_t step = 0; step < steps; ++step, k += kKvBlockPositions * kKvStep, q += NQ * kPairBytes) {
    Weights w[NV];
    load_step<NV>(k, w);
    if constexpr (kUnsignedActivations)
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) int8_dot_into(excess[j], set_int(static_cast<int32_t>(0x80808080u)), w[j]);
    add_halves<NQ, NV, false, kLow>(high, low, q, w);
  }
#pragma GCC unroll 8
  for (int i = 0; i < NQ; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) {
      F sum = to_float(high[i][j] - excess[j]) * set(128.0f);
      if constexpr (kLow) sum = sum + to_float(low[i][j]);
      store(scores + i * stride + j * kLanes, sum * set(factors[i]));
    }
}

// sums[i][half][...] += halves of p[i] . v for NQ queries and NV vectors of channels, from `v` on, over `steps` steps
// of four positions.
template <int NQ, int NV>
LORA_KERNELS_APART void value_vectors(const uint8_t* v, int64_t step_bytes, int64_t steps, const uint8_t* p,
                                      int32_t* sums, int64_t stride) {
  I high[NQ][NV], low[NQ][NV];
#pragma GCC unroll 8
  for (int i = 0; i < NQ; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) {
      high[i][j] = load_int(sums + 2 * i * stride + j * kLanes);
      low[i][j] = load_int(sums + (2 * i + 1) * stride + j * kLanes);
    }
  for (int64_t step = 0; step < steps; ++step, v += step_bytes, p += NQ * kPairBytes) {
    Weights w[NV];
    load_step<NV>(v, w);
    add_halves<NQ, NV, true>(high, low, p, w);
  }
#pragma GCC unroll 8
  for (int i = 0; i < NQ; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) {
      store_int(sums + 2 * i * stride + j * kLanes, high[i][j]);
      store_int(sums + (2 * i + 1) * stride + j * kLanes, low[i][j]);
    }
}

// Calls body(tag, first) for vectors [0, count) in aligned groups of as many as Most, a power of two.
template <int Most, class Body>
inline void in_groups(int64_t count, const Body& body, int64_t first = 0) {
  for (; first + Most <= count; first += Most) body(std::integral_constant<int, Most>(), first);
  if constexpr (Most > 1) in_groups<Most / 2>(count, body, first);
}

// All scores of NQ queries over `positions` positions, rounded up to a vector.
template <int NQ, bool kLow>
inline void blocked_scores(const uint8_t* keys, int64_t steps, int64_t positions, const uint8_t* q,
                           const float* factors, float* scores, int64_t stride) {
  constexpr int kSums = (kLow ? 2 : 1) * NQ + (kUnsignedActivations ? 1 : 0);
  constexpr int NV = 4 * kSums <= kBlockedSums ? 4 : 2 * kSums <= kBlockedSums ? 2 : 1;
  in_groups<NV>(round_up(positions, kLanes) / kLanes, [&](auto tag, int64_t first) {
    const int64_t at = first * kLanes;
    const uint8_t* k = keys + at / kKvBlockPositions * (steps * kKvBlockPositions * kKvStep);
    score_vectors<NQ, decltype(tag)::value, kLow>(k + at % kKvBlockPositions * kKvStep, steps, q, factors, scores + at,
                                                  stride);
  });
}

// sums[i][half] += halves of p[i] . V over `positions` positions, rounded up to a step, all channels.
template <int NQ>
inline void blocked_values(const uint8_t* values, int64_t channels, int64_t positions, const uint8_t* p, int32_t* sums,
                           int64_t stride) {
  constexpr int NV = 8 * NQ <= kBlockedSums ? 4 : 4 * NQ <= kBlockedSums ? 2 : 1;
  const int64_t step_bytes = channels * kKvStep, steps = kv_value_steps(positions);
  // One panel reads V as a stream; several pass over a chunk while it is in the first cache.
  const int64_t chunk = channels == NV * kLanes ? steps : kBlockedChunkBytes / step_bytes + 1;
  for (int64_t step = 0; step < steps; step += chunk) {
    const int64_t count = step + chunk < steps ? chunk : steps - step;
    in_groups<NV>(channels / kLanes, [&](auto tag, int64_t first) {
      const int64_t d = first * kLanes;
      value_vectors<NQ, decltype(tag)::value>(values + step * step_bytes + d * kKvStep, step_bytes, count,
                                              p + step * NQ * kPairBytes, sums + d, stride);
    });
  }
}

// One of `queries` queries' q as pairs, with `low` halves or without; returns what one unit is worth, NaN where q is
// not finite.
inline float split_query(const float* q, int64_t count, uint8_t* pairs, int queries, bool low) {
  I bits = set_int(0);
  for (int64_t d = 0; d < count; d += kLanes) bits = max_int(bits, bits_of(abs(load(q + d))));
  const int32_t most = reduce_max_int(bits);  // as bits, infinities and NaNs are the largest
  float amax;
  memcpy(&amax, &most, sizeof amax);
  const bool finite = amax <= 3.4028235e38f;
  const float inverse = static_cast<float>(low ? kKvMost : 127) / amax;
  const bool usable = finite && inverse <= 3.4028235e38f;
  for (int64_t d = 0; d < count; d += kLanes) {
    const F x = usable ? load(q + d) * set(inverse) : zero();
    const I v = low ? to_int(x) : to_int(x) * set_int(128);
    store_halves(pairs + d * 2 * queries, queries * kPairBytes, v, kUnsignedActivations ? 128 : 0);
  }
  return !finite ? __builtin_nanf("") : usable ? amax / static_cast<float>(kKvMost) : 0.0f;
}

// One query's exponentials, in [0, 1], as pairs, zero from `count` to `padded`; returns their sum in units of
// 1 / kKvMost.
inline float split_weights(const float* weights, int64_t count, int64_t padded, uint8_t* pairs, int queries) {
  I sum = set_int(0);
  int64_t p = 0;
  for (; p < count; p += kLanes) {
    const I v = to_int(load(weights + p) * set(static_cast<float>(kKvMost)));
    sum += v;
    store_halves(pairs + p * 2 * queries, queries * kPairBytes, v, 0);
  }
  for (; p < padded; p += kLanes) store_halves(pairs + p * 2 * queries, queries * kPairBytes, set_int(0), 0);
  int32_t lanes[kLanes];
  store_int(lanes, sum);
  int64_t total = 0;
  for (int i = 0; i < kLanes; ++i) total += lanes[i];
  return static_cast<float>(total);
}

// One block of queries and one head.
inline void attend_blocked(const Step& s, const StepMemory& m, const QueryBlock& block, int64_t head, float* scratch) {
  const KvAttentionStepProblem& p = s.p;
  const int count = block.count;
  float* q = scratch;
  float* acc = q + kQueries * m.q_stride;
  float* scores = acc + kQueries * m.q_stride;
  int32_t* sums = reinterpret_cast<int32_t*>(scores + kQueries * m.score_stride);
  uint8_t* q_pairs = reinterpret_cast<uint8_t*>(sums + 2 * kQueries * m.q_stride);
  uint8_t* weight_pairs = q_pairs + 2 * kQueries * m.q_stride;
  Query queries[kQueries];
  make_queries(s, m, block, scores, queries);
  const int64_t at = s.cache_row(queries[0].row, 0) * p.heads + head, longest = block.longest;
  const auto* keys = static_cast<const uint8_t*>(s.args.k_cache) + at * kv_key_bytes(p.capacity, p.head_size);
  const auto* values = static_cast<const uint8_t*>(s.args.v_cache) + at * kv_value_bytes(p.capacity, p.head_size);
  const int64_t value_bytes = kv_value_steps(longest) * kKvStep * m.q_stride;

  load_queries<int8_t>(s, m, queries, count, head, s.args.k_scales + at * p.head_size, q);
  const bool low = p.tokens < kKvManyQueries;
  float factors[kQueries];
  for (int i = 0; i < count; ++i)
    factors[i] = split_query(q + i * m.q_stride, m.q_stride, q_pairs + i * kPairBytes, count, low);
  with_rows<kQueries>(count, [&](auto tag) {
    constexpr int kCount = decltype(tag)::value;
    const int64_t steps = kv_key_steps(p.head_size);
    low ? blocked_scores<kCount, true>(keys, steps, longest, q_pairs, factors, scores, m.score_stride)
        : blocked_scores<kCount, false>(keys, steps, longest, q_pairs, factors, scores, m.score_stride);
  });
  float inverses[kQueries] = {};
  int64_t asked = 0;  // of V: as much as memory gives while the softmax is computed
  for (int i = 0; i < count; ++i) {
    Query& query = queries[i];
    const int64_t visible = query.visible;
    float sum = 0;
    if (visible > 0)
      sum = exponentials(query.scores, visible, [&](int64_t) {
        if (asked < value_bytes) prefetch_bytes(values + asked, 128);
        asked += 128;
      });
    const float total =
        split_weights(query.scores, visible, round_up(longest, kLanes), weight_pairs + i * kPairBytes, count);
    if (visible > 0) query.inverse = 1.0f / sum, inverses[i] = sum == sum ? 1.0f / total : sum;
  }
  store_weights(s, queries, count, head);

  memset(sums, 0, static_cast<size_t>(2 * count * m.q_stride) * sizeof(int32_t));
  with_rows<kQueries>(count, [&](auto tag) {
    blocked_values<decltype(tag)::value>(values, m.q_stride, longest, weight_pairs, sums, m.q_stride);
  });
  for (int i = 0; i < count; ++i) {
    const int32_t* sum = sums + 2 * i * m.q_stride;
    for (int64_t d = 0; d < m.q_stride; d += kLanes)
      store(acc + i * m.q_stride + d,
            to_float(load_int(sum + d)) * set(128.0f) + to_float(load_int(sum + m.q_stride + d)));
    queries[i].inverse = inverses[i];
  }
  store_results<int8_t>(s, m, queries, count, head, s.args.v_scales + at * p.head_size, acc);
}
