// kv_attention_step over caches in the order of positions: floating point, or INT8 with scales.
//   out[i, t, h] = sum_p softmax_p(scale q[i, t, h] . K[p, h]) V[p, h], the new tokens' k and v appended beside it.
//   FLOPs 64 per element of K and V (products of sixteen queries, however many there are), 4 of use per query; bytes
//   2 D * element size per cache row, head and position: bound by memory, by a factor of 8 on tensor cores.
//
// A block has a head of one cache row (or of one row of q), up to sixteen queries, and a part of the positions; its
// four warps take every fourth tile of sixteen positions. K streams from memory into the registers of the products
// scores = q K, scores become weights where they are, and these are the operand of sums += weights V, whose V streams
// in while the scores are made. What the four warps have is added in their order (kv_result.cuh). Softmax is that of
// online attention: sums are scaled anew where a larger score turns up.
//
// New tokens (fused) are read from k and v, by this block and by others whose rows name their places, and written to
// the cache beside it: nobody reads what somebody writes in the same launch, so one launch does for both.
//
// V of a position that only some queries see reaches the others as zero, whatever it holds: where a tile has such
// positions its queries are multiplied one by one. Weights are rounded to the type of the products, as in
// FlashAttention; with INT8 caches scaled K stays exact, V with a scale per position is rounded to that type.
//
// It may start before the kernel before it has finished, and waits for it before it loads anything; then warps ask for
// K and V some tiles ahead to come to L2, so that few blocks keep memory busy.
//
// Not measured: no GPU has run this.
#pragma once

#include "cuda/kv_exchange.cuh"
#include "cuda/kv_products.cuh"

namespace lora_kernels::cuda {

struct KvAttendParams {
  KvRows rows;
  const void* q = nullptr;                      // [rows, T, H, D]
  const void *k = nullptr, *v = nullptr;        // fused: the new tokens, as q; else null
  void *k_cache = nullptr, *v_cache = nullptr;  // [S, H, C, D]
  const float *k_scales = nullptr, *v_scales = nullptr;
  KvScales scales = KvScales::kNone;
  float scale = 1;  // in units of log2
  bool grouped = false, aligned = false;
  int ask = 0;              // for so many tiles of a warp ahead
  int split_positions = 0;  // of a block
  KvResult result;
  KvWeights weights;
};

// Grid (units * H * splits, chunks of queries), all splits in one cluster or none. kGroups: of 64 channels. kPlaces:
// positions are looked up.
template <class Q, class S, int kGroups, bool kPlaces>
class KvAttend {
  using T = KvProduct<Q, S>;
  static constexpr int kEights = 2 * kGroups;  // of a lane's depth
  static constexpr bool kInt8 = std::is_same_v<S, int8_t>;
  // Whether K and V of a tile wait in registers while something else is computed: beside the sums there is no room for
  // both halves of them in products of 32 bits.
  static constexpr bool kAhead = kGroups * sizeof(T) < 8;

 public:
  __device__ explicit KvAttend(const KvAttendParams& p)
      : p_(p),
        list_memory_(shared_.take<int>(kKvListWords)),
        places_(shared_.take<int>(kPlaces ? p.split_positions : 0)),
        queries_(shared_),
        parts_(shared_),
        exchange_(shared_, p.result) {
    const int heads = p.result.heads, block = static_cast<int>(blockIdx.x);
    split_ = block % p.result.splits;
    head_ = block / p.result.splits % heads;
    unit_ = block / p.result.splits / heads;
  }

  __device__ void run() {
    int first = static_cast<int>(blockIdx.y) * kKvQueries;
    while (true) {
      const KvQueryList list(p_.rows, p_.grouped, unit_, first, kKvQueries, list_memory_);
      if (list.count() > 0) attend(list, first);
      first += static_cast<int>(gridDim.y) * kKvQueries;
      if (first >= list.total()) return;
      __syncthreads();  // the list and the sums are free again
    }
  }

