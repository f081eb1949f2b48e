// What becomes of the sums of a block's warps, and of the parts into which positions were split.
//
//   merged    m = max_w m_w; sum = sum_w 2^(m_w - m) sum_w; total likewise: in the order of the warps
//   combined  the same over the splits, in their order: by blocks of a cluster (kv_exchange.cuh), or by way of memory
//             and kv_combine
//   out       sum / total; 0 where nothing is visible, NaN for a row that is not valid
//   weights   2^(score - max) / sum over the visible positions, 0 behind them
//
// Scores are kept in units of log2, which saves a product for each exponential. Bytes of a split without a cluster:
// 4 (D + 2) for each query and head, written and read once.
//
// Not measured: no GPU has run this.
#pragma once

#include "cuda/kv_rows.cuh"
#include "cuda/numbers.h"
#include "cuda/primitives/launch.h"

namespace lora_kernels::cuda {

constexpr float kLog2OfE = 1.44269504f;

// What sums beside the largest score `most` are worth beside `all`; also where both are minus infinity.
__device__ inline float kv_share(float most, float all) { return most == all ? 1.0f : exp2f(most - all); }

// A channel of a query, from several parts of its positions, whose largest score is set first.
struct KvSum {
  float most = negative_infinity(), total = 0, sum = 0;

  __device__ void add(float part_most, float part_total, float part_sum) {
    const float share = kv_share(part_most, most);
    total += share * part_total;
    sum += share * part_sum;
  }
};

struct KvResult {
  void* out = nullptr;     // [rows, T, H, D]
  float* parts = nullptr;  // [splits, rows, T, H, D] if there are several, not of one cluster
  float* stats = nullptr;  // [splits, rows, T, H, 2]: largest score, total
  int splits = 1, cluster = 1, heads = 0, head_size = 0;
  int64_t vectors = 0;  // rows * T * H

  // Channel d of `vector`, of all positions, to out.
  template <class Q>
  __device__ void store(const KvSum& s, int visible, int64_t vector, int d) const {
    const float v = visible < 0 ? not_a_number() : visible == 0 ? 0.0f : s.sum / s.total;
    static_cast<Q*>(out)[vector * head_size + d] = from_float<Q>(v);
  }
};

// Weights of chosen heads. Attention leaves scores there, which kv_weights turns into weights.
struct KvWeights {
  float* data = nullptr;  // [rows, count, T, C], or null
  int count = 0;
  int16_t heads[kKvMostWeightHeads];

  __device__ void store_score(const KvRows& rows, int query, int head, int position, float score) const {
    for (int w = 0; w < count; ++w)
      if (heads[w] == head) row_of(rows, query, w)[position] = score;
  }
  __device__ float* row_of(const KvRows& rows, int query, int w) const {
    const int64_t row = query / rows.tokens, token = query % rows.tokens;
    return data + ((row * count + w) * rows.tokens + token) * rows.capacity;
  }
};

// A scale per channel that nobody has filled, or that is not finite, makes NaN: a CPU refuses it.
__device__ inline float kv_usable(float scale) { return scale > 0 && scale <= 3.4028235e38f ? scale : not_a_number(); }

// The largest of a query's scores among the lanes t of its group, and the sum of what they have.
__device__ inline float kv_group_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ inline float kv_group_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// The sums of the warps in shared memory.
template <int kQueries, int kGroups>
struct KvParts {
  static constexpr int kStride = kv_part_stride(kGroups);
  float *sums, *most, *total;  // [warps, queries, stride], [warps, queries] twice

  __device__ explicit KvParts(Shared& shared)
      : sums(shared.take<float>(kKvWarps * kQueries * kStride)),
        most(shared.take<float>(kKvWarps * kQueries)),
        total(shared.take<float>(kKvWarps * kQueries)) {}
  __device__ float& sum(int warp, int query, int channel) const {
    return sums[(warp * kQueries + query) * kStride + channel];
  }

  // What a lane's products of sixteen queries have: queries g and g + 8; channel 64 c + 8 n + j of 64 c on is column n
  // of product j.
  __device__ void store(const float (&most_of)[2], const float (&total_of)[2],
                        const float (&sums_of)[8 * kGroups][4]) const {
    static_assert(kQueries == kKvQueries, "the rows of one product");
    const int warp = static_cast<int>(threadIdx.x) / 32, g = static_cast<int>(threadIdx.x) % 32 / 4,
              t = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int query = g + 8 * i;
      const float whole = kv_group_sum(total_of[i]);
      if (t == 0) {
        most[warp * kKvQueries + query] = most_of[i];
        total[warp * kKvQueries + query] = whole;
      }
#pragma unroll
      for (int j = 0; j < 8 * kGroups; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) sum(warp, query, j / 8 * 64 + (2 * t + e) * 8 + j % 8) = sums_of[j][2 * i + e];
    }
  }

