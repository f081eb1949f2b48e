// Which queries a block of kv_attention_step has, what they see, and where it lies: found on the device, so that a
// captured graph follows whatever lengths and slots its memory holds at replay. What these hold is never followed out
// of bounds: a row whose length does not fit the cache, or whose slot is no row of it, is answered with NaN, and
// nothing is appended for it.
#pragma once

#include "cuda/kv_shapes.h"
#include "cuda/primitives/shared.h"
#include "lora_kernels/kv_attention_step.h"

namespace lora_kernels::cuda {

struct KvRows {
  const int32_t* lengths = nullptr;  // [rows]
  const int32_t* slots = nullptr;    // by kind
  KvSlots kind = KvSlots::kIdentity;
  int rows = 0, tokens = 0, capacity = 0, cache_rows = 0;
  bool append = false;

  // Positions before this call; -1: no such length.
  __device__ int length(int row) const {
    const int n = lengths[row];
    return n >= 0 && n <= capacity - (append ? tokens : 0) ? n : -1;
  }
  __device__ int valid(int slot) const { return slot >= 0 && slot < cache_rows ? slot : -1; }
  // The cache row of a row, and of one of its positions; -1: no such slot.
  __device__ int cache_row(int row) const { return kind == KvSlots::kIdentity ? row : valid(slots[row]); }
  __device__ int cache_row(int row, int position) const {
    return kind == KvSlots::kPerPosition ? valid(slots[static_cast<int64_t>(row) * capacity + position])
                                         : cache_row(row);
  }
  // Positions that a token sees; -1: its row is not valid.
  __device__ int visible(int row, int token) const {
    const int n = length(row);
    if (n < 0 || (kind == KvSlots::kPerRow && cache_row(row) < 0)) return -1;
    return n + (append ? token + 1 : 0);
  }
};

// The queries of a block: tokens of one row (unit: the row), or of all rows in one cache row (unit: that), which then
// read it once. Rows without a valid slot are listed with cache row 0, and see nothing.
class KvQueryList {
 public:
  // Queries [first, first + most) of the unit. Called by all threads; ends with a barrier.
  __device__ KvQueryList(const KvRows& rows, bool grouped, int unit, int first, int most, int* memory)
      : query_(memory), visible_(memory + kKvQueries) {
    const int thread = static_cast<int>(threadIdx.x), warp = thread / 32;
    int* votes = memory + 2 * kKvQueries;
    int found = 1;  // rows
    if (!grouped) {
      if (thread < most && first + thread < rows.tokens) query_[thread] = unit * rows.tokens + first + thread;
    } else {
      found = 0;
      for (int base = 0, turn = 0; base < rows.rows; base += kKvThreads, turn ^= 1) {
        const int row = base + thread;
        const int slot = row < rows.rows ? rows.cache_row(row) : unit + 1;
        const bool mine = slot == unit || (slot < 0 && unit == 0);
        const uint32_t vote = __ballot_sync(~0u, mine);
        if (thread % 32 == 0) votes[turn * kKvWarps + warp] = __popc(vote);
        __syncthreads();
        int before = found + __popc(vote & ((1u << thread % 32) - 1));
        for (int w = 0; w < kKvWarps; ++w) {
          const int count = votes[turn * kKvWarps + w];
          if (w < warp) before += count;
          found += count;
        }
        if (!mine) continue;
        const int begin = max(before * rows.tokens, first), end = min((before + 1) * rows.tokens, first + most);
        for (int n = begin; n < end; ++n) query_[n - first] = row * rows.tokens + n - before * rows.tokens;
      }
    }
    total_ = found * rows.tokens;
    count_ = max(0, min(most, total_ - first));
    __syncthreads();
    if (thread < count_) visible_[thread] = rows.visible(query_[thread] / rows.tokens, query_[thread] % rows.tokens);
    __syncthreads();
    for (int i = 0; i < count_; ++i) {
      longest_ = max(longest_, visible_[i]);
      shortest_ = i ? min(shortest_, visible_[i]) : visible_[0];
    }
  }

  __device__ int total() const { return total_; }
  __device__ int count() const { return count_; }
  __device__ int query(int i) const { return query_[i]; }  // row * tokens + token
  __device__ int visible(int i) const { return visible_[i]; }
  __device__ int longest() const { return longest_; }
  __device__ int shortest() const { return shortest_; }

 private:
  int *query_, *visible_;
  int total_ = 0, count_ = 0, longest_ = 0, shortest_ = 0;
};

// Where the K and V of a position lie: a cache row, or a new token that is on its way into the cache, in the same call,
// by this block or by another: its vectors are read from k and v.
constexpr int kKvNowhere = -1;
__device__ inline int kv_new_token(int64_t row, int tokens, int token) {
  return -2 - static_cast<int>(row * tokens + token);
}

// Places of positions [begin, end) of one row to places[0, end - begin). `fused`: new tokens are read from k and v.
// Called by all threads; the caller's barrier ends it. `memory`: kKvWarps ints.
__device__ inline void find_places(const KvRows& rows, bool fused, int row, int begin, int end, int* places,
                                   int* memory) {
  const int thread = static_cast<int>(threadIdx.x), length = rows.length(row);
  // Positions from here on may be written by another row now. Where all rows are as long, none of this one's past is.
  int first_new = rows.capacity;
  if (fused && rows.kind != KvSlots::kIdentity) {
    for (int j = thread; j < rows.rows; j += kKvThreads) {
      const int other = rows.length(j);
      if (other >= 0 && other < first_new) first_new = other;
    }
    for (int by = 16; by > 0; by /= 2) first_new = min(first_new, __shfl_xor_sync(~0u, first_new, by));
    if (thread % 32 == 0) memory[thread / 32] = first_new;
    __syncthreads();
    for (int w = 0; w < kKvWarps; ++w) first_new = min(first_new, memory[w]);
  }
  for (int p = begin + thread; p < end; p += kKvThreads) {
    int place = rows.cache_row(row, p);
    if (fused && p >= length) {
      place = place < 0 ? kKvNowhere : kv_new_token(row, rows.tokens, p - length);
    } else if (p >= first_new && place >= 0) {
      const int cache_row = place;
      for (int j = 0; j < rows.rows; ++j) {
        const int other = rows.length(j);
        if (j != row && other >= 0 && p >= other && p < other + rows.tokens && rows.cache_row(j, p) == cache_row)
          place = kv_new_token(j, rows.tokens, p - other);
      }
    }
    places[p - begin] = place;
  }
}

}  // namespace lora_kernels::cuda