 private:
  __device__ void attend(const KvQueryList& list, int first) {
    exchange_.expect(list.count());
    const int row = list.query(0) / p_.rows.tokens;
    const int begin = split_ * p_.split_positions, end = min(begin + p_.split_positions, list.longest());
    begin_ = begin;
    end_ = end;
    const int cache_row = p_.grouped ? unit_ : kPlaces ? 0 : max(0, p_.rows.cache_row(row));
    vector_ = (static_cast<int64_t>(cache_row) * p_.result.heads + head_) * p_.rows.capacity;
    if constexpr (kPlaces) {
      find_places(p_.rows, p_.k != nullptr, row, begin, end, places_, list_memory_ + 2 * kKvQueries);
      if (p_.k && split_ == 0) append(row);
      __syncthreads();
    }
    constexpr int kStride = kKvWarps * kKvTile;
    for (int i = 0; i < p_.ask; ++i) ask(begin + warp_ * kKvTile + i * kStride);
    load_queries(list);
    queries_.meet();
#pragma unroll
    for (int i = 0; i < 2; ++i) most_[i] = negative_infinity(), total_[i] = 0;
#pragma unroll
    for (int j = 0; j < 8 * kGroups; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) sums_[j][e] = 0;

    int at = begin + warp_ * kKvTile;
    load_keys(at);
    for (; at < end; at += kStride) {
      if (p_.ask) ask(at + p_.ask * kStride);
      load_values(at);
      float scores[2][4] = {};
      add_scores(at, scores);
      load_keys(at + kStride);
      soften(list, at, scores);
      if (at + kKvTile <= list.shortest()) {
        add_values(at, scores);
      } else {
#pragma unroll 1
        for (int i = 0; i < list.count(); ++i) add_values_of(i, list.visible(i) - at, at, scores);
      }
    }
    parts_.store(most_, total_, sums_);
    __syncthreads();
    const bool channels = kInt8 && p_.scales == KvScales::kPerChannel;
    const int64_t at_channel = channels ? vector_ / p_.rows.capacity * p_.result.head_size : 0;
    const auto scale_of_channel = [&](int d) { return channels ? kv_usable(p_.v_scales[at_channel + d]) : 1.0f; };
    exchange_.template finish<Q>(parts_, list, first, head_, split_, scale_of_channel);
  }

  // The vector of a position, in k or v or in the cache; null: nowhere.
  __device__ const void* vector_of(int position, const void* cache, const void* fresh) const {
    const int64_t size = p_.result.head_size;
    if constexpr (kPlaces) {
      const int place = places_[position - begin_];
      if (place == kKvNowhere) return nullptr;
      if (place < 0)
        return static_cast<const Q*>(fresh) + ((-2 - static_cast<int64_t>(place)) * p_.result.heads + head_) * size;
      return static_cast<const S*>(cache) + (scale_at(place) + position) * size;
    }
    return static_cast<const S*>(cache) + (vector_ + position) * size;
  }
  __device__ int64_t scale_at(int cache_row) const {
    return (static_cast<int64_t>(cache_row) * p_.result.heads + head_) * p_.rows.capacity;
  }

  // K and V of a tile to L2, a vector by each lane: registers hold one tile, with which few blocks leave memory idle.
  __device__ void ask(int at) const {
    static_assert(kKvTile == 16, "half of the lanes for each");
    const int lane = static_cast<int>(threadIdx.x) % 32, position = at + lane % 16;
    const void* from = nullptr;
    if (position < end_)
      from = lane < 16 ? vector_of(position, p_.k_cache, p_.k) : vector_of(position, p_.v_cache, p_.v);
    if (from) prefetch(from, p_.result.head_size * static_cast<int>(sizeof(S)), 0, 1);
  }

  // This row's new tokens, of which nobody reads the copies now.
  __device__ void append(int row) const {
    const int length = p_.rows.length(row), size = p_.result.head_size;
    if (length < 0) return;
    for (int i = static_cast<int>(threadIdx.x); i < p_.rows.tokens * size; i += kKvThreads) {
      const int token = i / size, d = i % size, cache_row = p_.rows.cache_row(row, length + token);
      if (cache_row < 0) continue;
      const int64_t from = ((static_cast<int64_t>(row) * p_.rows.tokens + token) * p_.result.heads + head_) * size + d;
      const int64_t to = (scale_at(cache_row) + length + token) * size + d;
      if constexpr (std::is_same_v<Q, S>) {
        static_cast<S*>(p_.k_cache)[to] = static_cast<const Q*>(p_.k)[from];
        static_cast<S*>(p_.v_cache)[to] = static_cast<const Q*>(p_.v)[from];
      }
    }
  }

