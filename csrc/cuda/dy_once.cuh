// u = s dy Bt and dB = tt dy of one adapter from one reading of dy, which both would otherwise read from memory.
//
//   dy_once     dy [M, N], B [r, N], t [M, r]: sums of u over a range of columns, of dB over a range of rows
//   join_parts  adds both in order: u [M, r] in the type of dy, dB [r, N] fp32
//
// Bytes: M N * element size for dy, and the parts, (column splits * M + row splits * N) * r * 4, written and read.
// FLOPs 4 M N r: at rank 16, 32 to a byte of fp16, far below what a device has, so memory is the bound; the plan
// (lora_linear_plan.cpp) says where it is not. A block goes through its columns 64 at a time and for each of these
// through all of its rows, so dB of 64 columns is in registers, and u of its rows in shared memory, each element in the
// hands of one thread. Not measured: no GPU has run this.
#pragma once

#include "cuda/primitives/launch.h"
#include "cuda/routing.h"
#include "cuda/tile.h"

namespace lora_kernels::cuda {

constexpr int kDyOnceThreads = 128, kDyOnceTile = 64;  // rows, and columns, of a step
constexpr int kDyOnceRank = 32;                        // the most ranks

struct DyOnceParams {
  Matrix dy;  // [M, N]
  Matrix b;   // [R, N]
  Matrix t;   // [M, r]
  Routing routing;
  int row_tiles = 1;                      // of a block
  int row_splits = 1, column_splits = 1;  // blocks
  int width = 16;                         // the largest rank, rounded up to 16
  float* u_parts = nullptr;               // [column_splits, M, width]
  float* b_parts = nullptr;               // [row_splits, R, N]
  bool precise = false;
};

template <class T>
struct DyOnceLayout {
  using Dy = Tile<T, kDyOnceTile, kDyOnceTile>;
  using B = Tile<T, kDyOnceRank, kDyOnceTile>;
  using U = Tile<T, kDyOnceTile, kDyOnceRank>;  // of t, whose depth in dB are the rows
  static constexpr int kStages = sizeof(T) == 2 ? 3 : 2;
  static constexpr int kStageBytes = Dy::kBytes + B::kBytes + U::kBytes;
};

template <class T>
inline size_t dy_once_bytes(int row_tiles, int width) {
  return static_cast<size_t>(DyOnceLayout<T>::kStages) * DyOnceLayout<T>::kStageBytes +
         static_cast<size_t>(row_tiles) * kDyOnceTile * static_cast<size_t>(width) * sizeof(float);
}

template <class T>
class DyOnce {
  using Layout = DyOnceLayout<T>;
  using Dy = typename Layout::Dy;
  using B = typename Layout::B;
  using U = typename Layout::U;
  static constexpr int kStages = Layout::kStages;
  static constexpr int kSteps = kDyOnceTile * static_cast<int>(sizeof(T)) / 32;  // tensor-core steps of 64 elements

 public:
  __device__ DyOnce(const DyOnceParams& p, int row_split, int column_split)
      : p_(p), begin_(p.routing.begin(0)), rank_(p.routing.rank(0)), width_(p.width) {
    dy_ = shared_.template take<char>(kStages * Dy::kBytes);
    b_ = shared_.template take<char>(kStages * B::kBytes);
    t_ = shared_.template take<char>(kStages * U::kBytes);
    u_ = shared_.template take<float>(p.row_tiles * kDyOnceTile * width_);
    const int row_tiles = (p.dy.rows + kDyOnceTile - 1) / kDyOnceTile;
    const int column_tiles = (p.dy.columns + kDyOnceTile - 1) / kDyOnceTile;
    first_row_ = row_split * p.row_tiles;
    rows_ = row_tiles - first_row_ < p.row_tiles ? row_tiles - first_row_ : p.row_tiles;
    first_column_ = static_cast<int>(int64_t{column_tiles} * column_split / p.column_splits);
    columns_ = static_cast<int>(int64_t{column_tiles} * (column_split + 1) / p.column_splits) - first_column_;
    warp_ = static_cast<int>(threadIdx.x) / 32;
  }

  __device__ void run(int row_split, int column_split) {
    const int steps = rows_ * columns_;
    for (int k = 0; k < kStages - 1; ++k) fetch(k, steps);
    for (int k = 0; k < steps; ++k) {
      wait_copies<kStages - 2>();
      __syncthreads();  // step k has landed for all, and all are done with the step whose place is filled next
      fetch(k + kStages - 1, steps);
      const char *dy = dy_ + k % kStages * Dy::kBytes, *b = b_ + k / rows_ % kStages * B::kBytes;
      multiply_u(dy, b, k % rows_, k < rows_);
      multiply_b(dy, t_ + k % kStages * U::kBytes);
      if (k % rows_ == rows_ - 1) store_b(row_split, first_column_ + k / rows_);
    }
    store_u(column_split);
  }

 private:
  __device__ void fetch(int k, int steps) {
    if (k < steps) {
      const int row = (first_row_ + k % rows_) * kDyOnceTile, column = (first_column_ + k / rows_) * kDyOnceTile;
      const auto uses = [&](int r) { return p_.routing.adapter_of(row + r) == 0; };
      load_tile<Dy, kDyOnceThreads>(dy_ + k % kStages * Dy::kBytes, p_.dy, row, column, uses);
      Matrix t = p_.t;
      t.columns = rank_;
      load_tile<U, kDyOnceThreads>(t_ + k % kStages * U::kBytes, t, row, 0, uses);
      if (k % rows_ == 0) {  // it stays for all rows of these columns
        Matrix b = p_.b;
        b.rows = begin_ + rank_;
        load_tile<B, kDyOnceThreads>(b_ + k / rows_ % kStages * B::kBytes, b, begin_, column);
      }
    }
    commit_copies();
  }

