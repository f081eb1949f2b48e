// kv_attention_step over blocked INT8 keys and values (kv_packing.h): fixed ones, as kv_pack leaves them.
//   scores = (q * k_scales) K, out = v_scales * (softmax V): q * k_scales and the weights are integers of 14 bits,
//   128 * high + low, on INT8 tensor cores. FLOPs 64 per element of K and V; bytes: 2 D per cache row, head and
//   position, read once for up to eight queries: bound by memory.
//
// The layout is the CPU's, as it is. Words of K hold four channels of a position, and neighbours in memory are
// neighbouring positions: sixteen bytes are the words of positions 4 g ... 4 g + 3, for four products of eight columns,
// if column g of product j is taken to be position 4 g + j. Then a lane ends with the scores of eight consecutive
// positions, which are the two words of depth that it has to bring to the product with V, whose words hold four
// positions of a channel: scores become weights without leaving the lane. A product has sixteen rows: eight queries,
// each as high and as low halves, so that both halves of a sum end in one lane too.
//
// It starts before the kernel before it has finished (sm_90 on), and asks for K and V to come to L2 meanwhile: they are
// not of this step.
//
// Sums of 32 positions are integers, then they are added up in fp32, since a larger score may scale them anew. q is
// split into 14 bits however many tokens there are (a CPU takes 8 bits from kKvManyQueries on). Out is divided by the
// sum of the rounded weights.
//
// Not measured: no GPU has run this.
#pragma once

#include "cuda/kv_exchange.cuh"
#include "lora_kernels/kv_packing.h"

namespace lora_kernels::cuda {

struct KvBlockedParams {
  KvRows rows;
  const void* q = nullptr;         // [rows, T, H, D]
  const int8_t* keys = nullptr;    // [S, H, kv_key_bytes]
  const int8_t* values = nullptr;  // [S, H, kv_value_bytes]
  int64_t key_bytes = 0, value_bytes = 0;
  int key_steps = 0, value_steps = 0, value_channels = 0;
  const float *k_scales = nullptr, *v_scales = nullptr;  // [S, H, D]
  float scale = 1;                                       // in units of log2
  bool grouped = false;
  int split_positions = 0;  // of a block
  int ask = 0;              // for so many tiles of a warp ahead
  KvResult result;
  KvWeights weights;
};

// Grid (units * H * splits, chunks of queries), all splits in one cluster or none. kGroups: of 64 channels.
template <class Q, int kGroups>
class KvBlocked {
  static constexpr int kStride = kKvWarps * kKvBlockedTile;

 public:
  __device__ explicit KvBlocked(const KvBlockedParams& p)
      : p_(p), list_memory_(shared_.take<int>(kKvListWords)), parts_(shared_), exchange_(shared_, p.result) {
    const int heads = p.result.heads, block = static_cast<int>(blockIdx.x);
    split_ = block % p.result.splits;
    head_ = block / p.result.splits % heads;
    unit_ = block / p.result.splits / heads;
    const int64_t at_head = static_cast<int64_t>(unit_) * heads + head_;
    keys_ = p.keys + at_head * p.key_bytes;
    values_ = p.values + at_head * p.value_bytes;
  }

  // For the first tiles, while the kernel before goes on. Lengths, which may say that not all of them are wanted, may
  // not be read yet.
  __device__ void ask_first() const {
    const int begin = split_ * p_.split_positions, end = min(begin + p_.split_positions, p_.rows.capacity);
    for (int i = 0; i < p_.ask; ++i) ask(begin + warp_ * kKvBlockedTile + i * kStride, end);
  }

  __device__ void run() {
    int first = static_cast<int>(blockIdx.y) * kKvBlockedQueries;
    while (true) {
      const KvQueryList list(p_.rows, p_.grouped, unit_, first, kKvBlockedQueries, list_memory_);
      if (list.count() > 0) attend(list, first);
      first += static_cast<int>(gridDim.y) * kKvBlockedQueries;
      if (first >= list.total()) return;
      __syncthreads();  // the list and the sums are free again
    }
  }