  // Queries g and g + 8. With scales per channel they are brought to magnitudes up to 1, since fp16 ends early below;
  // a scale that nobody has filled, or that is not finite, makes NaN.
  __device__ void load_queries(const KvQueryList& list) {
    const int size = p_.result.head_size;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int n = g_ + 8 * i;
      factor_[i] = p_.scale;
      const int64_t query = n < list.count() ? list.query(n) : -1;
      const Q* from = static_cast<const Q*>(p_.q) + (query < 0 ? 0 : query * p_.result.heads + head_) * size;
      KvRaw<Q> raw[kEights];
#pragma unroll
      for (int c = 0; c < kEights; ++c) raw[c] = load_eight<Q>(from, c * 32 + t_ * 8, query < 0 ? 0 : size, p_.aligned);
      if (kInt8 && p_.scales == KvScales::kPerChannel) {
        const float* scales = p_.k_scales + vector_ / p_.rows.capacity * size;
        float most = 0;
        const auto scaled = [&](int c, int e) {
          const int d = c * 32 + t_ * 8 + e;
          return d < size ? raw[c].at(e) * kv_usable(scales[d]) : 0.0f;
        };
#pragma unroll
        for (int c = 0; c < kEights; ++c)
#pragma unroll
          for (int e = 0; e < 8; ++e) most = fmaxf(most, fabsf(scaled(c, e)));
        most = kv_group_max(most);
        const float inverse = 1.0f / most;
        const bool fits = inverse <= 3.4028235e38f && inverse > 0;
        if (fits) factor_[i] *= most;
#pragma unroll
        for (int c = 0; c < kEights; ++c)
          queries_.keep(i, c, eight_of<T>([&](int e) { return fits ? scaled(c, e) * inverse : scaled(c, e); }));
      } else {
#pragma unroll
        for (int c = 0; c < kEights; ++c) queries_.keep(i, c, eight_of<T, Q>(raw[c]));
      }
    }
  }

  // K of positions at + g and at + 8 + g.
  __device__ void load_keys(int at) {
    if constexpr (kAhead)
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int c = 0; c < kEights; ++c) keys_[n][c] = load_key(at, n, c);
  }
  __device__ KvRaw<S> load_key(int at, int n, int c) const {
    const int position = at + 8 * n + g_;
    const void* from = position < end_ ? vector_of(position, p_.k_cache, p_.k) : nullptr;
    return load_eight<S>(from, c * 32 + t_ * 8, from ? p_.result.head_size : 0, p_.aligned);
  }

  __device__ void add_scores([[maybe_unused]] int at, float (&scores)[2][4]) const {
    // Loads that are not ahead must not be gathered ahead either: what unrolling lets a compiler do.
    [[maybe_unused]] constexpr int kUnrolled = kAhead ? kEights : 1;
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll kUnrolled
      for (int c = 0; c < kEights; ++c) {
        KvRaw<S> raw;
        if constexpr (kAhead)
          raw = keys_[n][c];
        else
          raw = load_key(at, n, c);
        kv_add_scores(scores[n], queries_, c, eight_of<T, S>(raw));
      }
  }

  // Position of score e of product n, and of operand i of V: 2 t, 2 t + 1 of each eight.
  __device__ int place_of(int n, int e) const { return 8 * n + 2 * t_ + e % 2; }

  // V of positions at + 2 t, 2 t + 1, 8 + 2 t, 8 + 2 t + 1.
  __device__ void load_values(int at) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (kInt8 && p_.scales == KvScales::kPerPosition) {
        const int position = at + place_of(i / 2, i % 2);
        const bool there = position < end_ && vector_of(position, p_.v_cache, p_.v);
        v_scale_[i] = there ? scale_of(p_.v_scales, position) : 0.0f;
      }
      if constexpr (kAhead)
