// Which adapter a row uses, found on the device: no loop and no copy on the host, and a captured graph follows whatever
// the arrays hold when it is replayed. What they hold is never followed out of bounds: an id that names no adapter
// means the base alone, and a rank is cut to what the bank has.
#pragma once

#include "cuda/primitives/shared.h"

namespace lora_kernels::cuda {

struct Routing {
  const int32_t* ids = nullptr;  // [groups], or null: adapter 0 for every row
  const int32_t* offsets = nullptr;
  const float* scales = nullptr;
  int rows_per_group = 1;
  int adapters = 0;  // 0: no LoRA branch
  int total_rank = 0;
  int max_rank = 0;

  __device__ int adapter_of(int row) const {
    if (adapters == 0) return -1;
    if (!ids) return 0;
    const int id = ids[row / rows_per_group];
    return id >= 0 && id < adapters ? id : -1;
  }
  __device__ int begin(int adapter) const {
    if (!offsets) return 0;
    const int at = offsets[adapter];
    return at < 0 ? 0 : at > total_rank ? total_rank : at;
  }
  __device__ int rank(int adapter) const {
    if (!offsets) return total_rank;
    const int first = begin(adapter), last = begin(adapter + 1);
    const int n = last - first;
    return n < 0 ? 0 : n > max_rank ? max_rank : n;
  }
  __device__ float scale(int adapter) const { return scales ? scales[adapter] : 1.0f; }
};

// The different adapters of the kRows rows of a tile, in order of their first row.
template <int kRows, int kThreads>
class TileAdapters {
  static_assert(kRows % 32 == 0 || kRows == 16, "votes are taken by whole warps");
  static constexpr int kVotes = (kRows + 31) / 32;

 public:
  static constexpr int kWords = 2 * kRows + kVotes + 1;  // ints of shared memory

  // Called by all threads; ends with a barrier.
  __device__ TileAdapters(const Routing& routing, int* memory, int first_row, int rows)
      : row_adapter_(memory), list_(memory + kRows), votes_(memory + 2 * kRows), mixed_(routing.ids != nullptr) {
    const int thread = static_cast<int>(threadIdx.x);
    if (!mixed_) {
      if (thread == 0) list_[0] = 0;
      count_ = routing.adapters > 0 && routing.rank(0) > 0;
      __syncthreads();
      return;
    }
    static_assert(kThreads >= kRows, "one thread for each row");
    if (thread < kRows) row_adapter_[thread] = first_row + thread < rows ? routing.adapter_of(first_row + thread) : -1;
    __syncthreads();
    bool first = false;
    if (thread < kVotes * 32) {
      const int id = thread < kRows ? row_adapter_[thread] : -1;
      first = id >= 0 && routing.rank(id) > 0;
      if (first && thread > 0 && row_adapter_[thread - 1] == id) first = false;  // mostly rows come in runs
      for (int i = 0; first && i < thread; ++i) first = row_adapter_[i] != id;
      const uint32_t vote = __ballot_sync(~0u, first);
      if (thread % 32 == 0) votes_[thread / 32] = static_cast<int>(vote);
    }
    __syncthreads();
    int before = 0;
    count_ = 0;
    for (int i = 0; i < kVotes; ++i) {
      const uint32_t vote = static_cast<uint32_t>(votes_[i]);
      if (i < thread / 32) before += __popc(vote);
      if (i == thread / 32) before += __popc(vote & ((1u << thread % 32) - 1));
      count_ += __popc(vote);
    }
    if (first) list_[before] = row_adapter_[thread];
    __syncthreads();
  }

  __device__ int count() const { return count_; }
  __device__ int adapter(int i) const { return list_[i]; }
  __device__ bool uses(int row, int adapter) const { return !mixed_ || row_adapter_[row] == adapter; }

 private:
  int *row_adapter_, *list_, *votes_;
  bool mixed_;
  int count_ = 0;
};

}  // namespace lora_kernels::cuda
