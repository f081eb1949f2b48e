// kv_attention_step over blocked INT8 keys and values where a row brings many queries, in tiles (AMX): the sums of
// kv_blocked.inl, bit for bit. 32 queries of a head at a time:
//   - scores: q, 8 bits, 2 x 16 rows, against 32 positions of K as they lie (int8 sums of D channels), to fp32;
//   - softmax per query, as everywhere; weights become two halves of 7 bits, [positions / 64][16 queries][64] each;
//   - values: each half, 2 x 16 rows, against 32 channels of V as it lies.
// Per query and position 3 D multiply-adds in tiles of 16,384 each 16 cycles, and one exponential: at D = 64 and 1,500
// positions the softmax takes longer than all products.

constexpr int64_t kTileQueries = 32;

inline bool kv_takes_tiles(const KvAttentionStepProblem& p) {
  return p.layout == KvLayout::kBlocked && p.tokens >= kKvManyQueries && p.head_size % kTileDepth == 0;
}

// Scratch of one task; one description serves the size and the pointers.
struct KvTileScratch {
  int64_t bytes = 0;
  char* base;
  int64_t score_stride, steps;  // steps: of 64 positions
  float *q, *acc, *scores;      // [32][D], [32][D], [32][score_stride]
  uint8_t* q_tiles;             // [D / 64][2][16][64]
  uint8_t* weight_tiles;        // [2 halves][2][steps][16][64]
  uint8_t* rest;                // [16][D][4], the last of V where it is no multiple of 64 positions
  int32_t* products;            // [32][32]
  int32_t* sums;                // [2 halves][32][D]

  KvTileScratch(void* memory, const KvAttentionStepProblem& p) : base(static_cast<char*>(memory)) {
    const int64_t D = p.head_size;
    steps = round_up(p.capacity, kTileDepth) / kTileDepth;
    // Not a multiple of 4096 bytes: the scores of all queries at one position would share a set of the first cache.
    score_stride = steps * kTileDepth + 16;
    q = take<float>(kTileQueries * D);
    acc = take<float>(kTileQueries * D);
    scores = take<float>(kTileQueries * score_stride);
    q_tiles = take<uint8_t>(kTileQueries * D);
    weight_tiles = take<uint8_t>(4 * steps * kTileBytes);
    rest = take<uint8_t>(kTileSide * D * kKvStep);
    products = take<int32_t>(kTileQueries * 32);
    sums = take<int32_t>(2 * kTileQueries * D);
  }
  template <class T>
  T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(base + bytes);
    bytes += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return p;
  }
};

// split_query() of 8 bits, to a row of tiles.
inline float quantize_query(const float* q, int64_t count, uint8_t* row) {
  I bits = set_int(0);
  for (int64_t d = 0; d < count; d += kLanes) bits = max_int(bits, bits_of(abs(load(q + d))));
  const int32_t most = reduce_max_int(bits);  // as bits, infinities and NaNs are the largest
  float amax;
  memcpy(&amax, &most, sizeof amax);
  const float inverse = 127.0f / amax;
  const bool finite = amax <= 3.4028235e38f, usable = finite && inverse <= 3.4028235e38f;
  for (int64_t d = 0; d < count; d += kLanes)
    store_bytes(row + d / kTileDepth * 2 * kTileBytes + d % kTileDepth,
                to_int(usable ? load(q + d) * set(inverse) : zero()));
  return !finite ? __builtin_nanf("") : usable ? amax / static_cast<float>(kKvMost) : 0.0f;
}

