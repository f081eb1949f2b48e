// kv_relative_step on a CPU.
//   s[i, f] = scale ((q[i] + u) . K[f] + (q[i] + v) . P[r0 - i + f]);  out[i] = sum_f softmax_f(s[i]) V[f]
//   FLOPs 6 D per query, head and frame; bytes 2 D * element size per head and frame of a ring, and one pass over P:
//   chunks of a dozen frames are bound by arithmetic, single frames by memory.
//
// A unit of work is one head of one stream, since nobody else writes or reads that head's part of a ring: it appends
// the chunk, then attends. Units are ordered by heads first: the streams of a batch find the head's P in the caches.
// Queries are taken in blocks of at most kBlockQueries:
//   - scores: a tile of up to kScoreQueries queries and four frames takes both products into the same sums. A step to
//     the next query is one row back in P, so the tile needs kScoreQueries + 3 rows of it, each loaded once, and
//     nothing outside of the band is computed. Four frames of K are in the first cache while all queries of the block
//     pass over them.
//   - softmax and values: attention.inl. All queries of a chunk see the same frames.
// Where a ring wraps around within the window, positions are an addition and a comparison away (Ring).
//
// Measured (one core with AVX-512 of a shared machine, 8 heads of 128, chunks of 14 frames after 70, caches cold), as a
// fraction of the bound by arithmetic or reading: fp32 67 to 71 %, bf16 79 to 83 %; 0.18 to 0.60 of torch's time for
// the same in products, gather and softmax.

constexpr int kBlockQueries = 24;
constexpr int64_t kRelativeTaskFlops = 500000;  // computed by one core in the time of a fork and join

// The frames of one head in a ring, from the oldest that is attended to on.
template <class T>
struct Ring {
  using Element = T;
  const T* base;
  int64_t head_size;
  int64_t count;
  int64_t first;  // where frame 0 lives
  int64_t capacity;
  int64_t row_bytes() const { return head_size * static_cast<int64_t>(sizeof(T)); }
  const T* at(int64_t p) const {
    const int64_t place = first + p;
    return base + (place < capacity ? place : place - capacity) * head_size;
  }
  void ahead(int64_t p, int64_t rows) const {
    prefetch_bytes(reinterpret_cast<const char*>(at(p)) + kAheadBytes, rows * row_bytes());
  }
  // Asks for the n-th 256 bytes of the window.
  void early(int64_t n) const {
    const int64_t byte = n * 256, p = byte / row_bytes();
    if (p < count) prefetch_bytes(reinterpret_cast<const char*>(at(p)) + byte % row_bytes(), 256);
  }
};

struct RelativeScratch {
  int64_t q_stride, score_stride;
  float* q_content;   // [kBlockQueries][q_stride] scale (q + u), in the order of K
  float* q_position;  // scale (q + v), in the order of P
  float* acc;
  float* scores;  // [kBlockQueries][score_stride]
  int64_t floats;

  RelativeScratch(float* memory, const KvRelativeStepProblem& p) {
    const int64_t queries = p.tokens < kBlockQueries ? p.tokens : kBlockQueries;
    q_stride = round_up(p.head_size, 16);
    score_stride = round_up(p.left + p.tokens + 3, 16) + 16;  // no multiple of 4096 bytes, as in StepMemory
    if (score_stride % 1024 == 0) score_stride += 16;
    q_content = memory;
    q_position = q_content + queries * q_stride;
    acc = q_position + queries * q_stride;
    scores = acc + queries * q_stride;
    floats = scores + queries * score_stride - memory;
  }
};

// sum[i][j] += q[i] . p[NQ - 1 - i + j], one vector; b(r) loads that of row r
template <int NQ, class Load>
inline void add_by_distance(F sum[NQ][4], const Load& b, const float* q, int64_t q_stride) {
  F a[NQ];
#pragma GCC unroll 8
  for (int i = 0; i < NQ; ++i) a[i] = load(q + i * q_stride);
#pragma GCC unroll 16
  for (int r = 0; r < NQ + 3; ++r) {
    const F row = b(r);
#pragma GCC unroll 8
    for (int i = 0; i < NQ; ++i)
      if (const int j = r - (NQ - 1) + i; j >= 0 && j < 4) fma_into(sum[i][j], a[i], row);
  }
}

