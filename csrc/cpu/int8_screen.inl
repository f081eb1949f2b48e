// The choice over a vocabulary with most of its weight left unread: int8_lora_linear's top_k for a few rows.
//   A weight is w = 16 (u - 8) + l with a high nibble u and a low one l, both 0 to 15. The screen (int8_packing.h) has
//   u, four bits per weight, and of every channel n the mean c[n] and the standard deviation d[n] of its l. With
//   f = s_x s_w[n] an output y[n] = f sum_k q w + bias[n] is about
//     a[n] = f (16 sum_k q (u - 8) + c[n] sum_k q) + bias[n],  and it is off by  f sum_k q (l - c[n]).
// 1. Every block of the screen is read once, in order: a[n] and its upper bound b[n] = a[n] + e[n],
//      e[n] = kScreenDeviations |f| d[n] |q|   (|q| the Euclidean norm) + a few roundings of fp32.
// 2. The k columns of the largest a are computed from the packed weight. The smallest of these k outputs, t, is at most
//    the k-th largest of all. Whatever has b[n] >= t is computed from the packed weight and meets the list of the
//    largest; nothing else can. Where more than half of the vectors of a block have such a column the block is read as
//    a stream. So NaN, infinities, equal rows and an all too small t (fewer than k columns have a finite bias) need no
//    case of their own: b is infinite or t low, and all blocks are read as without a screen.
// Outputs are computed by the expression of int8_tile on the same integers: what is returned has the same bits. Which
// columns are computed depends neither on the number of tasks nor on the other rows.
//
// Why it is right. The largest output is missed only if its own error exceeds e: t is an exact output, so there is no
// difference of two errors here. Against t = the largest a[n] - e[n], as one pass over the screen alone gives it, the
// difference would count, and cost 5 to 30 times the candidates. For K <= 64 e is more than
// d |q| sqrt(K), which no error exceeds (Cauchy and Schwarz): the result is proven. For larger K the low nibbles are
// taken to be unrelated to q, independent and uniform, but in channels where int8_pack_screen finds that they go with
// the weight, whose spread is such that e is the proven bound again: then the error is beyond kScreenDeviations
// standard deviations with a probability of at most exp(-8 * 8 / 2) = 1.3e-14 (Chernoff; uniform values are strictly
// sub-Gaussian), and that of any of 51865 columns with at most 7e-10. Six deviations would give 8e-4 by the same bound,
// for half as many candidates. A weight made for it, with low nibbles of the signs of x and no correlation with its
// high ones, gets past it: use no screen where that matters.
//
// N K / 2 + 12 N bytes in place of N K + 8 N, 2 M N K operations, 4 M N bytes of scratch; bound by memory.
// Measured (one Zen 5 core with AVX-512 VNNI, random weights, all caches filled with other data before): one row of
// 51865 x 512 0.49 ms, without a screen 0.78, 28 GB/s, where the whole weight is read at 35; x 384 0.41 and
// 0.60. Four rows 0.60 and 0.84. A decoder step of Whisper base 1.43 ms and 1.71, two threads 1.18 and 1.67. A random
// vocabulary leaves 4 to 130 candidates, of which each costs K / 4 cache lines, and a hidden state that resembles a
// word leaves 1. Out of the second cache both take the same time.
constexpr int64_t kScreenRows = 4;
// Of the magnitudes that were added: more than the roundings on the way to y and to a.
constexpr float kScreenRounding = 0x1p-20f;

inline bool int8_screens(const Int8LoraLinearProblem& p) {
  return p.has_screen && p.top_k && !p.log_sum && !p.lora.present() && p.rows <= kScreenRows;
}

// What the approximation needs to know of a row of x.
struct ScreenedRow {
  float scale, sum, deviation;  // s_x, sum of q, kScreenDeviations |q|
  int32_t eight_sums;           // 8 times the sum of q
};

