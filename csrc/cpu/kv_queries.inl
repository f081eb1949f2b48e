// The queries of an attention step: which of them read the same memory, what they take along, and where their results
// go. Shared by all layouts of the cache.

// Queries of one cache row: entries [first, first + count) of the list of queries.
struct QueryBlock {
  int32_t first, count;
  int32_t group_end;  // the first block after those that read the same memory
  int64_t longest;    // positions that its queries see, at most
};

struct Step {
  const KvAttentionStepPlan& plan;
  const KvAttentionStepProblem& p;
  const KvAttentionStepArgs& args;

  int64_t visible(int64_t row, int64_t token) const { return args.lengths[row] + (p.append ? token + 1 : 0); }
  int64_t cache_row(int64_t row, int64_t position) const {
    return p.slots == KvSlots::kIdentity ? row
           : p.slots == KvSlots::kPerRow ? args.slots[row]
                                         : args.slots[row * p.capacity + position];
  }
};

// Memory of a call: tables that the caller's thread makes, and scratch of each task.
struct StepMemory {
  int32_t* order;      // [rows] sorted by cache row; query n is token n % T of row order[n / T]
  int32_t* counts;     // [cache_rows + 1]
  QueryBlock* blocks;  // [rows * T]
  int64_t* before;     // [rows * T + 1]: cost of the blocks before each one
  int64_t* block_count;
  float* tasks;  // task_floats each
  int64_t task_floats;
  int64_t q_stride;  // of a query's row of q and of acc, in floats
  int64_t score_stride;
  int64_t bytes;

  StepMemory(void* base, const KvAttentionStepProblem& p, int tasks_count) {
    char* at = static_cast<char*>(base);
    const auto take = [&](int64_t size) {
      char* piece = at;
      at += round_up(size, 64);
      return piece;
    };
    const int64_t queries = p.rows * p.tokens;
    order = reinterpret_cast<int32_t*>(take(p.rows * 4));
    counts = reinterpret_cast<int32_t*>(take(p.slots == KvSlots::kPerRow ? (p.cache_rows + 1) * 4 : 0));
    blocks = reinterpret_cast<QueryBlock*>(take(queries * static_cast<int64_t>(sizeof(QueryBlock))));
    before = reinterpret_cast<int64_t*>(take((queries + 1) * 8));
    block_count = reinterpret_cast<int64_t*>(take(8));
    q_stride = round_up(p.head_size, 16);
    // Not a multiple of 4096 bytes: the scores of a block's queries at one position would share a set of the first
    // cache.
    score_stride = round_up(p.capacity + 3, 16) + 16;
    // q, acc, scores of every query, and a row of gathered scales
    task_floats = round_up(kQueries * (2 * q_stride + score_stride) + score_stride, 16);
    if (p.layout == KvLayout::kBlocked)  // and two halves of every query's sums, q and weights, the latter in bytes
      task_floats += round_up(kQueries * (2 * q_stride + (q_stride + score_stride) / 2), 16);
    tasks = reinterpret_cast<float*>(take(tasks_count * task_floats * 4));
    bytes = at - static_cast<char*>(base);
  }
};

// Rows in the order of their cache rows (stable), so that rows that share one stand together.
inline void sort_rows(const Step& s, StepMemory& m) {
  if (s.p.slots != KvSlots::kPerRow) {
    for (int64_t i = 0; i < s.p.rows; ++i) m.order[i] = static_cast<int32_t>(i);
    return;
  }
  memset(m.counts, 0, static_cast<size_t>(s.p.cache_rows + 1) * sizeof(int32_t));
  for (int64_t i = 0; i < s.p.rows; ++i) ++m.counts[s.args.slots[i] + 1];
  for (int64_t i = 0; i < s.p.cache_rows; ++i) m.counts[i + 1] += m.counts[i];
  for (int64_t i = 0; i < s.p.rows; ++i) m.order[m.counts[s.args.slots[i]]++] = static_cast<int32_t>(i);
}