// scores[i * stride + j] = q_content[i] . k[j] + q_position[i] . p[NQ - 1 - i + j] for NQ queries and four frames.
template <int NQ, class K, class X>
LORA_KERNELS_APART void relative_tile(const K* const k[4], const X* const p[], int64_t head_size,
                                      const float* q_content, const float* q_position, int64_t q_stride, float* scores,
                                      int64_t stride) {
  F sum[NQ][4];
#pragma GCC unroll 8
  for (int i = 0; i < NQ; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sum[i][j] = zero();
  // `column`: of q; keys and positions load the same columns of a row.
  const auto add = [&](int64_t column, const auto& keys, const auto& positions) {
    F b[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) b[j] = keys(k[j]);
    add_scores<NQ>(sum, b, q_content + column, q_stride);
    add_by_distance<NQ>(sum, [&](int r) { return positions(p[r]); }, q_position + column, q_stride);
  };
  int64_t d = 0;
  for (; d + 2 * kLanes <= head_size; d += 2 * kLanes) {
    const auto first = [d](const auto* x) { return load_part<0>(x + d); };
    const auto second = [d](const auto* x) { return load_part<1>(x + d); };
    add(d, first, first);
    add(d + kLanes, second, second);
  }
  if (d + kLanes <= head_size) {
    const auto whole = [d](const auto* x) { return load(x + d); };
    add(d, whole, whole);
    d += kLanes;
  }
  if (const int rest = static_cast<int>(head_size - d)) {
    const auto part = [d, rest](const auto* x) { return load_n(x + d, rest); };
    add(d, part, part);
  }
#pragma GCC unroll 8
  for (int i = 0; i < NQ; ++i) reduce_add4(sum[i][0], sum[i][1], sum[i][2], sum[i][3], scores + i * stride);
}

// All scores of `count` queries over the frames of `keys`. P's row for the first query and frame is `row`, one of
// `rows`. Up to three more scores per query are written beyond.
template <class K, class X>
inline void relative_scores(const Ring<K>& keys, const X* positions, int64_t position_stride, int64_t row, int64_t rows,
                            int64_t count, const RelativeScratch& m) {
  for (int64_t f = 0; f < keys.count; f += 4) {
    const K* k[4];
    const int64_t last = keys.count - 1 - f;
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) k[j] = keys.at(f + (j < last ? j : last));
    keys.ahead(f, 4);
    for (int64_t i = 0; i < count;) {
      const int64_t group = tile_rows(count - i, kScoreQueries);
      const X* p[kScoreQueries + 3];
      const int64_t oldest = row + f - i - (group - 1);
      for (int64_t r = 0; r < group + 3; ++r)  // those beyond belong to frames beyond
        p[r] = positions + (oldest + r < rows ? oldest + r : rows - 1) * position_stride;
      with_rows<kScoreQueries>(group, [&](auto tag) {
        relative_tile<decltype(tag)::value>(k, p, keys.head_size, m.q_content + i * m.q_stride,
                                            m.q_position + i * m.q_stride, m.q_stride,
                                            m.scores + i * m.score_stride + f, m.score_stride);
      });
      i += group;
    }
  }
}

// One head of one stream.
struct RelativeUnit {
  const KvRelativeStepProblem& p;
  const KvRelativeStepArgs& args;
  int64_t row, head;

  int64_t count() const { return args.counts ? args.counts[row] : p.tokens; }
  int64_t length() const { return args.lengths[row]; }
  // Where this head of the ring begins.
  int64_t ring() const { return ((args.slots ? args.slots[row] : row) * p.heads + head) * p.capacity * p.head_size; }
  // The vector of this head of frame `token` of the chunk.
  int64_t vector(int64_t token) const { return ((row * p.tokens + token) * p.heads + head) * p.head_size; }
};

// The chunk's k and v to the ring.
template <class K>
inline void append_chunk(const RelativeUnit& unit, K* k_ring, K* v_ring) {
  const KvRelativeStepProblem& p = unit.p;
  with_type(p.dtype, unit.args.k, [&](auto* k) {
    const auto* v = static_cast<decltype(k)>(unit.args.v);
    int64_t place = unit.length() % p.capacity;
    for (int64_t token = 0; token < unit.count(); ++token) {
      append_vector(k + unit.vector(token), p.head_size, k_ring + place * p.head_size, nullptr);
      append_vector(v + unit.vector(token), p.head_size, v_ring + place * p.head_size, nullptr);
      if (++place == p.capacity) place = 0;
    }
  });
}

// scale (q + bias) of one head in fp32, padded with zeros.
template <class X>
inline void load_biased(const X* q, const X* bias, int64_t head_size, float scale, float* to, int64_t stride) {
  for (int64_t d = 0; d < stride; d += kLanes)
    store(to + d, (load_at(q, d, head_size) + load_at(bias, d, head_size)) * set(scale));
}

