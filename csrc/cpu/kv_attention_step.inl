// kv_attention_step on a CPU.
//   out[i, t, h] = sum_p softmax_p(scale q[i, t, h] . K[p, h]) V[p, h]
//   FLOPs 4 D per query and position; bytes 2 D * element size per cache row, head and position: bound by reading them.
//
// The new tokens are appended first. Then the queries (row, token) are cut into blocks of at most kQueries that read
// the same cache row: the beams that share cross-K/V, or the tokens of a chunk. Every (block, head) is one unit of
// work:
//   - scores: K is read once, four positions against all queries of the block, to scores[query][position];
//   - softmax, per query, in fp32; scales per position are folded into the scores and the probabilities;
//   - values: V is read once; the sums of all queries stay in registers, a panel of columns at a time.
// Scales per channel are folded into q and the result. A row alone, a row in a batch, a chunk and single steps give the
// same bits (attention.inl). Blocked caches take the same steps in integers (kv_blocked.inl).
//
// K and V are converted in registers, without copies. Memory is asked for kAheadBytes early, and V while the softmax is
// computed: the hardware's prefetcher stops at the end of each page, and at each head of a short cache.
//
// Measured on a shared machine: AVX-512, one core, 8 heads of 64, caches cold, as a fraction of a plain read of the
// same bytes. 1,500 frames: fp32 95 to 100 %, bf16 and fp16 76 to 94 %, int8 67 to 77 % (bound by its conversion to
// fp32). Five beams on one K/V: fp32 80 %, bf16 70 to 75 %, int8 51 to 57 %. A random cache row at each of 447
// positions: fp32 at least 80 %, bf16 50 to 70 %, int8 30 % (bound by latency).
// Tried: asking for memory 4 or 8 KB early loses to 2, 1 KB is its equal; bf16 in pairs of columns is 10 % faster than
// widening halves in the first caches, and the same when memory is the limit.

constexpr int64_t kTaskBytes = 100000;  // read by one core in the time of a fork and join

// Calls body with the first `count` positions of one row and head in a cache.
template <class T, class Body>
inline void with_positions(const Step& s, const void* cache, int64_t row, int64_t head, int64_t count,
                           const Body& body) {
  const KvAttentionStepProblem& p = s.p;
  const int64_t head_stride = p.capacity * p.head_size, row_stride = p.heads * head_stride;
  const T* base = static_cast<const T*>(cache) + head * head_stride;
  const int64_t ahead = kAheadBytes / (p.head_size * static_cast<int64_t>(sizeof(T)));
  if (p.slots == KvSlots::kPerPosition)
    return body(
        Gathered<T>{base, p.head_size, count, s.args.slots + row * p.capacity, row_stride, ahead < 4 ? 4 : ahead});
  body(Consecutive<T>{base + s.cache_row(row, 0) * row_stride, p.head_size, count});
}

// Scales per position of one row and head as consecutive floats; gathered ones go to `copy`.
inline const float* position_scales(const Step& s, const float* scales, int64_t row, int64_t head, int64_t count,
                                    float* copy) {
  const KvAttentionStepProblem& p = s.p;
  const float* base = scales + head * p.capacity;
  const int64_t row_stride = p.heads * p.capacity;
  if (p.slots != KvSlots::kPerPosition) return base + s.cache_row(row, 0) * row_stride;
  for (int64_t i = 0; i < count; ++i) copy[i] = base[s.cache_row(row, i) * row_stride + i];
  return copy;
}

// One block of queries and one head.
template <class T>
inline void attend(const Step& s, const StepMemory& m, const QueryBlock& block, int64_t head, float* scratch) {
  const KvAttentionStepProblem& p = s.p;
  const int count = block.count;
  float* q = scratch;
  float* acc = q + kQueries * m.q_stride;
  float* scores = acc + kQueries * m.q_stride;
  float* gathered = scores + kQueries * m.score_stride;
  Query queries[kQueries];
  make_queries(s, m, block, scores, queries);
  int64_t shortest = block.longest;
  for (int i = 0; i < count; ++i)
    if (queries[i].visible < shortest) shortest = queries[i].visible;
  const int64_t row = queries[0].row, longest = block.longest;
  const bool per_position = p.scales == KvScales::kPerPosition, per_channel = p.scales == KvScales::kPerChannel;
  const int64_t channels = per_channel ? (s.cache_row(row, 0) * p.heads + head) * p.head_size : 0;

  load_queries<T>(s, m, queries, count, head, per_channel ? s.args.k_scales + channels : nullptr, q);
  memset(acc, 0, static_cast<size_t>(count * m.q_stride) * sizeof(float));
  if (longest > 0) {
    with_positions<T>(s, s.args.k_cache, row, head, longest, [&](const auto& keys) {
      with_rows<kQueries>(
          count, [&](auto tag) { score_positions<decltype(tag)::value>(keys, q, m.q_stride, scores, m.score_stride); });
    });
    with_positions<T>(s, s.args.v_cache, row, head, longest, [&](const auto& values) {
      for (int i = 0; i < count; ++i) {
        Query& query = queries[i];
        if (query.visible == 0) continue;
        if (per_position)
          scale_by(query.scores, position_scales(s, s.args.k_scales, query.row, head, query.visible, gathered),
                   query.visible);
        query.inverse = 1.0f / exponentials(query.scores, query.visible, [&](int64_t j) {
                          if (i == 0) values.early(j);  // as much of V as memory gives in this time
                        });
      }
      store_weights(s, queries, count, head);
      for (int i = 0; per_position && i < count; ++i)
        scale_by(queries[i].scores,
                 position_scales(s, s.args.v_scales, queries[i].row, head, queries[i].visible, gathered),
                 queries[i].visible);
      // What all queries see in one pass; what only some see is kept from the others, whatever it holds.
      with_rows<kQueries>(count, [&](auto tag) {
        add_values<decltype(tag)::value>(values, 0, shortest, scores, m.score_stride, acc, m.q_stride);
      });
      for (int i = 0; i < count; ++i)
        if (queries[i].visible > shortest)
          add_values<1>(values, shortest, queries[i].visible, queries[i].scores, 0, acc + i * m.q_stride, 0);
    });
  } else {
    store_weights(s, queries, count, head);
  }
  store_results<T>(s, m, queries, count, head, per_channel ? s.args.v_scales + channels : nullptr, acc);
}