// Fills blocks and the cost before each; returns their number.
inline int64_t make_blocks(const Step& s, StepMemory& m) {
  const KvAttentionStepProblem& p = s.p;
  int64_t blocks = 0, group = 0;
  m.before[0] = 0;
  for (int64_t first = 0; first < p.rows;) {
    int64_t end = first + 1;
    if (p.slots == KvSlots::kPerRow)
      while (end < p.rows && s.args.slots[m.order[end]] == s.args.slots[m.order[first]]) ++end;
    for (int64_t n = first * p.tokens; n < end * p.tokens;) {
      QueryBlock& block = m.blocks[blocks];
      block.first = static_cast<int32_t>(n);
      block.count = static_cast<int32_t>(tile_rows(end * p.tokens - n, kQueries));
      block.longest = 0;
      for (int64_t i = n; i < n + block.count; ++i) {
        const int64_t visible = s.visible(m.order[i / p.tokens], i % p.tokens);
        if (visible > block.longest) block.longest = visible;
      }
      n += block.count;
      // Bytes of K and V; arithmetic on a second query costs about a quarter of reading them.
      const int64_t bytes = 2 * block.longest * p.head_size * static_cast<int64_t>(size_of(p.cache_dtype));
      m.before[blocks + 1] = m.before[blocks] + bytes * (block.count + 3) / 4 + 64;
      ++blocks;
    }
    first = end;
    if (p.slots == KvSlots::kPerPosition && end < p.rows) continue;  // beams share most of their past
    for (; group < blocks; ++group) m.blocks[group].group_end = static_cast<int32_t>(blocks);
  }
  return blocks;
}

// One query of a block.
struct Query {
  int64_t row, token;
  int64_t visible;  // positions it attends to
  float* scores;
  float inverse;  // 1 / sum of the exponentials, or 0
};

inline void make_queries(const Step& s, const StepMemory& m, const QueryBlock& block, float* scores, Query* queries) {
  for (int i = 0; i < block.count; ++i) {
    Query& query = queries[i];
    query.row = m.order[(block.first + i) / s.p.tokens];
    query.token = (block.first + i) % s.p.tokens;
    query.visible = s.visible(query.row, query.token);
    query.scores = scores + i * m.score_stride;
    query.inverse = 0;
  }
}

// q of every query in fp32, scaled, padded with zeros and in the order of load_part().
template <class T>
inline void load_queries(const Step& s, const StepMemory& m, const Query* queries, int count, int64_t head,
                         const float* channels, float* q) {
  const KvAttentionStepProblem& p = s.p;
  memset(q, 0, static_cast<size_t>(count * m.q_stride) * sizeof(float));
  with_type(p.dtype, s.args.q, [&](auto* from) {
    for (int i = 0; i < count; ++i, q += m.q_stride) {
      convert_row(from + ((queries[i].row * p.tokens + queries[i].token) * p.heads + head) * p.head_size, p.head_size,
                  q);
      for (int64_t d = 0; d < m.q_stride; d += kLanes) store(q + d, load(q + d) * set(s.args.scale));
      if (channels) scale_by(q, channels, p.head_size);
      order_columns<T, true>(q, p.head_size);
    }
  });
}

template <class T>
inline void store_results(const Step& s, const StepMemory& m, const Query* queries, int count, int64_t head,
                          const float* channels, float* acc) {
  const KvAttentionStepProblem& p = s.p;
  const int64_t D = p.head_size;
  with_type(p.dtype, s.args.out, [&](auto* type) {
    auto* out = const_cast<std::remove_const_t<std::remove_pointer_t<decltype(type)>>*>(type);
    for (int i = 0; i < count; ++i, acc += m.q_stride) {
      order_columns<T, false>(acc, D);
      if (channels && queries[i].visible > 0) scale_by(acc, channels, D);  // nothing stays 0, though a scale be NaN
      auto* to = out + ((queries[i].row * p.tokens + queries[i].token) * p.heads + head) * D;
      for (int64_t d = 0; d < D; d += kLanes) {
        const F v = load(acc + d) * set(queries[i].inverse);
        D - d >= kLanes ? store(to + d, v) : store_n(to + d, v, static_cast<int>(D - d));
      }
    }
  });
}

// The softmax weights of the chosen heads; scores hold the exponentials.
inline void store_weights(const Step& s, const Query* queries, int count, int64_t head) {
  const KvAttentionStepProblem& p = s.p;
  for (int64_t w = 0; w < p.weight_heads; ++w) {
    if (s.args.weight_heads[w] != head) continue;
    for (int i = 0; i < count; ++i) {
      const Query& query = queries[i];
      float* to = s.args.weights + ((query.row * p.weight_heads + w) * p.tokens + query.token) * p.capacity;
      for (int64_t j = 0; j < query.visible; ++j) to[j] = query.scores[j] * query.inverse;
      memset(to + query.visible, 0, static_cast<size_t>(p.capacity - query.visible) * sizeof(float));
    }
  }
}