// Memory: of every task ...
struct ScreenScratch {
  int64_t stride, used;
  int8_t* q;  // [rows][stride], quantized rows as signed numbers
  ScreenedRow* rows;
  float* best;  // the list of the largest a
  ScreenScratch(float* memory, const Int8LoraLinearProblem& p) {
    stride = round_up(p.in_features, 64) + 64;  // as Int8Scratch has them
    q = reinterpret_cast<int8_t*>(memory);
    used = p.rows * stride / 4;
    rows = reinterpret_cast<ScreenedRow*>(memory + used);
    used += round_up(p.rows * static_cast<int64_t>(sizeof(ScreenedRow)) / 4, 16);
    best = memory + used;
    used += TopList::floats(p.top_k, false);
  }
};
// ... and of all of them.
struct ScreenShared {
  int64_t columns, list, used;
  float *lists, *bounds;  // [block_parts][rows] lists of the largest a, and b [rows][columns], in whole blocks
  ScreenShared(float* memory, const Int8LoraLinearProblem& p, const Int8Grid& grid) {
    columns = int8_blocks(p) * kInt8BlockChannels;
    list = TopList::floats(p.top_k, false);
    lists = memory;
    bounds = lists + grid.block_parts * p.rows * list;
    used = p.rows * (grid.block_parts * list + columns);
  }
};
inline int64_t int8_screen_floats(const Int8LoraLinearProblem& p, const Int8Grid& grid) {
  return ScreenScratch(nullptr, p).used * grid.block_parts + ScreenShared(nullptr, p, grid).used;
}

// ---------- First pass: all columns, from the screen

inline ScreenedRow screened_row(const uint8_t* q, float scale, int64_t depth, int8_t* as_signed) {
  int32_t sum = 0, squares = 0;  // at most 127 * 127 * 131072
  for (int64_t k = 0; k < depth; ++k) {
    const int32_t v = static_cast<int8_t>(kUnsignedActivations ? q[k] ^ 0x80 : q[k]);
    as_signed[k] = static_cast<int8_t>(v);
    sum += v, squares += v * v;
  }
  for (int64_t k = depth; k < round_up(depth, kScreenStepDepth); ++k) as_signed[k] = 0;
  const double most = __builtin_sqrt(static_cast<double>(depth));  // |error| <= d |q| sqrt(K)
  const double deviations = most < kScreenDeviations ? most : kScreenDeviations;
  const double deviation = deviations * __builtin_sqrt(static_cast<double>(squares)) * (1 + 0x1p-16);
  return {scale, static_cast<float>(sum), static_cast<float>(deviation), 8 * sum};
}

// sums[i][j] = q[i] . nibbles of vector j, over `steps` steps of eight k.
template <bool kStream, int MR, int NV>
LORA_KERNELS_APART void nibble_dots(const int8_t* q, int64_t q_stride, const uint8_t* w, int64_t steps, int32_t* sums) {
  I c[MR][NV];
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) c[i][j] = set_int(0);
  for (int64_t step = 0; step < steps; ++step, q += kScreenStepDepth, w += kBlockBytesPerStep) {
    if constexpr (kStream)
#pragma GCC unroll 4
      for (int j = 0; j < kBlockBytesPerStep; j += 64) prefetch(w + kStreamBytes + j);
    Nibbles b[NV];
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) b[j] = load_nibbles(w + j * sizeof(I));
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      int32_t eight[2];
      memcpy(eight, q + i * q_stride, sizeof eight);
      const I x = set_int(eight[0]), y = set_int(eight[1]);
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) nibble_dot_into(c[i][j], x, y, b[j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) store_int(sums + i * kInt8BlockChannels + j * kLanes, c[i][j]);
}

