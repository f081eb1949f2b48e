// The queries of a block, as its products take them: in every lane's registers, or, where these have no room beside
// sums, K and V, once in shared memory for all warps, whose lanes hold the same.
#pragma once

#include "cuda/kv_eights.cuh"
#include "cuda/kv_shapes.h"
#include "cuda/primitives/launch.h"
#include "cuda/primitives/shared.h"

namespace lora_kernels::cuda {

// T: of the products. kGroups: of 64 channels. Query i of a lane is its product's row, eights are of its depth.
template <class T, int kGroups>
class KvQueries {
  static constexpr bool kHeld = kv_holds_queries(kGroups, sizeof(T));
  static constexpr int kEights = 2 * kGroups;
  static constexpr int kSharedWords = static_cast<int>(kv_query_bytes(kGroups, sizeof(T)) / 4);

 public:
  __device__ explicit KvQueries(Shared& shared) : words_(shared.take<uint32_t>(kSharedWords)) {}

  __device__ void keep(int i, int c, const KvEight<T>& eight) {
    if constexpr (kHeld) {
      held_[i][c] = eight;
    } else {
      if (threadIdx.x >= 32) return;  // the first warp writes them for all
#pragma unroll
      for (int w = 0; w < KvEight<T>::kWords; ++w) words_[at(i, c, w)] = eight.w[w];
    }
  }
  // Between the last keep() and the first word().
  __device__ void meet() const {
    if constexpr (!kHeld) __syncthreads();
  }
  __device__ uint32_t word(int i, int c, int w) const {
    if constexpr (kHeld)
      return held_[i][c].w[w];
    else
      return read_shared(words_ + at(i, c, w));
  }

 private:
  // Words of the lanes lie side by side: no bank is asked twice.
  __device__ static int at(int i, int c, int w) {
    return ((i * kEights + c) * KvEight<T>::kWords + w) * 32 + static_cast<int>(threadIdx.x) % 32;
  }

  uint32_t* words_;
  KvEight<T> held_[2][kHeld ? kEights : 1];
};

}  // namespace lora_kernels::cuda
