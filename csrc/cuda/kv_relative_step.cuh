// kv_relative_step: a chunk of a stream appended to its ring, and attention with relative positions over the frames
// before it and the chunk itself, in one launch.
//   s[i, f] = scale ((q[i, h] + u[h]) . K[f, h] + (q[i, h] + v[h]) . P[left + T - 1 - (n + i - f), h])
//   out[i, h] = sum_f softmax_f(s[i, f]) V[f, h]; f from n - min(left, n) to n + count - 1
//
// FLOPs: 6 rows T H D (left + T) of use, 8 rows 16 H D (left + T) made, since products by distance are made twice, and
// of sixteen queries however many there are. Bytes: rows H D (2 (left + T) cache + 4 T element) + H D (left + 2 T - 1)
// element, and P again from L2, twice per row. Parakeet's chunks (T 14, left 70) have 16 FLOPs of use and 24 made for
// each byte of fp16: bound by memory, by a factor of 8 on an A100's tensor cores. Predicted there, with 8 heads of 128
// channels: 33 us and 0.57 of the memory's peak for 64 streams, 12 us and 0.41 for 16, 7 us and 0.06 for one, whose
// eight blocks are launch and latency.
//
// A block has a head of one row and sixteen queries of its chunk; its four warps take every fourth tile of sixteen
// frames. Scores by content are the products of kv_attend.cuh. Scores by distance are sixteen queries times the 31 rows
// of P that a tile is away from them, plus one: query i and frame j of the tile meet in column 15 + j - i. They go
// through shared memory, in the place that the warp's sums take later, since that is another lane's register. What the
// warps have is added in their order (kv_result.cuh).
//
// Frames of the chunk are read from k and v, rounded as the ring rounds them, and the row's first block writes them to
// the ring beside it. These are the places of frames from n - capacity on, none of which anybody attends to, since
// capacity is at least left + T: nobody reads what somebody writes in the same launch, so one launch does for both, and
// blocks need no order. Rows of one call must have rings of their own.
//
// Lengths, counts and slots are read on the device, and never followed out of bounds: a row whose length is negative,
// whose count is not 0 to T, or whose slot is no ring is answered with NaN, and nothing is appended for it.
//
// Not measured: no GPU has run this.
#pragma once

#include "cuda/kv_products.cuh"
#include "cuda/kv_result.cuh"

namespace lora_kernels::cuda {

struct KvRelativeParams {
  const void *q = nullptr, *k = nullptr, *v = nullptr;                    // [rows, T, H, D]
  void *k_cache = nullptr, *v_cache = nullptr;                            // [S, H, C, D]
  const void *positions = nullptr, *bias_u = nullptr, *bias_v = nullptr;  // [left + 2 T - 1, H, D], [H, D] twice
  const int32_t *lengths = nullptr, *counts = nullptr, *slots = nullptr;  // [rows] each
  int tokens = 0, capacity = 0, cache_rows = 0, left = 0;
  float scale = 1;  // in units of log2
  bool aligned = false;
  KvResult result;
};

// One row of a call: what lengths, counts and slots say of it.
struct KvRelativeRow {
  bool valid = false;
  int past = 0, count = 0;  // frames before the chunk that are attended to, and frames of the chunk
  int ring = 0;             // which
  int begin = 0;            // place of the first frame attended to