// split_weights(), to a row of the tiles of both halves.
inline float quantize_weights(const float* weights, int64_t count, int64_t padded, uint8_t* row, int64_t half_stride) {
  I sum = set_int(0);
  for (int64_t p = 0; p < padded; p += kLanes) {
    const I v = p < count ? to_int(load(weights + p) * set(static_cast<float>(kKvMost))) : set_int(0);
    sum += v;
    uint8_t* to = row + p / kTileDepth * kTileBytes + p % kTileDepth;
    store_bytes(to, v >> 7);
    store_bytes(to + half_stride, v & 127);
  }
  int32_t lanes[kLanes];
  store_int(lanes, sum);
  int64_t total = 0;
  for (int i = 0; i < kLanes; ++i) total += lanes[i];
  return static_cast<float>(total);
}

// products [32][32] += (or, at first, =) a of two groups of 16 rows, `a_stride` apart, times b of 32 columns.
inline void tile_step(const uint8_t* a, int64_t a_stride, const uint8_t* b, int64_t b_stride) {
  tile_load<4>(a, kTileRowBytes);
  tile_load<6>(b, b_stride);
  tile_load<7>(b + kTileRowBytes, b_stride);
  tile_load<5>(a + a_stride, kTileRowBytes);
  tile_dot_signed<0, 4, 6>();
  tile_dot_signed<1, 4, 7>();
  tile_dot_signed<2, 5, 6>();
  tile_dot_signed<3, 5, 7>();
}
inline void tiles_zero() { tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>(); }
inline void tiles_store(int32_t* to, int64_t stride) {
  tile_store<0>(to, stride * 4);
  tile_store<1>(to + kTileSide, stride * 4);
  tile_store<2>(to + kTileSide * stride, stride * 4);
  tile_store<3>(to + kTileSide * stride + kTileSide, stride * 4);
}

// Scores of all queries; those of rows beyond `count` are not written.
LORA_KERNELS_APART inline void tile_scores(const KvTileScratch& t, const uint8_t* keys, int64_t head_size,
                                           int64_t visible, const float* factors, int count) {
  const int64_t block_bytes = kKvBlockPositions * head_size, step_bytes = kTileSide * kKvBlockPositions * kKvStep;
  for (int64_t p = 0; p < visible; p += 32) {
    const uint8_t* k = keys + p / kKvBlockPositions * block_bytes + p % kKvBlockPositions * kKvStep;
    tiles_zero();
    for (int64_t d = 0; d < head_size; d += kTileDepth)
      tile_step(t.q_tiles + d / kTileDepth * 2 * kTileBytes, kTileBytes, k + d / kTileDepth * step_bytes,
                kKvBlockPositions * kKvStep);
    tiles_store(t.products, 32);
    for (int i = 0; i < count; ++i)
      for (int64_t j = 0; j < 32; j += kLanes)
        store(t.scores + i * t.score_stride + p + j,
              to_float(load_int(t.products + i * 32 + j)) * set(128.0f) * set(factors[i]));
  }
}

// sums of both halves of all weights times V.
LORA_KERNELS_APART inline void tile_values(const KvTileScratch& t, const uint8_t* values, int64_t capacity,
                                           int64_t head_size, int64_t visible) {
  const int64_t row_bytes = head_size * kKvStep, rows = kv_value_steps(capacity);
  const int64_t steps = round_up(visible, kTileDepth) / kTileDepth, whole = rows / kTileSide;
  if (whole < steps) {
    const int64_t left = rows - whole * kTileSide;
    memcpy(t.rest, values + whole * kTileSide * row_bytes, static_cast<size_t>(left * row_bytes));
    memset(t.rest + left * row_bytes, 0, static_cast<size_t>((kTileSide - left) * row_bytes));
  }
  const int64_t group_bytes = t.steps * kTileBytes;
  for (int64_t d = 0; d < head_size; d += 32)
    for (int half = 0; half < 2; ++half) {
      const uint8_t* a = t.weight_tiles + half * 2 * group_bytes;
      tiles_zero();
      for (int64_t step = 0; step < steps; ++step)
        tile_step(a + step * kTileBytes, group_bytes,
                  (step < whole ? values + step * kTileSide * row_bytes : t.rest) + d * kKvStep, row_bytes);
      tiles_store(t.sums + half * kTileQueries * head_size + d, head_size);
    }
}

