// Small kernels beside the products: factors in another type or layout, parts added in order, sums of columns.
#pragma once

#include "cuda/epilogue.h"
#include "cuda/primitives/launch.h"
#include "cuda/routing.h"
#include "cuda/tile.h"

namespace lora_kernels::cuda {

struct ConvertParams {
  Factor from;         // element (row, column) at row * stride_rank + column * stride_out
  void* to = nullptr;  // [rows, columns] contiguous of T
  int rows = 0, columns = 0;
};

// 32 x 32 elements by 256 threads, through shared memory: both sides are read and written along memory.
template <class T>
__global__ void __launch_bounds__(256) convert_factor(const ConvertParams p) {
  let_next_kernel_start();
  wait_for_kernel_before();
  Shared shared;
  float* tile = shared.take<float>(32 * 33);
  const int row = static_cast<int>(blockIdx.y) * 32, column = static_cast<int>(blockIdx.x) * 32;
  const bool across = p.from.stride_rank < p.from.stride_out;
  for (int i = static_cast<int>(threadIdx.x); i < 32 * 32; i += 256) {
    const int r = across ? i % 32 : i / 32, c = across ? i / 32 : i % 32;
    tile[r * 33 + c] = row + r < p.rows && column + c < p.columns ? p.from.at(row + r, column + c) : 0.0f;
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < 32 * 32; i += 256) {
    const int r = i / 32, c = i % 32;
    if (row + r < p.rows && column + c < p.columns)
      static_cast<T*>(p.to)[static_cast<int64_t>(row + r) * p.columns + column + c] = from_float<T>(tile[r * 33 + c]);
  }
}

struct AddPartsParams {
  const float* parts = nullptr;  // [splits, count]
  float* out = nullptr;
  int splits = 0;
  int64_t count = 0;
};

template <class T>
__global__ void __launch_bounds__(256) add_parts(const AddPartsParams p) {
  let_next_kernel_start();
  wait_for_kernel_before();
  for (int64_t i = int64_t{blockIdx.x} * 256 + threadIdx.x; i < p.count; i += int64_t{gridDim.x} * 256) {
    T sum = 0;
    for (int s = 0; s < p.splits; ++s) sum += p.parts[s * p.count + i];
    p.out[i] = sum;
  }
}

struct ColumnSumsParams {
  const void* rows = nullptr;  // [count, columns] contiguous of T
  float* out = nullptr;
  int64_t count = 0;
  int columns = 0;
};

// 32 columns by a block, whose eight warps take every eighth row.
template <class T>
__global__ void __launch_bounds__(256) column_sums(const ColumnSumsParams p) {
  let_next_kernel_start();
  wait_for_kernel_before();
  Shared shared;
  float* parts = shared.take<float>(256);
  const int thread = static_cast<int>(threadIdx.x), column = static_cast<int>(blockIdx.x) * 32 + thread % 32;
  float sum = 0;
  if (column < p.columns)
#pragma unroll 8
    for (int64_t m = thread / 32; m < p.count; m += 8)
      sum += to_float(static_cast<const T*>(p.rows)[m * p.columns + column]);
  parts[thread] = sum;
  __syncthreads();
  if (thread < 32 && column < p.columns) {
    sum = 0;
    for (int w = 0; w < 8; ++w) sum += parts[w * 32 + thread];
    p.out[column] = sum;
  }
}

}  // namespace lora_kernels::cuda