  __device__ KvRelativeRow(const KvRelativeParams& p, int row) {
    const int n = p.lengths[row], c = p.counts ? p.counts[row] : p.tokens, slot = p.slots ? p.slots[row] : row;
    valid = n >= 0 && c >= 0 && c <= p.tokens && slot >= 0 && slot < p.cache_rows;
    if (!valid) return;
    past = min(p.left, n);
    count = c;
    ring = slot;
    begin = (n - past) % p.capacity;
  }
  __device__ int window() const { return count > 0 ? past + count : 0; }
  // Of frame j of the window: no more than left + T, so that it goes around once.
  __device__ int place(int j, int capacity) const { return begin + j < capacity ? begin + j : begin + j - capacity; }
};

// The queries of a block, as KvParts::finish asks for them.
class KvRelativeQueries {
 public:
  __device__ KvRelativeQueries(const KvRelativeRow& row, int first_query, int tokens, int first)
      : row_(row), query_(first_query + first), first_(first), count_(min(kKvQueries, tokens - first)) {}
  __device__ int count() const { return count_; }
  __device__ int query(int i) const { return query_ + i; }  // row * tokens + token
  __device__ bool there(int i) const { return i < count_ && first_ + i < row_.count; }
  __device__ int visible(int i) const { return !row_.valid ? -1 : there(i) ? row_.window() : 0; }

 private:
  const KvRelativeRow& row_;
  int query_, first_, count_;
};

// Grid (rows * H, chunks of queries). kGroups: of 64 channels.
template <class Q, class S, int kGroups>
class KvRelative {
  using T = KvProduct<Q, S>;
  static constexpr int kEights = 2 * kGroups;  // of a lane's depth
  // Whether K and V of a tile are on their way while something else is computed: as in KvAttend.
  static constexpr bool kAhead = kGroups * sizeof(T) < 8;
  // Loads that are not ahead must not be gathered ahead either: what unrolling lets a compiler do.
  static constexpr int kUnrolled = kAhead ? kEights : 1;

 public:
  __device__ explicit KvRelative(const KvRelativeParams& p)
      : p_(p),
        number_(static_cast<int>(blockIdx.x) / p.result.heads),
        head_(static_cast<int>(blockIdx.x) % p.result.heads),
        row_(p, number_),
        by_content_(shared_),
        by_distance_(shared_),
        parts_(shared_) {}

  __device__ void run() {
    if (blockIdx.y == 0) append();
    for (int first = static_cast<int>(blockIdx.y) * kKvQueries; first < p_.tokens;
         first += static_cast<int>(gridDim.y) * kKvQueries) {
      attend(first);
      __syncthreads();  // queries and sums are free again
    }
  }

 private:
  // Element 0 of this head in a frame of the chunk, in a frame of the ring.
  __device__ int64_t fresh(int token) const {
    return ((static_cast<int64_t>(number_) * p_.tokens + token) * p_.result.heads + head_) * p_.result.head_size;
  }
  __device__ int64_t cached(int j) const {
    return ((static_cast<int64_t>(row_.ring) * p_.result.heads + head_) * p_.capacity + row_.place(j, p_.capacity)) *
           p_.result.head_size;
  }

  __device__ void append() const {
    const int size = p_.result.head_size;
    for (int i = static_cast<int>(threadIdx.x); i < row_.count * size; i += kKvThreads) {
      const int64_t from = fresh(i / size) + i % size, to = cached(row_.past + i / size) + i % size;
      static_cast<S*>(p_.k_cache)[to] = from_float<S>(to_float(static_cast<const Q*>(p_.k)[from]));
      static_cast<S*>(p_.v_cache)[to] = from_float<S>(to_float(static_cast<const Q*>(p_.v)[from]));
    }
  }

  __device__ void attend(int first) {
    const KvRelativeQueries list(row_, number_ * p_.tokens, p_.tokens, first);
    load_queries(list, first);
    by_distance_.meet();  // and the queries by content with them
#pragma unroll
    for (int i = 0; i < 2; ++i) most_[i] = negative_infinity(), total_[i] = 0;
#pragma unroll
    for (int j = 0; j < 8 * kGroups; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) sums_[j][e] = 0;

    const int window = list.there(0) ? row_.window() : 0;
    for (int at = warp_ * kKvTile; at < window; at += kKvWarps * kKvTile) {
      load_ahead(at);
      // The row of P in which the last query meets the first frame of the tile.
      put_distances(p_.left + p_.tokens - 1 - row_.past + at - first - (kKvQueries - 1));
      float scores[2][4] = {};
      add_scores(at, scores);
      __syncwarp();  // scores by distance are there
      soften(at, window, scores);
      __syncwarp();  // and their place is free again
      add_values(at, scores);
    }
    parts_.store(most_, total_, sums_);
    __syncthreads();
    parts_.template finish<Q>(p_.result, list, head_, 0, [](int) { return 1.0f; });
  }