template <class Body>
inline void with_cache_type(DType type, const Body& body) {
  switch (type) {
    case DType::kFloat32: return body(float());
    case DType::kFloat16: return body(fp16());
    case DType::kBFloat16: return body(bf16());
    case DType::kInt8: return body(int8_t());
  }
}

// Appends token n / H, head n % H of the list of all (row, token, head).
inline void append(const Step& s, int64_t n) {
  const KvAttentionStepProblem& p = s.p;
  const int64_t head = n % p.heads, token = n / p.heads % p.tokens, row = n / p.heads / p.tokens;
  const int64_t position = s.args.lengths[row] + token;
  const int64_t at = (s.cache_row(row, position) * p.heads + head) * p.capacity + position;
  with_type(p.dtype, s.args.k, [&](auto* k) {
    with_cache_type(p.cache_dtype, [&](auto tag) {
      using T = decltype(tag);
      const auto* v = static_cast<decltype(k)>(s.args.v);
      const bool scaled = p.scales == KvScales::kPerPosition;
      append_vector(k + n * p.head_size, p.head_size, static_cast<T*>(s.args.k_cache) + at * p.head_size,
                    scaled ? s.args.k_scales + at : nullptr);
      append_vector(v + n * p.head_size, p.head_size, static_cast<T*>(s.args.v_cache) + at * p.head_size,
                    scaled ? s.args.v_scales + at : nullptr);
    });
  });
}

inline void configure(const DeviceInfo& device, KvAttentionStepPlan* plan) {
  const KvAttentionStepProblem& p = plan->problem;
  const int64_t units = p.rows * p.tokens * p.heads;
  const int64_t bytes = 2 * units * p.capacity * p.head_size * static_cast<int64_t>(size_of(p.cache_dtype));
  int64_t tasks = bytes / kTaskBytes + 1;
  if (tasks > units) tasks = units;
  if (tasks > device.threads) tasks = device.threads;
  plan->tasks = static_cast<int>(tasks < 1 ? 1 : tasks);
  plan->workspace = StepMemory(nullptr, p, plan->tasks).bytes;
}

inline void run_step(const KvAttentionStepPlan& plan, const KvAttentionStepArgs& args, const Executor& executor) {
  const KvAttentionStepProblem& p = plan.problem;
  const Step s{plan, p, args};
  StepMemory m(args.workspace, p, plan.tasks);
  in_one_task(executor, [&] {
    sort_rows(s, m);
    *m.block_count = make_blocks(s, m);
  });

  // Every row is written before any row attends: rows may read each other's cache rows.
  if (p.append) {
    const int64_t vectors = p.rows * p.tokens * p.heads;
    int64_t tasks = 2 * vectors * p.head_size * static_cast<int64_t>(size_of(p.dtype)) / kTaskBytes + 1;
    if (tasks > plan.tasks) tasks = plan.tasks;
    for_each_task(executor, tasks, [&](int64_t task) {
      for (int64_t n = vectors * task / tasks; n < vectors * (task + 1) / tasks; ++n) append(s, n);
    });
  }

  // Units (block, head) in the order of memory, cut into ranges of equal cost. Blocks that read the same memory take
  // turns at each head: what one of them has read, the next finds in the second cache.
  const auto worthwhile = [&] {  // tasks, by the bytes of the past as it is now
    const int64_t tasks = m.before[*m.block_count] * p.heads / kTaskBytes + 1;
    return tasks < plan.tasks ? tasks : int64_t{plan.tasks};
  };
  for_each_task(executor, executor.shared ? plan.tasks : worthwhile(), [&](int64_t task) {
    const int64_t blocks = *m.block_count, total = m.before[blocks] * p.heads, tasks = worthwhile();
    if (task >= tasks) return;
    // total fits 2^53 by far, but not total * tasks
    const int64_t begin = total / tasks * task, end = task + 1 == tasks ? total : total / tasks * (task + 1);
    float* scratch = m.tasks + task * m.task_floats;
    for (int64_t group = 0, next; group < blocks; group = next) {
      next = m.blocks[group].group_end;
      const int64_t first = m.before[group] * p.heads, cost = m.before[next] - m.before[group];
      if (first + cost * p.heads <= begin) continue;
      if (first >= end) break;
      for (int64_t head = 0; head < p.heads; ++head)
        for (int64_t b = group; b < next; ++b) {
          const int64_t at = first + head * cost + m.before[b] - m.before[group];
          if (at < begin || at >= end) continue;
          if (p.layout == KvLayout::kBlocked)
            attend_blocked(s, m, m.blocks[b], head, scratch);
          else
            with_cache_type(p.cache_dtype, [&](auto tag) { attend<decltype(tag)>(s, m, m.blocks[b], head, scratch); });
        }
    }
  });
}