  // u of this warp's sixteen rows, depth along the columns of dy.
  __device__ void multiply_u(const char* dy, const char* b_tile, int row_tile, bool first) {
    const int g = lane_of_warp() / 4, t = lane_of_warp() % 4;
    float c[kDyOnceRank / 8][4] = {};
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      uint32_t a[4], b[4];
      load_a<Dy>(a, dy, warp_ * 16, s);
#pragma unroll
      for (int j = 0; j < kDyOnceRank / 8; j += 2) {
        if (j * 8 >= rank_) continue;
        load_b<B>(b, b_tile, j * 8, s);
        product<T>(c[j], a, b[0], b[1], p_.precise);
        product<T>(c[j + 1], a, b[2], b[3], p_.precise);
      }
    }
#pragma unroll
    for (int j = 0; j < kDyOnceRank / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int column = j * 8 + t * 2 + e % 2;
        if (column >= width_) continue;
        float* sum = u_ + (row_tile * kDyOnceTile + warp_ * 16 + g + e / 2 * 8) * width_ + column;
        *sum = first ? c[j][e] : *sum + c[j][e];
      }
  }

  // dB of this warp's sixteen columns, depth across the rows of dy.
  __device__ void multiply_b(const char* dy, const char* t_tile) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      uint32_t a[4], b[4];
      load_b_across<Dy>(b, dy, warp_ * 16, s);
#pragma unroll
      for (int i = 0; i < kDyOnceRank / 16; ++i) {
        if (i * 16 >= rank_) continue;
        load_a_across<U>(a, t_tile, i * 16, s);
        product<T>(c_[i][0], a, b[0], b[1], p_.precise);
        product<T>(c_[i][1], a, b[2], b[3], p_.precise);
      }
    }
  }

  __device__ void store_b(int row_split, int column_tile) {
    const int g = lane_of_warp() / 4, t = lane_of_warp() % 4;
    float* parts = p_.b_parts + static_cast<int64_t>(row_split) * p_.routing.total_rank * p_.dy.columns;
#pragma unroll
    for (int i = 0; i < kDyOnceRank / 16; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int r = i * 16 + g + e / 2 * 8;
          const int column = column_tile * kDyOnceTile + warp_ * 16 + j * 8 + t * 2 + e % 2;
          if (r < rank_ && column < p_.dy.columns)
            parts[static_cast<int64_t>(begin_ + r) * p_.dy.columns + column] = c_[i][j][e];
          c_[i][j][e] = 0;
        }
  }

  __device__ void store_u(int column_split) const {
    __syncthreads();  // a row is read by other threads than those that added it up
    const int first = first_row_ * kDyOnceTile;
    float* parts = p_.u_parts + (static_cast<int64_t>(column_split) * p_.dy.rows + first) * width_;
    const int left = p_.dy.rows - first, rows = rows_ * kDyOnceTile < left ? rows_ * kDyOnceTile : left;
    for (int i = static_cast<int>(threadIdx.x); i < rows * width_; i += kDyOnceThreads) parts[i] = u_[i];
  }

  const DyOnceParams& p_;
  Shared shared_;
  int begin_, rank_, width_;
  char *dy_, *b_, *t_;
  float* u_;
  int first_row_, rows_, first_column_, columns_, warp_;  // in tiles
  float c_[kDyOnceRank / 16][2][4] = {};
};

// Grid (column_splits, row_splits); no more columns than tiles of them.
template <class T>
__global__ void __launch_bounds__(kDyOnceThreads) dy_once(const DyOnceParams p) {
  if constexpr (kCompiled<T>) {
    let_next_kernel_start();
    wait_for_kernel_before();
    DyOnce<T> block(p, static_cast<int>(blockIdx.y), static_cast<int>(blockIdx.x));
    block.run(static_cast<int>(blockIdx.y), static_cast<int>(blockIdx.x));
  }
}

struct JoinPartsParams {
  DyOnceParams from;
  float factor = 1;   // 1 / (1 - p)
  void* u = nullptr;  // [M, u_stride]
  int64_t u_stride = 0;
  float* dlora_b = nullptr;  // [R, N]
};

template <class T>
__global__ void __launch_bounds__(256) join_parts(const JoinPartsParams p) {
  if constexpr (kCompiled<T>) {
    let_next_kernel_start();
    wait_for_kernel_before();
    const DyOnceParams& f = p.from;
    const int width = f.width, begin = f.routing.begin(0), rank = f.routing.rank(0);
    const int64_t us = int64_t{f.dy.rows} * width, bs = int64_t{rank} * f.dy.columns;
    const int64_t step = int64_t{f.routing.total_rank} * f.dy.columns;
    const float scale = f.routing.scale(0) * p.factor;
    for (int64_t i = int64_t{blockIdx.x} * 256 + threadIdx.x; i < us + bs; i += int64_t{gridDim.x} * 256) {
      float sum = 0;
      if (i < us) {
        for (int s = 0; s < f.column_splits; ++s) sum += f.u_parts[s * us + i];
        const int64_t row = i / width;
        const int r = static_cast<int>(i % width);
        if (r < rank) static_cast<T*>(p.u)[row * p.u_stride + r] = from_float<T>(sum * scale);
      } else {
        const int64_t at = int64_t{begin} * f.dy.columns + (i - us);
        for (int s = 0; s < f.row_splits; ++s) sum += f.b_parts[s * step + at];
        p.dlora_b[at] = sum;
      }
    }
  }
}

}  // namespace lora_kernels::cuda