  // Queries g and g + 8 with either bias; those of frames that are not there are zero.
  __device__ void load_queries(const KvRelativeQueries& list, int first) {
    const int size = p_.result.head_size;
    const int64_t bias = static_cast<int64_t>(head_) * size;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool there = list.there(g_ + 8 * i);
      const Q* from = static_cast<const Q*>(p_.q) + fresh(there ? first + g_ + 8 * i : 0);
#pragma unroll
      for (int c = 0; c < kEights; ++c) {
        const int d = c * 32 + t_ * 8, end = there ? size : 0;
        const KvRaw<Q> q = load_eight<Q>(from, d, end, p_.aligned);
        const KvRaw<Q> u = load_eight<Q>(static_cast<const Q*>(p_.bias_u) + bias, d, end, p_.aligned);
        const KvRaw<Q> v = load_eight<Q>(static_cast<const Q*>(p_.bias_v) + bias, d, end, p_.aligned);
        by_content_.keep(i, c, eight_of<T>([&](int e) { return q.at(e) + u.at(e); }));
        by_distance_.keep(i, c, eight_of<T>([&](int e) { return q.at(e) + v.at(e); }));
      }
    }
  }

  // Channels of K or V of frame j of the window, zero where it has none.
  __device__ KvRaw<S> frame(const void* chunk, const void* cache, int j, int channel) const {
    const int size = j < row_.past + row_.count ? p_.result.head_size : 0, token = j - row_.past;
    if constexpr (std::is_same_v<Q, S>) {
      const S* from =
          token < 0 ? static_cast<const S*>(cache) + cached(j) : static_cast<const S*>(chunk) + fresh(token);
      return load_eight<S>(from, channel, size, p_.aligned);
    } else {
      if (token < 0) return load_eight<S>(static_cast<const S*>(cache) + cached(j), channel, size, p_.aligned);
      const KvRaw<Q> raw = load_eight<Q>(static_cast<const Q*>(chunk) + fresh(token), channel, size, p_.aligned);
      const KvEight<S> rounded = eight_of<S>([&](int e) { return raw.at(e); });
      KvRaw<S> result;
#pragma unroll
      for (int i = 0; i < KvRaw<S>::kWords; ++i) result.w[i] = rounded.w[i];
      return result;
    }
  }
  // K of frames at + g, at + 8 + g: operand n. V of frames at + 2 t, 2 t + 1, 8 + 2 t, 8 + 2 t + 1: operand i.
  __device__ KvRaw<S> load_key(int at, int n, int c) const {
    return frame(p_.k, p_.k_cache, at + 8 * n + g_, c * 32 + t_ * 8);
  }
  __device__ KvRaw<S> load_value(int at, int i, int c) const {
    return frame(p_.v, p_.v_cache, at + place_of(i / 2, i % 2), c * 64 + g_ * 8);
  }
  __device__ void load_ahead([[maybe_unused]] int at) {
    if constexpr (kAhead) {
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int c = 0; c < kEights; ++c) keys_[n][c] = load_key(at, n, c);
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int c = 0; c < kGroups; ++c) values_[i][c] = load_value(at, i, c);
    }
  }
  // Frame of score e of product n, counted from the tile.
  __device__ int place_of(int n, int e) const { return 8 * n + 2 * t_ + e % 2; }

  // All queries times rows `begin` to `begin + kKvDistances` of P, to shared memory. Rows that P does not have are met
  // by frames and queries that are not there.
  __device__ void put_distances(int begin) {
    const int rows = p_.left + 2 * p_.tokens - 1;
#pragma unroll
    for (int n = 0; n < kKvDistances / 8; ++n) {
      const int at = begin + 8 * n + g_;
      const bool there = at >= 0 && at < rows;
      const Q* from = static_cast<const Q*>(p_.positions) +
                      (static_cast<int64_t>(there ? at : 0) * p_.result.heads + head_) * p_.result.head_size;
      float scores[4] = {};
#pragma unroll kUnrolled
      for (int c = 0; c < kEights; ++c)
        kv_add_scores(
            scores, by_distance_, c,
            eight_of<T, Q>(load_eight<Q>(from, c * 32 + t_ * 8, there ? p_.result.head_size : 0, p_.aligned)));
#pragma unroll
      for (int e = 0; e < 4; ++e) parts_.sum(warp_, g_ + e / 2 * 8, 8 * n + 2 * t_ + e % 2) = scores[e];
    }
  }
  __device__ float distance_score(int query, int place) const {
    return __uint_as_float(read_shared(&parts_.sum(warp_, query, kKvQueries - 1 + place - query)));
  }

  __device__ void add_scores([[maybe_unused]] int at, float (&scores)[2][4]) const {
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll kUnrolled
      for (int c = 0; c < kEights; ++c) {
        KvRaw<S> raw;
        if constexpr (kAhead)
          raw = keys_[n][c];
        else
          raw = load_key(at, n, c);
        kv_add_scores(scores[n], by_content_, c, eight_of<T, S>(raw));
      }
  }

  // Scores to weights, and the sums so far to the new largest score. All queries see all frames of the window.
  __device__ void soften(int at, int window, float (&scores)[2][4]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float most = most_[i];
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& score = scores[n][2 * i + e];
          score = (score + distance_score(g_ + 8 * i, place_of(n, e))) * p_.scale;
          if (at + place_of(n, e) < window) most = fmaxf(most, score);
        }
      most = kv_group_max(most);
      const float share = kv_share(most_[i], most);
      most_[i] = most;
      total_[i] *= share;
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& score = scores[n][2 * i + e];
          score = at + place_of(n, e) < window ? exp2f(score - most) : 0.0f;
          total_[i] += score;
        }