// The integer sums of one block, [rows][64].
inline void screen_block(const ScreenScratch& s, int64_t rows, const uint8_t* w, int64_t steps, int32_t* sums) {
  if (rows == 1) {
    for (int64_t c = 0; c < kInt8BlockChannels; c += kInt8RowVectors * kLanes)
      nibble_dots<true, 1, kInt8RowVectors>(s.q, s.stride, w + c * 4, steps, sums + c);
    return;
  }
  for (int64_t c = 0; c < kInt8BlockChannels; c += kInt8TileVectors * kLanes)
    for (int64_t i = 0; i < rows;) {
      const int64_t count = tile_rows(rows - i, kInt8TileRows);
      with_rows<kInt8TileRows>(count, [&](auto tag) {
        constexpr int kRows = decltype(tag)::value;
        if constexpr (kRows <= kScreenRows) {
          const auto dots = c == 0 && i == 0 ? nibble_dots<true, kRows, kInt8TileVectors>
                                             : nibble_dots<false, kRows, kInt8TileVectors>;
          dots(s.q + i * s.stride, s.stride, w + c * 4, steps, sums + i * kInt8BlockChannels + c);
        }
      });
      i += count;
    }
}

inline F bias_at(const Int8LoraLinearProblem& p, const Int8LoraLinearArgs& args, int64_t column) {
  F v = zero();
  if (p.has_bias) with_type(p.bias_dtype, args.bias, [&](auto* bias) { v = load_at(bias, column, p.out_features); });
  return v;
}

// a[n] and b[n] of one row's 64 sums. `of_block`: scales, centers and spreads.
inline void approximate(const ScreenedRow& row, const int32_t* sums, const float* of_block, const float* bias, float* a,
                        float* b) {
  const F infinity = set(__builtin_inff()), rounding = set(kScreenRounding);
  for (int64_t j = 0; j < kInt8BlockChannels; j += kLanes) {
    const F high = to_float((load_int(sums + j) - set_int(row.eight_sums)) << 4);
    const F low = load(of_block + kInt8BlockChannels + j) * set(row.sum);
    const F factor = set(row.scale) * load(of_block + j), product = (high + low) * factor, v = load(bias + j);
    const F off = set(row.deviation) * load(of_block + 2 * kInt8BlockChannels + j) + rounding * (abs(high) + abs(low));
    // A bias of minus infinity leaves b there; the minimum keeps its rounding from making that a NaN.
    const F most = product + v + off * abs(factor) + min(rounding * abs(v), set(3.0e38f));
    store(a + j, product + v);
    // What is not a number can be anything. So can a product beyond fp32: y may be on its near side.
    store(b + j, select((product - product) + most != (product - product) + most, infinity, most));
  }
}

// What both passes know of a task, which owns a range of blocks.
struct ScreenTask {
  const Int8LoraLinearProblem& p;
  const Int8LoraLinearArgs& args;
  Int8Task rows;  // as whose the rows are normalized and quantized
  ScreenScratch own;
  ScreenShared shared;
  float* lists;  // the results, [block_parts][rows]
  int64_t parts, part, first_block, last_block;

  ScreenTask(const Int8LoraLinearPlan& plan, const Int8LoraLinearArgs& args, const Int8Grid& grid, int64_t part,
             float* memory, float* lists)
      : p(plan.problem),
        args(args),
        rows{nullptr,
             {},
             int8_padded_depth(p.in_features) / kInt8StepDepth,
             Int8Scratch(memory, plan, grid),
             0,
             p.top_k,
             false,
             nullptr,
             nullptr,
             nullptr,
             nullptr,
             nullptr,
             0,
             {},
             {}},
        own(lists + grid.block_parts * p.rows * TopList::floats(p.top_k, false) + part * ScreenScratch(nullptr, p).used,
            p),
        shared(lists + grid.block_parts * (p.rows * TopList::floats(p.top_k, false) + ScreenScratch(nullptr, p).used),
               p, grid),
        lists(lists),
        parts(grid.block_parts),
        part(part),
        first_block(int8_blocks(p) * part / parts),
        last_block(int8_blocks(p) * (part + 1) / parts) {}

  TopList list(float* of, int64_t part, int64_t m) const {
    return {of + (part * p.rows + m) * shared.list, p.top_k, false};
  }
};