// Queries [begin, begin + count) of the chunk; out[i] for each, in the type of q.
template <class K, class X>
inline void attend_relative(const RelativeUnit& unit, const Ring<K>& keys, const Ring<K>& values, int64_t past,
                            int64_t begin, int64_t count, const RelativeScratch& m) {
  const KvRelativeStepProblem& p = unit.p;
  const int64_t D = p.head_size;
  for (int64_t i = 0; i < count; ++i) {
    const X* q = static_cast<const X*>(unit.args.q) + unit.vector(begin + i);
    float *content = m.q_content + i * m.q_stride, *position = m.q_position + i * m.q_stride;
    load_biased(q, static_cast<const X*>(unit.args.bias_u) + unit.head * D, D, unit.args.scale, content, m.q_stride);
    load_biased(q, static_cast<const X*>(unit.args.bias_v) + unit.head * D, D, unit.args.scale, position, m.q_stride);
    order_columns<K, true>(content, D);
    order_columns<X, true>(position, D);
  }
  relative_scores(keys, static_cast<const X*>(unit.args.positions) + unit.head * D, p.heads * D,
                  p.left + p.tokens - 1 - past - begin, p.left + 2 * p.tokens - 1, count, m);

  float inverse[kBlockQueries];
  for (int64_t i = 0; i < count; ++i) {
    const int64_t vectors = (keys.count + kLanes - 1) / kLanes;
    inverse[i] = 1.0f / exponentials(m.scores + i * m.score_stride, keys.count, [&](int64_t j) {
                   values.early(i * vectors + j);  // as much of V as memory gives in this time
                 });
  }
  memset(m.acc, 0, static_cast<size_t>(count * m.q_stride) * sizeof(float));
  for (int64_t i = 0; i < count;) {
    const int64_t group = tile_rows(count - i, kQueries);
    with_rows<kQueries>(group, [&](auto tag) {
      add_values<decltype(tag)::value>(values, 0, keys.count, m.scores + i * m.score_stride, m.score_stride,
                                       m.acc + i * m.q_stride, m.q_stride);
    });
    i += group;
  }
  for (int64_t i = 0; i < count; ++i) {
    float* acc = m.acc + i * m.q_stride;
    order_columns<K, false>(acc, D);
    X* to = static_cast<X*>(unit.args.out) + unit.vector(begin + i);
    for (int64_t d = 0; d < D; d += kLanes) {
      const F y = load(acc + d) * set(inverse[i]);
      D - d >= kLanes ? store(to + d, y) : store_n(to + d, y, static_cast<int>(D - d));
    }
  }
}

template <class K, class X>
inline void run_unit(const RelativeUnit& unit, float* scratch) {
  const KvRelativeStepProblem& p = unit.p;
  const RelativeScratch m(scratch, p);
  K *k_ring = static_cast<K*>(unit.args.k_cache) + unit.ring(),
    *v_ring = static_cast<K*>(unit.args.v_cache) + unit.ring();
  append_chunk(unit, k_ring, v_ring);
  const int64_t count = unit.count(), length = unit.length(), past = length < p.left ? length : p.left;
  const int64_t first = (length - past) % p.capacity;
  const Ring<K> keys{k_ring, p.head_size, past + count, first, p.capacity};
  const Ring<K> values{v_ring, p.head_size, past + count, first, p.capacity};
  for (int64_t begin = 0; begin < count;) {
    const int64_t block = tile_rows(count - begin, kBlockQueries);
    attend_relative<K, X>(unit, keys, values, past, begin, block, m);
    begin += block;
  }
  for (int64_t token = count; token < p.tokens; ++token)
    memset(static_cast<X*>(unit.args.out) + unit.vector(token), 0, static_cast<size_t>(p.head_size) * sizeof(X));
}

inline void configure(const DeviceInfo& device, KvRelativeStepPlan* plan) {
  const KvRelativeStepProblem& p = plan->problem;
  const int64_t units = p.rows * p.heads;
  int64_t tasks = 6 * units * p.tokens * p.head_size * (p.left + p.tokens) / kRelativeTaskFlops + 1;
  if (tasks > units) tasks = units;
  if (tasks > device.threads) tasks = device.threads;
  plan->tasks = static_cast<int>(tasks < 1 ? 1 : tasks);
  plan->workspace =
      plan->tasks * round_up(RelativeScratch(nullptr, p).floats * static_cast<int64_t>(sizeof(float)), 64);
}

inline void run_relative(const KvRelativeStepPlan& plan, const KvRelativeStepArgs& args, const Executor& executor) {
  const KvRelativeStepProblem& p = plan.problem;
  const int64_t units = p.rows * p.heads, scratch = plan.workspace / plan.tasks / static_cast<int64_t>(sizeof(float));
  for_each_task(executor, plan.tasks, [&](int64_t task) {
    float* memory = static_cast<float*>(args.workspace) + task * scratch;
    for (int64_t n = units * task / plan.tasks; n < units * (task + 1) / plan.tasks; ++n) {
      const RelativeUnit unit{p, args, n % p.rows, n / p.rows};
      with_type(p.cache_dtype, nullptr, [&](auto* cache) {
        with_type(p.dtype, nullptr, [&](auto* q) {
          using K = std::remove_const_t<std::remove_pointer_t<decltype(cache)>>;
          using X = std::remove_const_t<std::remove_pointer_t<decltype(q)>>;
          run_unit<K, X>(unit, memory);
        });
      });
    }
  });
}