 private:
  __device__ void attend(const KvQueryList& list, int first) {
    exchange_.expect(list.count());
    const int begin = split_ * p_.split_positions, end = min(begin + p_.split_positions, list.longest());
    const int64_t at_head = static_cast<int64_t>(unit_) * p_.result.heads + head_;
    end_ = end;
    load_query(list, p_.k_scales + at_head * p_.result.head_size);
    most_ = negative_infinity();
    total_ = 0;
#pragma unroll
    for (int i = 0; i < 16 * kGroups; ++i) sums_[i] = 0;

    int at = begin + warp_ * kKvBlockedTile;
    load_keys(at);
    for (; at < end; at += kStride) {
      if (p_.ask) ask(at + p_.ask * kStride, end);
      load_values(at);
      int32_t scores[4][4] = {};
      add_scores(scores);
      load_keys(at + kStride);
      uint32_t weights[4];
      const float share = soften(list, at, scores, weights);
      add_values(weights, share);
    }
    const float total = kv_group_sum(total_);
    if (t_ == 0) {
      parts_.most[warp_ * kKvBlockedQueries + g_] = most_;
      parts_.total[warp_ * kKvBlockedQueries + g_] = total;
    }
#pragma unroll
    for (int i = 0; i < 16 * kGroups; ++i) parts_.sum(warp_, g_, channel_of(i)) = sums_[i];
    __syncthreads();
    const float* v_scales = p_.v_scales + at_head * p_.result.head_size;
    const auto scale_of_channel = [&](int d) { return v_scales[d]; };
    exchange_.template finish<Q>(parts_, list, first, head_, split_, scale_of_channel);
  }

  // Sum i = 8 c + 2 j + e of a lane: column 2 t + e of product j of 32 channels.
  __device__ int channel_of(int i) const { return i / 8 * 32 + (2 * t_ + i % 2) * 4 + i % 8 / 2; }

