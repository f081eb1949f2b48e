// What the blocks of a cluster that share out the depth of int8_lora_linear send each other (sm_90 on).
//
// Each block has sums of 32 channels, and of t where it makes rows itself, over its part of depth. It sends the sums of
// the channels that another one finishes to that one, and its part of t to all, straight into their shared memory;
// whoever has got what it expects goes on, and nobody waits for the others besides. Integers are exact in any order,
// and t is added up in that of the blocks.
//
// Not measured: no GPU has run this.
#pragma once

#include "cuda/int8_shapes.h"
#include "cuda/primitives/cluster.h"
#include "cuda/primitives/tma.h"

namespace lora_kernels::cuda {

class Int8Exchange {
 public:
  // By all threads; of one block alone nothing.
  __device__ Int8Exchange(Shared& shared, int blocks, int rows, int t_stride)
      : blocks_(blocks), rows_(rows), channels_(kInt8FewColumns / blocks), t_words_(rows * t_stride) {
    if (blocks == 1) return;
    arrived_ = shared.take<uint64_t>(1);
    sums_ = shared.take<int32_t>(rows * kInt8FewColumns);
    t_ = shared.take<float>(blocks * t_words_);
    own_t_ = shared.take<float>(t_words_);
    for (int i = static_cast<int>(threadIdx.x); i < t_words_; i += kInt8Threads) own_t_[i] = 0;
    if (threadIdx.x == 0) {
      init_arrivals(arrived_);
      fence_arrivals();
      expect_bytes(arrived_, (rows * kInt8FewColumns + blocks * t_words_) * 4);
    }
    arrive_in_cluster();
  }

  __device__ float* own_t() { return own_t_; }

  // Sends what `sum(row, channel)` has of the block's 32 channels, and own_t; waits for that of all.
  template <class Sum>
  __device__ void run(const Sum& sum) {
    const int mine = static_cast<int>(rank_in_cluster(static_cast<unsigned>(blocks_)));
    wait_for_cluster();  // the barriers of all are there
    for (int i = static_cast<int>(threadIdx.x) * 4; i < rows_ * kInt8FewColumns; i += kInt8Threads * 4) {
      const int m = i / kInt8FewColumns, n = i % kInt8FewColumns;
      Vector v;
#pragma unroll
      for (int j = 0; j < 4; ++j) v.v[j] = static_cast<uint32_t>(sum(m, n + j));
      send16(sums_ + (mine * rows_ + m) * channels_ + n % channels_, v, arrived_, static_cast<unsigned>(n / channels_));
    }
    for (int i = static_cast<int>(threadIdx.x) * 4; i < t_words_ * blocks_; i += kInt8Threads * 4) {
      const int at = i % t_words_;
      send16(t_ + mine * t_words_ + at, load16(own_t_ + at), arrived_, static_cast<unsigned>(i / t_words_));
    }
    wait_for_phase(arrived_, 0);
  }

  // Of all blocks, in order. `channel`: of those that this block finishes.
  __device__ int32_t sum(int row, int channel) const {
    int32_t all = 0;
    for (int b = 0; b < blocks_; ++b) all += sums_[(b * rows_ + row) * channels_ + channel];
    return all;
  }
  __device__ float t(int at) const {
    float all = 0;
    for (int b = 0; b < blocks_; ++b) all += t_[b * t_words_ + at];
    return all;
  }

 private:
  int blocks_, rows_, channels_, t_words_;
  uint64_t* arrived_ = nullptr;
  int32_t* sums_ = nullptr;                // [blocks, rows, channels]
  float *t_ = nullptr, *own_t_ = nullptr;  // [blocks, rows, t_stride]; [rows, t_stride]
};

}  // namespace lora_kernels::cuda