inline void screen_approximate(ScreenTask& t) {
  const Int8LoraLinearProblem& p = t.p;
  const int64_t block_bytes = int8_screen_block_bytes(p.in_features), steps = int8_screen_steps(p.in_features);
  ReadAhead ahead;
  ahead.add(t.args.screen + t.first_block * block_bytes, kFirstBytes);
  int64_t no_adapter = -1;
  int8_prepare(p, t.args, t.rows, 0, p.rows, &no_adapter, ahead);
  const Int8Scratch& s = t.rows.s;
  for (int64_t m = 0; m < p.rows; ++m) {
    t.own.rows[m] = screened_row(s.q + m * s.q_stride, s.scales[m], p.in_features, t.own.q + m * t.own.stride);
    t.list(t.shared.lists, t.part, m).clear();
  }
  alignas(64) int32_t sums[kScreenRows * kInt8BlockChannels];
  alignas(64) float bias[kInt8BlockChannels], a[kInt8BlockChannels];
  for (int64_t block = t.first_block; block < t.last_block; ++block) {
    const uint8_t* w = t.args.screen + block * block_bytes;
    const int64_t column = block * kInt8BlockChannels, left = p.out_features - column;
    screen_block(t.own, p.rows, w, steps, sums);
    const uint8_t* of_block = w + steps * kBlockBytesPerStep;  // its steps ask for as many bytes ahead as they have
    for (int64_t j = 0; j < block_bytes - steps * kBlockBytesPerStep; j += 64) prefetch(of_block + kStreamBytes + j);
    for (int64_t j = 0; j < kInt8BlockChannels; j += kLanes) store(bias + j, bias_at(p, t.args, column + j));
    for (int64_t m = 0; m < p.rows; ++m) {
      approximate(t.own.rows[m], sums + m * kInt8BlockChannels, reinterpret_cast<const float*>(of_block), bias, a,
                  t.shared.bounds + m * t.shared.columns + column);
      t.list(t.shared.lists, t.part, m).take(a, column, left < kInt8BlockChannels ? left : kInt8BlockChannels);
    }
  }
}

// ---------- Second pass: the few columns that are left, from the packed weight

inline const uint8_t* weights_at(const ScreenTask& t, int64_t column) {
  return t.args.packed_weight + column / kInt8BlockChannels * int8_block_bytes(t.p.in_features) +
         column % kInt8BlockChannels * kInt8StepDepth;
}

// The sums of one vector of channels, whose weights are 256 bytes apart, while those at `next` are fetched.
LORA_KERNELS_APART void sparse_dots(const int32_t* start, const uint8_t* q, const uint8_t* w, int64_t steps,
                                    const uint8_t* next, int32_t* sums) {
  I c = kUnsignedActivations ? load_int(start) : set_int(0);
  for (int64_t step = 0; step < steps; ++step, w += kBlockBytesPerStep, next += kBlockBytesPerStep) {
    prefetch(next);
    int32_t four;
    memcpy(&four, q + step * kInt8StepDepth, sizeof four);
    int8_dot_into(c, set_int(four), load_weights(w));
  }
  store_int(sums, c);
}

// Outputs of row m: the vectors from `column` on, of one block. One of them, or all in a stream.
inline void exact_outputs(const ScreenTask& t, int64_t m, int64_t column, bool stream, const uint8_t* next, float* y) {
  const Int8Scratch& s = t.rows.s;
  const int64_t c = column % kInt8BlockChannels, steps = t.rows.steps;
  const uint8_t *q = s.q + m * s.q_stride, *w = weights_at(t, column);
  const float* scales = reinterpret_cast<const float*>(w - c * kInt8StepDepth + steps * kBlockBytesPerStep) + c;
  const int32_t* start = reinterpret_cast<const int32_t*>(scales + kInt8BlockChannels);
  alignas(64) int32_t products[kInt8BlockChannels];
  if (stream)
    for (int64_t j = 0; j < kInt8BlockChannels; j += kInt8RowVectors * kLanes)
      int8_dots<Ahead::kStream, 1, kInt8RowVectors>(start + j, q, s.q_stride, w + j * kInt8StepDepth, steps, {},
                                                    products + j);
  else
    sparse_dots(start, q, w, steps, next, products);
  for (int64_t j = 0; j < (stream ? kInt8BlockChannels : kLanes); j += kLanes) {
    const F scale = load(scales + j), bias = bias_at(t.p, t.args, column + j);
    store(y + j, to_float(load_int(products + j)) * (set(s.scales[m]) * scale) + bias);  // as in int8_tile
  }
}