#pragma unroll
      for (int j = 0; j < 8 * kGroups; ++j) sums_[j][2 * i] *= share, sums_[j][2 * i + 1] *= share;
    }
  }

  __device__ void add_values([[maybe_unused]] int at, const float (&weights)[2][4]) {
#pragma unroll
    for (int c = 0; c < kGroups; ++c) {
      KvEight<T> v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (kAhead)
          v[i] = eight_of<T, S>(values_[i][c]);
        else
          v[i] = eight_of<T, S>(load_value(at, i, c));
      }
      kv_add_values(sums_, c * 8, weights, v);
    }
  }

  const KvRelativeParams& p_;
  const int number_, head_;  // of the row and the head
  const KvRelativeRow row_;
  Shared shared_;
  KvQueries<T, kGroups> by_content_, by_distance_;
  KvParts<kKvQueries, kGroups> parts_;
  const int warp_ = static_cast<int>(threadIdx.x) / 32, g_ = static_cast<int>(threadIdx.x) % 32 / 4,
            t_ = static_cast<int>(threadIdx.x) % 4;
  KvRaw<S> keys_[2][kAhead ? kEights : 1], values_[4][kAhead ? kGroups : 1];
  float most_[2], total_[2];
  float sums_[8 * kGroups][4];
};

template <class Q, class S, int kGroups>
__global__ void __launch_bounds__(kKvThreads) kv_relative(const KvRelativeParams p) {
  if constexpr (kCompiled<KvProduct<Q, S>>) {
    let_next_kernel_start();
    wait_for_kernel_before();
    KvRelative<Q, S, kGroups>(p).run();
  }
}

}  // namespace lora_kernels::cuda
