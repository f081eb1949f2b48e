// What the blocks of a cluster that share out positions of kv_attention_step send each other (sm_90 on).
//
// Each block has the sums of its positions for all queries of a list. It sends those of a query, with the largest score
// and the total, to the block that finishes it: query i to block i modulo the cluster. That one adds them up in the
// order of the blocks, as kv_combine does, to the same bits, without another kernel and without memory.
//
// Not measured: no GPU has run this.
#pragma once

#include "cuda/kv_result.cuh"
#include "cuda/primitives/cluster.h"
#include "cuda/primitives/tma.h"

namespace lora_kernels::cuda {

// Lists of queries are the same for all blocks of a cluster, and follow one another in the same memory: those from
// query kQueries * (blockIdx.y + turn * gridDim.y) on. kShares: whether there may be a cluster.
template <int kQueries, int kGroups, bool kShares>
class KvExchange {
  static constexpr int kStride = kv_part_stride(kGroups);  // largest score and total, then the sums

 public:
  // By all threads; takes kv_exchange_bytes where there is a cluster.
  __device__ KvExchange(Shared& shared, const KvResult& r) : r_(r) {
    if (!kShares || r.cluster == 1) return;
    arrived_ = shared.take<uint64_t>(1);
    records_ = shared.take<float>(kQueries * kStride);
    if (threadIdx.x != 0) return;
    init_arrivals(arrived_);
    fence_arrivals();
  }

  // Before the work on a list of `count` queries: nothing of the list before is read any more.
  __device__ void expect(int count) const {
    if (!kShares || r_.cluster == 1) return;
    if (threadIdx.x == 0) expect_bytes(arrived_, owned(count) * r_.cluster * quads() * 16);
    arrive_in_cluster();
  }

  // After a barrier behind the sums of `parts`, of the list from query `first` on; without a cluster what they do
  // alone.
  template <class Q, class List, class ChannelScale>
  __device__ void finish(const KvParts<kQueries, kGroups>& parts, const List& list, int first, int head, int split,
                         const ChannelScale& channel_scale) const {
    if (!kShares || r_.cluster == 1) {
      parts.template finish<Q>(r_, list, head, split, channel_scale);
      return;
    }
    const int size = r_.head_size, cluster = r_.cluster, mine = rank();
    wait_for_cluster();  // what all of them expect is known
    for (int i = static_cast<int>(threadIdx.x); i < list.count() * quads(); i += kKvThreads) {
      const int query = i / quads(), quad = i % quads(), d = (quad - 1) * 4;
      Vector v = {{0, 0, 0, 0}};
      if (quad == 0) {
        const KvSum all = parts.whole(query, 0);
        v.v[0] = __float_as_uint(all.most), v.v[1] = __float_as_uint(all.total);
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j)
          if (d + j < size) v.v[j] = __float_as_uint(parts.whole(query, d + j).sum * channel_scale(d + j));
      }
      send16(record(mine, query / cluster) + quad * 4, v, arrived_, static_cast<unsigned>(query % cluster));
    }
    const int turn = first / (kQueries * static_cast<int>(gridDim.y));
    wait_for_phase(arrived_, turn % 2);
    for (int i = static_cast<int>(threadIdx.x); i < owned(list.count()) * size; i += kKvThreads) {
      const int place = i / size, d = i % size, query = place * cluster + mine;
      KvSum sum;
      for (int b = 0; b < cluster; ++b) sum.most = fmaxf(sum.most, record(b, place)[0]);
      for (int b = 0; b < cluster; ++b) {
        const float* of_block = record(b, place);
        sum.add(of_block[0], of_block[1], of_block[4 + d]);
      }
      r_.template store<Q>(sum, list.visible(query), static_cast<int64_t>(list.query(query)) * r_.heads + head, d);
    }
  }

 private:
  __device__ int rank() const { return static_cast<int>(rank_in_cluster(static_cast<unsigned>(r_.cluster))); }
  // Of so many queries, those that this block finishes.
  __device__ int owned(int count) const { return (count - rank() + r_.cluster - 1) / r_.cluster; }
  // Of a query: largest score and total, and its sums.
  __device__ int quads() const { return 1 + (r_.head_size + 3) / 4; }
  __device__ float* record(int block, int place) const {
    return records_ + (block * (kQueries / r_.cluster) + place) * kStride;
  }

  const KvResult& r_;
  uint64_t* arrived_ = nullptr;
  float* records_ = nullptr;  // [blocks, queries of each, stride]
};

}  // namespace lora_kernels::cuda