// The smallest output of the k columns with the largest a.
inline float screen_threshold(const ScreenTask& t, int64_t m) {
  TopList best(t.own.best, t.p.top_k, false);
  best.clear();
  for (int64_t part = 0; part < t.parts; ++part) best.merge(t.list(t.shared.lists, part, m));
  float least = __builtin_inff();
  alignas(64) float y[kInt8BlockChannels];
  for (int64_t i = 0; i < t.p.top_k; ++i) {
    const int64_t column = best.columns[i], lane = column % kLanes;
    exact_outputs(t, m, column - lane, false, weights_at(t, column - lane), y);
    if (y[lane] < least) least = y[lane];  // a NaN counts as infinity
  }
  return least;
}

inline void screen_choose(const ScreenTask& t) {
  const int64_t N = t.p.out_features;
  alignas(64) float y[kInt8BlockChannels];
  for (int64_t m = 0; m < t.p.rows; ++m) {
    TopList list = t.list(t.lists, t.part, m);
    list.clear();
    const float least = screen_threshold(t, m);
    int64_t pending = -1;  // a vector whose weights are being fetched
    // Vectors meet the list in the order of their columns: of equal outputs the first is kept.
    const auto settle = [&](const uint8_t* next) {
      if (pending < 0) return;
      exact_outputs(t, m, pending, false, next ? next : weights_at(t, pending), y);
      list.take(y, pending, N - pending < kLanes ? N - pending : kLanes);
      pending = -1;
    };
    for (int64_t block = t.first_block; block < t.last_block; ++block) {
      const int64_t column = block * kInt8BlockChannels, left = N - column;
      const float* b = t.shared.bounds + m * t.shared.columns + column;
      F most = load(b);
      for (int64_t j = kLanes; j < kInt8BlockChannels; j += kLanes) most = max(most, load(b + j));
      if (reduce_max(most) < least) continue;
      int64_t vectors[kInt8BlockChannels / kLanes], count = 0;
      for (int64_t j = 0; j < kInt8BlockChannels && j < left; j += kLanes)
        if (!(reduce_max(load(b + j)) < least)) vectors[count++] = column + j;
      if (2 * count * kLanes > kInt8BlockChannels) {
        settle(nullptr);
        exact_outputs(t, m, column, true, nullptr, y);
        list.take(y, column, left < kInt8BlockChannels ? left : kInt8BlockChannels);
        continue;
      }
      for (int64_t i = 0; i < count; ++i) {
        settle(weights_at(t, vectors[i]));
        pending = vectors[i];
      }
    }
    settle(nullptr);
  }
}

// Fills the lists that int8_run_task fills without a screen.
inline void int8_run_screened(const Int8LoraLinearPlan& plan, const Int8LoraLinearArgs& args, const Int8Grid& grid,
                              float* memory, float* lists, const Executor& executor) {
  const int64_t scratch = Int8Scratch(nullptr, plan, grid).used;
  const auto task = [&](int64_t part) { return ScreenTask(plan, args, grid, part, memory + part * scratch, lists); };
  for_each_task(executor, grid.block_parts, [&](int64_t part) {
    ScreenTask t = task(part);
    screen_approximate(t);
  });
  for_each_task(executor, grid.block_parts, [&](int64_t part) { screen_choose(task(part)); });
}