  // Query g, sixteen channels of every 64, in the order of depth that K has; NaN where it is not finite.
  __device__ void load_query(const KvQueryList& list, const float* k_scales) {
    const int size = p_.result.head_size;
    const bool there = g_ < list.count();
    const Q* from = static_cast<const Q*>(p_.q) +
                    (there ? static_cast<int64_t>(list.query(g_)) * p_.result.heads + head_ : 0) * size;
    const auto value = [&](int c, int e) {
      const int d = c * 64 + t_ * 16 + e;
      return there && d < size ? to_float(from[d]) * k_scales[d] : 0.0f;
    };
    uint32_t bits = 0;  // as bits, infinities and NaNs are the largest
#pragma unroll
    for (int c = 0; c < kGroups; ++c)
#pragma unroll
      for (int e = 0; e < 16; ++e) bits = max(bits, __float_as_uint(value(c, e)) & 0x7FFFFFFFu);
    bits = max(bits, __shfl_xor_sync(~0u, bits, 1));
    bits = max(bits, __shfl_xor_sync(~0u, bits, 2));
    const float most = __uint_as_float(bits), inverse = static_cast<float>(kKvMost) / most;
    const bool finite = bits < 0x7F800000u, fits = finite && inverse <= 3.4028235e38f;
    factor_ = (finite ? fits ? most / static_cast<float>(kKvMost) : 0.0f : not_a_number()) * p_.scale;
#pragma unroll
    for (int c = 0; c < kGroups; ++c)
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        uint32_t high = 0, low = 0;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int v = fits ? static_cast<int>(rintf(value(c, w * 4 + e) * inverse)) : 0;
          high |= (static_cast<uint32_t>(v >> 7) & 255) << 8 * e;
          low |= (static_cast<uint32_t>(v) & 127) << 8 * e;
        }
        high_[c].v[w] = high, low_[c].v[w] = low;
      }
  }

  // K and V of a tile to L2, lines of 128 bytes by each half of the lanes: registers hold one tile, with which few
  // blocks leave memory idle.
  __device__ void ask(int at, int end) const {
    if (at >= end) return;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    if (lane < 16) {  // the positions of a tile at each step
      const int8_t* keys = key_block(at) + at % static_cast<int>(kKvBlockPositions) * static_cast<int>(kKvStep);
      for (int step = lane; step < p_.key_steps; step += 16)
        prefetch(keys + step * kKvBlockPositions * kKvStep, 128, 0, 1);
      return;
    }
    const int64_t first = static_cast<int64_t>(at) * p_.value_channels, left = p_.value_bytes - first;
    prefetch(values_ + first, min(left, static_cast<int64_t>(kKvBlockedTile) * p_.value_channels), lane - 16, 16);
  }

  __device__ const int8_t* key_block(int at) const {
    return keys_ + at / kKvBlockPositions * (p_.key_steps * kKvBlockPositions * kKvStep);
  }

  // Positions at + 4 g ... of 32, four channels at a time.
  __device__ void load_keys(int at) {
    const int8_t* block = key_block(at);
    const int place = (at % static_cast<int>(kKvBlockPositions) + 4 * g_) * static_cast<int>(kKvStep);
#pragma unroll
    for (int c = 0; c < kGroups; ++c)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int step = c * 16 + t_ * 4 + i;
        const Vector zero = {{0, 0, 0, 0}};
        k_[c][i] = at < end_ && step < p_.key_steps
                       ? load16_constant(block + step * kKvBlockPositions * kKvStep + place)
                       : zero;
      }
  }

  __device__ void add_scores(int32_t (&scores)[4][4]) const {
#pragma unroll
    for (int c = 0; c < kGroups; ++c)
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const uint32_t a[4] = {high_[c].v[i], low_[c].v[i], high_[c].v[i + 1], low_[c].v[i + 1]};
#pragma unroll
        for (int j = 0; j < 4; ++j) mma_m16n8k32_s8(scores[j], a, k_[c][i].v[j], k_[c][i + 1].v[j]);
      }
  }

  // Steps 2 t and 2 t + 1 of eight: positions at + 8 t ..., channels 4 g ... of every 32.
  __device__ void load_values(int at) {
#pragma unroll
    for (int c = 0; c < 2 * kGroups; ++c)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int step = at / static_cast<int>(kKvStep) + 2 * t_ + i, channel = c * 32 + 4 * g_;
        const Vector zero = {{0, 0, 0, 0}};
        v_[c][i] = step < p_.value_steps && channel < p_.value_channels
                       ? load16_constant(values_ + (static_cast<int64_t>(step) * p_.value_channels + channel) * kKvStep)
                       : zero;
      }
  }

  // Scores to the halves of weights, as the product takes them; returns what the sums so far are worth.
  __device__ float soften(const KvQueryList& list, int at, const int32_t (&sums)[4][4], uint32_t (&weights)[4]) {
    const int visible = g_ < list.count() ? list.visible(g_) : 0;
    float scores[2][4], most = most_;
#pragma unroll
    for (int e = 0; e < 2; ++e)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int position = at + 8 * t_ + 4 * e + j;
        scores[e][j] = static_cast<float>(128 * sums[j][e] + sums[j][2 + e]) * factor_;
        if (position < visible) {
          most = fmaxf(most, scores[e][j]);
          if (p_.weights.data) p_.weights.store_score(p_.rows, list.query(g_), head_, position, scores[e][j]);
        }
      }
    most = kv_group_max(most);
    const float share = kv_share(most_, most);
    most_ = most;
    total_ *= share;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      weights[2 * e] = weights[2 * e + 1] = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const bool seen = at + 8 * t_ + 4 * e + j < visible;
        const float weight = seen ? rintf(exp2f(scores[e][j] - most) * static_cast<float>(kKvMost)) : 0.0f;
        total_ += weight;  // NaN stays: all of the row is
        const auto v = static_cast<uint32_t>(weight > 0 ? static_cast<int>(weight) : 0);
        weights[2 * e] |= v >> 7 << 8 * j;
        weights[2 * e + 1] |= (v & 127) << 8 * j;
      }
    }
    return share;
  }

  __device__ void add_values(const uint32_t (&weights)[4], float share) {
#pragma unroll
    for (int c = 0; c < 2 * kGroups; ++c)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        int32_t sum[4] = {0, 0, 0, 0};
        mma_m16n8k32_s8(sum, weights, v_[c][0].v[j], v_[c][1].v[j]);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& all = sums_[8 * c + 2 * j + e];
          all = all * share + static_cast<float>(128 * sum[e] + sum[2 + e]);
        }
      }
  }

  const KvBlockedParams& p_;
  Shared shared_;
  int* list_memory_;
  KvParts<kKvBlockedQueries, kGroups> parts_;
  KvExchange<kKvBlockedQueries, kGroups, kv_shares(kGroups, true) && kArch >= 90> exchange_;
  const int warp_ = static_cast<int>(threadIdx.x) / 32, g_ = static_cast<int>(threadIdx.x) % 32 / 4,
            t_ = static_cast<int>(threadIdx.x) % 4;
  int split_ = 0, head_ = 0, unit_ = 0, end_ = 0;
  const int8_t *keys_ = nullptr, *values_ = nullptr;
  Vector high_[kGroups], low_[kGroups], k_[kGroups][4], v_[2 * kGroups][2];
  float factor_ = 0, most_ = 0, total_ = 0;
  float sums_[16 * kGroups];
};

template <class Q, int kGroups>
__global__ void __launch_bounds__(kKvThreads, kGroups == 1 ? 3 : 2) kv_blocked(const KvBlockedParams p) {
  let_next_kernel_start();
  KvBlocked<Q, kGroups> block(p);
  block.ask_first();
  wait_for_kernel_before();
  block.run();
}

}  // namespace lora_kernels::cuda
