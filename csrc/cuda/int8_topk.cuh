// The choice over a vocabulary: of each row of y (fp32 [M, N], written by the products before) the k largest values,
// their columns, and the log of the sum of the exponentials of all.
//
//   top_parts  the same for each kTopColumns columns of a row: k rounds, each taking the best that is left
//   top_merge  the lists of a row merged, the sums added in order
//
// The first column among equals; a NaN counts as infinity. y in memory costs 8 M N bytes, against N K of the weight
// 8 M / K of it: 0.6 % at one row of a Whisper. No order of threads changes a bit.
#pragma once

#include "cuda/int8_shapes.h"
#include "cuda/primitives/launch.h"
#include "cuda/tile.h"

namespace lora_kernels::cuda {

// Two places for the best of each warp.
constexpr size_t kTopSharedBytes = 2 * (2 * (kTopThreads / 32) * 4);

struct TopParams {
  const float* y = nullptr;  // [M, N]
  int columns = 0, parts = 1, k = 1;
  float* values = nullptr;     // [M, parts, k]
  int32_t* places = nullptr;   // [M, parts, k]
  float* exponents = nullptr;  // [M, parts, 2]: the largest value and the sum of exponentials relative to it, or null
  int64_t* top_columns = nullptr;
  float* top_values = nullptr;  // or null
  float* log_sum = nullptr;     // or null
};

struct Top {
  float value;
  int column;

  __device__ bool beats(const Top& other) const {
    return value > other.value || (value == other.value && column < other.column);
  }
};
constexpr int kNoColumn = 0x7FFFFFFF;

// The best of a warp, in all its lanes.
__device__ inline Top best_of_warp(Top top) {
#pragma unroll
  for (int by = 16; by > 0; by /= 2) {
    const Top other = {__shfl_xor_sync(~0u, top.value, by), __shfl_xor_sync(~0u, top.column, by)};
    if (other.beats(top)) top = other;
  }
  return top;
}

// Grid (parts, M).
template <class T>
__global__ void __launch_bounds__(kTopThreads) top_parts(const TopParams p) {
  let_next_kernel_start();
  wait_for_kernel_before();
  Shared shared;
  constexpr int kWarps = kTopThreads / 32;
  T* best_values = shared.take<T>(2 * kWarps);
  int* best_columns = shared.take<int>(2 * kWarps);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32;
  const int first = static_cast<int>(blockIdx.x) * kTopColumns;
  const int64_t row = blockIdx.y, list = row * p.parts + blockIdx.x;
  float v[kTopEach];
  uint32_t left = 0;
  float most = negative_infinity();
#pragma unroll
  for (int i = 0; i < kTopEach; ++i) {
    const int column = first + i * kTopThreads + thread;
    v[i] = column < p.columns ? p.y[row * p.columns + column] : negative_infinity();
    if (v[i] != v[i]) v[i] = __uint_as_float(0x7F800000u);
    if (column < p.columns) left |= 1u << i;
    most = v[i] > most ? v[i] : most;
  }
  for (int round = 0; round < p.k; ++round) {
    Top top = {negative_infinity(), kNoColumn};
#pragma unroll
    for (int i = 0; i < kTopEach; ++i) {
      const Top mine = {v[i], first + i * kTopThreads + thread};
      if ((left >> i & 1) && mine.beats(top)) top = mine;
    }
    top = best_of_warp(top);
    // Two places in turns: those of the last round may still be read.
    float* values = best_values + round % 2 * kWarps;
    int* columns = best_columns + round % 2 * kWarps;
    if (thread % 32 == 0) {
      values[warp] = top.value;
      columns[warp] = top.column;
    }
    __syncthreads();
    for (int w = 0; w < kWarps; ++w) {
      const Top other = {values[w], columns[w]};
      if (other.beats(top)) top = other;
    }
    if (thread == 0) {
      p.values[list * p.k + round] = top.value;
      p.places[list * p.k + round] = top.column;
    }
    if (top.column != kNoColumn && (top.column - first) % kTopThreads == thread)
      left &= ~(1u << (top.column - first) / kTopThreads);
  }
  if (!p.exponents) return;
  __syncthreads();
  // Of all columns: the largest value, then sums over threads, lanes and warps, each in order.
#pragma unroll
  for (int by = 16; by > 0; by /= 2) {
    const float other = __shfl_xor_sync(~0u, most, by);
    most = other > most ? other : most;
  }
  if (thread % 32 == 0) best_values[warp] = most;
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) most = best_values[w] > most ? best_values[w] : most;
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kTopEach; ++i)
    if (v[i] != negative_infinity()) sum += expf(v[i] - most);
#pragma unroll
  for (int by = 16; by > 0; by /= 2) sum += __shfl_xor_sync(~0u, sum, by);
  if (thread % 32 == 0) best_values[kWarps + warp] = sum;
  __syncthreads();
  if (thread) return;
  sum = 0;
  for (int w = 0; w < kWarps; ++w) sum += best_values[kWarps + w];
  p.exponents[list * 2] = most;
  p.exponents[list * 2 + 1] = sum;
}

// Grid (M), one warp: lane l goes through the lists l, l + 32, ... of the row.
template <class T>
__global__ void __launch_bounds__(32) top_merge(const TopParams p) {
  let_next_kernel_start();
  wait_for_kernel_before();
  const int lane = static_cast<int>(threadIdx.x);
  const int64_t row = blockIdx.x;
  Top last = {__uint_as_float(0x7F800000u), -1};  // what was taken so far ends here: lists are in order
  for (int round = 0; round < p.k; ++round) {
    Top top = {negative_infinity(), kNoColumn};
    for (int part = lane; part < p.parts; part += 32) {
      const int64_t list = (row * p.parts + part) * p.k;
      for (int i = 0; i < p.k; ++i) {
        const Top mine = {p.values[list + i], p.places[list + i]};
        if (!last.beats(mine)) continue;
        if (mine.beats(top)) top = mine;
        break;  // the rest of the list is smaller
      }
    }
    last = best_of_warp(top);
    if (lane == 0) {
      p.top_columns[row * p.k + round] = last.column;
      if (p.top_values) p.top_values[row * p.k + round] = last.value;
    }
  }
  if (!p.log_sum || lane) return;
  T most = negative_infinity(), sum = 0;
  for (int part = 0; part < p.parts; ++part) {
    const float other = p.exponents[(row * p.parts + part) * 2];
    most = other > most ? other : most;
  }
  for (int part = 0; part < p.parts; ++part) {
    const float* of_part = p.exponents + (row * p.parts + part) * 2;
    if (of_part[1] > 0) sum += of_part[1] * expf(of_part[0] - most);
  }
  p.log_sum[row] = most + logf(sum);
}

}  // namespace lora_kernels::cuda