#pragma unroll
        for (int c = 0; c < kGroups; ++c) values_[i][c] = load_value(at, i, c);
    }
  }
  __device__ KvRaw<S> load_value(int at, int i, int c) const {
    const int position = at + place_of(i / 2, i % 2);
    const void* from = position < end_ ? vector_of(position, p_.v_cache, p_.v) : nullptr;
    return load_eight<S>(from, c * 64 + g_ * 8, from ? p_.result.head_size : 0, p_.aligned);
  }
  __device__ KvEight<T> value_of([[maybe_unused]] int at, int i, int c) const {
    const float factor = kInt8 && p_.scales == KvScales::kPerPosition ? v_scale_[i] : 1.0f;
    if constexpr (kAhead)
      return eight_of<T, S>(values_[i][c], factor);
    else
      return eight_of<T, S>(load_value(at, i, c), factor);
  }
  __device__ float scale_of(const float* scales, int position) const {
    if constexpr (kPlaces) return scales[scale_at(places_[position - begin_]) + position];
    return scales[vector_ + position];
  }

  // Scores to weights, and the sums so far to the new largest score.
  __device__ void soften(const KvQueryList& list, int at, float (&scores)[2][4]) {
    const bool per_position = kInt8 && p_.scales == KvScales::kPerPosition;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int query = g_ + 8 * i, visible = query < list.count() ? list.visible(query) : 0;
      float most = most_[i];
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& score = scores[n][2 * i + e];
          const int position = at + place_of(n, e);
          bool nowhere = false;
          if constexpr (kPlaces) nowhere = position < visible && places_[position - begin_] == kKvNowhere;
          score = nowhere ? not_a_number() : score * factor_[i];
          if (per_position && position < visible && !nowhere) score *= scale_of(p_.k_scales, position);
          if (position < visible) {
            most = fmaxf(most, score);
            if (p_.weights.data) p_.weights.store_score(p_.rows, list.query(query), head_, position, score);
          }
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
          score = at + place_of(n, e) < visible ? exp2f(score - most) : 0.0f;
          total_[i] += score;
        }
#pragma unroll
      for (int j = 0; j < 8 * kGroups; ++j) sums_[j][2 * i] *= share, sums_[j][2 * i + 1] *= share;
    }
  }

  __device__ void add_values(int at, const float (&weights)[2][4]) {
#pragma unroll
    for (int c = 0; c < kGroups; ++c) {
      KvEight<T> v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] = value_of(at, i, c);
      kv_add_values(sums_, c * 8, weights, v);
    }
  }

  // The same for query `only` alone, which sees the first `visible` positions of the tile. Its sums are the same bits
  // then: a row of a product does not depend on the others, but a zero weight would not keep NaN from them.
  __device__ void add_values_of(int only, int visible, int at, const float (&weights)[2][4]) {
#pragma unroll
    for (int c = 0; c < kGroups; ++c) {
      KvEight<T> v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool seen = place_of(i / 2, i % 2) < visible;
        v[i] = value_of(at, i, c);
#pragma unroll
        for (int w = 0; w < KvEight<T>::kWords; ++w) v[i].w[w] = seen ? v[i].w[w] : 0;
      }
      float kept[8][4];
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) kept[j][e] = sums_[c * 8 + j][e];
      kv_add_values(sums_, c * 8, weights, v);
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (g_ + 8 * (e / 2) != only) sums_[c * 8 + j][e] = kept[j][e];
    }
  }

  const KvAttendParams& p_;
  Shared shared_;
  int *list_memory_, *places_;
  KvQueries<T, kGroups> queries_;
  KvParts<kKvQueries, kGroups> parts_;
  KvExchange<kKvQueries, kGroups, kv_shares(kGroups, false) && kArch >= 90> exchange_;
  const int warp_ = static_cast<int>(threadIdx.x) / 32, g_ = static_cast<int>(threadIdx.x) % 32 / 4,
            t_ = static_cast<int>(threadIdx.x) % 4;
  int split_ = 0, head_ = 0, unit_ = 0, begin_ = 0, end_ = 0;
  int64_t vector_ = 0;  // the first position of this head in its cache row
  KvRaw<S> keys_[2][kAhead ? kEights : 1], values_[4][kAhead ? kGroups : 1];
  float v_scale_[4] = {}, factor_[2], most_[2], total_[2];
  float sums_[8 * kGroups][4];
};

template <class Q, class S, int kGroups, bool kPlaces>
__global__ void __launch_bounds__(kKvThreads, kGroups == 1 && sizeof(KvProduct<Q, S>) == 2 ? 3 : 1)
    kv_attend(const KvAttendParams p) {
  if constexpr (kCompiled<KvProduct<Q, S>>) {
    let_next_kernel_start();
    wait_for_kernel_before();
    KvAttend<Q, S, kGroups, kPlaces>(p).run();
  }
}

}  // namespace lora_kernels::cuda