  // After a barrier behind the sums: channel d of a query, of all warps in their order.
  __device__ KvSum whole(int query, int d) const {
    KvSum all;
    for (int w = 0; w < kKvWarps; ++w) all.most = fmaxf(all.most, most[w * kQueries + query]);
    for (int w = 0; w < kKvWarps; ++w)
      all.add(most[w * kQueries + query], total[w * kQueries + query], sum(w, query, d));
    return all;
  }

  // The same of all queries, to out or to memory. `list`: a KvQueryList, or what has its count(), query() and
  // visible(). `channel_scale(d)`: of V.
  template <class Q, class List, class ChannelScale>
  __device__ void finish(const KvResult& r, const List& list, int head, int split,
                         const ChannelScale& channel_scale) const {
    for (int i = static_cast<int>(threadIdx.x); i < list.count() * r.head_size; i += kKvThreads) {
      const int query = i / r.head_size, d = i % r.head_size;
      KvSum all = whole(query, d);
      all.sum *= channel_scale(d);
      const int64_t vector = static_cast<int64_t>(list.query(query)) * r.heads + head;
      if (r.splits == 1) {
        r.template store<Q>(all, list.visible(query), vector, d);
        continue;
      }
      r.parts[(split * r.vectors + vector) * r.head_size + d] = all.sum;
      if (d == 0) {
        r.stats[(split * r.vectors + vector) * 2] = all.most;
        r.stats[(split * r.vectors + vector) * 2 + 1] = all.total;
      }
    }
  }
};

struct KvCombineParams {
  KvRows rows;
  KvResult result;
};

// A thread for each element.
template <class Q>
__global__ void __launch_bounds__(kKvFinishThreads) kv_combine(const KvCombineParams p) {
  let_next_kernel_start();
  wait_for_kernel_before();
  const KvResult& r = p.result;
  const int64_t i = int64_t{blockIdx.x} * kKvFinishThreads + threadIdx.x;
  if (i >= r.vectors * r.head_size) return;
  const int64_t vector = i / r.head_size;
  const int query = static_cast<int>(vector / r.heads);
  const int visible = p.rows.visible(query / p.rows.tokens, query % p.rows.tokens);
  KvSum sum;
  if (visible > 0) {
    const auto stats = [&](int s) { return r.stats + (s * r.vectors + vector) * 2; };
    for (int s = 0; s < r.splits; ++s) sum.most = fmaxf(sum.most, stats(s)[0]);
    for (int s = 0; s < r.splits; ++s) sum.add(stats(s)[0], stats(s)[1], r.parts[s * r.vectors * r.head_size + i]);
  }
  r.template store<Q>(sum, visible, vector, static_cast<int>(i % r.head_size));
}

struct KvWeightsParams {
  KvRows rows;
  KvWeights weights;
};

// Grid (rows * T, weight heads). W is float.
template <class W>
__global__ void __launch_bounds__(kKvFinishThreads) kv_weights(const KvWeightsParams p) {
  let_next_kernel_start();
  wait_for_kernel_before();
  Shared shared;
  constexpr int kWarps = kKvFinishThreads / 32;
  float* memory = shared.take<float>(2 * kWarps);
  const int query = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  const int visible = p.rows.visible(query / p.rows.tokens, query % p.rows.tokens);
  W* row = p.weights.row_of(p.rows, query, static_cast<int>(blockIdx.y));
  float most = negative_infinity(), sum = 0;
  for (int i = thread; i < visible; i += kKvFinishThreads) most = fmaxf(most, row[i]);
  for (int by = 16; by > 0; by /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, by));
  if (thread % 32 == 0) memory[thread / 32] = most;
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) most = fmaxf(most, memory[w]);
  for (int i = thread; i < visible; i += kKvFinishThreads) sum += row[i] = exp2f(row[i] - most);
  for (int by = 16; by > 0; by /= 2) sum += __shfl_xor_sync(~0u, sum, by);
  if (thread % 32 == 0) memory[kWarps + thread / 32] = sum;
  __syncthreads();
  sum = 0;
  for (int w = 0; w < kWarps; ++w) sum += memory[kWarps + w];
  for (int i = thread; i < p.rows.capacity; i += kKvFinishThreads)
    row[i] = visible < 0 ? not_a_number() : i < visible ? row[i] / sum : 0.0f;
}

}  // namespace lora_kernels::cuda