// Tokens [first, first + count) of a row and a head.
inline void attend_tiles(const Step& s, const StepMemory& m, const KvTileScratch& t, int64_t row, int64_t head,
                         int64_t first, int count) {
  const KvAttentionStepProblem& p = s.p;
  const int64_t D = p.head_size, visible = s.visible(row, first), at = s.cache_row(row, 0) * p.heads + head;
  Query queries[kTileQueries];
  for (int i = 0; i < count; ++i) queries[i] = {row, first + i, visible, t.scores + i * t.score_stride, 0};
  load_queries<int8_t>(s, m, queries, count, head, s.args.k_scales + at * D, t.q);
  float factors[kTileQueries], inverses[kTileQueries] = {};
  for (int i = 0; i < count; ++i)
    factors[i] = quantize_query(t.q + i * D, D, t.q_tiles + i / kTileSide * kTileBytes + i % kTileSide * kTileRowBytes);
  tile_scores(t, static_cast<const uint8_t*>(s.args.k_cache) + at * kv_key_bytes(p.capacity, D), D, visible, factors,
              count);
  const int64_t group_bytes = t.steps * kTileBytes;
  for (int i = 0; i < count && visible > 0; ++i) {
    const float sum = exponentials(queries[i].scores, visible, [](int64_t) {});
    uint8_t* weights = t.weight_tiles + i / kTileSide * group_bytes + i % kTileSide * kTileRowBytes;
    const float total =
        quantize_weights(queries[i].scores, visible, round_up(visible, kTileDepth), weights, 2 * group_bytes);
    queries[i].inverse = 1.0f / sum, inverses[i] = sum == sum ? 1.0f / total : sum;
  }
  store_weights(s, queries, count, head);
  tile_values(t, static_cast<const uint8_t*>(s.args.v_cache) + at * kv_value_bytes(p.capacity, D), p.capacity, D,
              visible);
  for (int i = 0; i < count; ++i) {
    const int32_t *high = t.sums + i * D, *low = high + kTileQueries * D;
    for (int64_t d = 0; d < D; d += kLanes)
      store(t.acc + i * D + d, to_float(load_int(high + d)) * set(128.0f) + to_float(load_int(low + d)));
    queries[i].inverse = inverses[i];
  }
  store_results<int8_t>(s, m, queries, count, head, s.args.v_scales + at * D, t.acc);
}

inline void configure_tiles(const DeviceInfo& device, KvAttentionStepPlan* plan) {
  configure(device, plan);
  if (kv_takes_tiles(plan->problem)) plan->workspace = plan->tasks * KvTileScratch(nullptr, plan->problem).bytes;
}

inline void run_tiles(const KvAttentionStepPlan& plan, const KvAttentionStepArgs& args, const Executor& executor) {
  const KvAttentionStepProblem& p = plan.problem;
  if (!kv_takes_tiles(p)) return run_step(plan, args, executor);
  const Step s{plan, p, args};
  const StepMemory m(nullptr, p, 0);  // for its strides
  const int64_t groups = (p.tokens + kTileQueries - 1) / kTileQueries, units = p.rows * p.heads * groups;
  for_each_task(executor, plan.tasks, [&](int64_t task) {
    const int64_t bytes = KvTileScratch(nullptr, p).bytes;
    const KvTileScratch t(static_cast<char*>(args.workspace) + task * bytes, p);
    const TileRegisters registers;
    for (int64_t unit = units * task / plan.tasks; unit < units * (task + 1) / plan.tasks; ++unit) {
      const int64_t first = unit % groups * kTileQueries, left = p.tokens - first;
      attend_tiles(s, m, t, unit / groups / p.heads, unit / groups % p.heads, first,
                   static_cast<int>(left < kTileQueries ? left : kTileQueries));
    }
  });
}
