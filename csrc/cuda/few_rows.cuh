// y of up to 32 rows, by the products of skinny.cuh.
//
//   few_rows  y [M, N]   16 rows of W (columns of y) against up to 32 rows of x
//   combine              sums of the parts into which few_rows was split, in order
//
// W is read once: N K * element size over the bandwidth is the time of few_rows; x, A and B are small and come from L2.
// t of one adapter is made beside y: blocks ask for their part of W first, and make t while it is on its way. Of a
// cluster (sm_90 on) each makes a part of depth of t for all, or A would want as much of the way from L2 as W does.
//
// Not measured: no GPU has run this. Not tried: x in shared memory (at 32 rows it is read twice as often as W, from
// L1).
#pragma once

#include "cuda/primitives/cluster.h"
#include "cuda/primitives/tma.h"
#include "cuda/skinny.cuh"

namespace lora_kernels::cuda {

// The LoRA branch of few_rows and combine, element by element.
struct Branch {
  const void* t = nullptr;
  int64_t t_stride = 0;
  Factor up;
  Routing routing;

  // The terms part, part + parts, ... of (t B)(row, column).
  template <class T>
  __device__ float at(int row, int column, int part, int parts) const {
    const int adapter = routing.adapter_of(row);
    if (adapter < 0) return 0;
    const int begin = routing.begin(adapter), rank = routing.rank(adapter);
    const T* of_row = static_cast<const T*>(t) + row * t_stride;
    float sum = 0;
#pragma unroll 4
    for (int r = part; r < rank; r += parts) sum += to_float(of_row[r]) * up.at(begin + r, column);
    return sum;
  }
};

struct FewRowsParams {
  Matrix w;  // [N, K]
  Matrix x;  // [M, K], M <= 32
  Branch branch;
  Epilogue epilogue;
  int splits = 1;
  float* sums = nullptr;  // [splits, M, N] if there are several
  bool precise = false;
  // Blocks make t of one adapter of at most 16 ranks themselves, each for a part of depth and for all of its cluster:
  // r K / cluster of A from L2 in place of another kernel.
  bool makes_t = false;
  int cluster = 1;
  Matrix a;  // [r, K]
};

// Parts of y and of t, and with t its parts by all blocks of a cluster, and B.
template <int kTiles>
constexpr size_t few_rows_bytes(bool makes_t, int cluster) {
  constexpr size_t kPart = kSkinnyRows * 8 * kTiles * sizeof(float);
  return kSkinnyWarps * kPart + (makes_t ? kSkinnyWarps * kPart + kSkinnyRows * kSkinnyRows * sizeof(float) : 0) +
         (cluster > 1 ? 16 + cluster * kPart : 0);
}

// t of one adapter, made beside y: [16 ranks, 8 kTiles rows], unscaled.
template <class T, int kTiles>
class BlocksT {
  static constexpr int kWidth = 8 * kTiles, kWords = kSkinnyRows * kWidth;

 public:
  // By all threads; asks for what is wanted in the end, so that nothing has to wait for it then.
  __device__ BlocksT(const FewRowsParams& p, Shared& shared, int column)
      : p_(p), rank_(static_cast<int>(blockIdx.x) % p.cluster) {
    if (!p.makes_t) return;
    parts_ = shared.take<float>(kSkinnyWarps * kWords);
    b_ = shared.take<float>(kSkinnyRows * kSkinnyRows);
    if (p.cluster > 1) {
      arrived_ = shared.take<uint64_t>(1);
      all_ = shared.take<float>(p.cluster * kWords);
      if (threadIdx.x == 0) {
        init_arrivals(arrived_);
        fence_arrivals();
        expect_bytes(arrived_, p.cluster * kSkinnyRows * quads() * 16);
      }
      arrive_in_cluster();
    }
    const int r = static_cast<int>(threadIdx.x) / kSkinnyRows, n = static_cast<int>(threadIdx.x) % kSkinnyRows;
    of_b_ = r < p.a.rows && column + n < p.w.rows ? p.branch.up.at(r, column + n) : 0.0f;
    adapter_rank_ = p.branch.routing.rank(0);
    scale_ = p.branch.routing.scale(0);
  }

  // The block's part of depth, and sends it to all of the cluster.
  __device__ void make() {
    if (!p_.makes_t) return;
    const int steps = (p_.x.columns + kStep<T> - 1) / kStep<T>, all = kSkinnyWarps * p_.cluster;
    const int part = rank_ * kSkinnyWarps + static_cast<int>(threadIdx.x) / 32;
    float t[kTiles][4] = {};  // A in the place of W: t transposed
    skinny_product<T, kTiles>(t, p_.a, 0, p_.a.rows, p_.x, 0, p_.x.rows, static_cast<int>(int64_t{steps} * part / all),
                              static_cast<int>(int64_t{steps} * (part + 1) / all), p_.precise, Dropout());
    share_parts<kTiles>(parts_, t);
    b_[threadIdx.x] = of_b_;
    if (p_.cluster == 1) {
      for (int i = static_cast<int>(threadIdx.x); i < kSkinnyRows * p_.x.rows; i += kSkinnyThreads) {
        const int r = i % kSkinnyRows, m = i / kSkinnyRows;  // each element is added up and left by one thread
        parts_[r * kWidth + m] = sum_of_parts<kTiles>(parts_, r, m);
      }
      return;
    }
    wait_for_cluster();  // the barriers of all are there
    for (int i = static_cast<int>(threadIdx.x); i < kSkinnyRows * quads() * p_.cluster; i += kSkinnyThreads) {
      const int r = i % kSkinnyRows, m = i / kSkinnyRows % quads() * 4, block = i / kSkinnyRows / quads();
      Vector v;
#pragma unroll
      for (int j = 0; j < 4; ++j) v.v[j] = __float_as_uint(sum_of_parts<kTiles>(parts_, r, m + j));
      send16(all_ + rank_ * kWords + r * kWidth + m, v, arrived_, static_cast<unsigned>(block));
    }
  }

  // Behind a barrier of the block behind make(): the whole of t. Ends with a barrier where there is a cluster.
  __device__ void gather() {
    if (!p_.makes_t || p_.cluster == 1) return;
    wait_for_phase(arrived_, 0);
    for (int i = static_cast<int>(threadIdx.x); i < kSkinnyRows * p_.x.rows; i += kSkinnyThreads) {
      const int at = i % kSkinnyRows * kWidth + i / kSkinnyRows;
      float sum = 0;
      for (int b = 0; b < p_.cluster; ++b) sum += all_[b * kWords + at];
      parts_[at] = sum;
    }
    __syncthreads();
  }

  // The terms part, part + parts, ... of (t B)(row, n), n of the block's sixteen columns.
  __device__ float of(int row, int n, int part, int parts) const {
    if (p_.branch.routing.adapter_of(row) != 0) return 0;
    float sum = 0;
    for (int r = part; r < adapter_rank_; r += parts) sum += parts_[r * kWidth + row] * b_[r * kSkinnyRows + n];
    return sum * scale_;
  }

 private:
  static_assert(kSkinnyThreads == kSkinnyRows * kSkinnyRows, "a thread for each element of B");
  __device__ int quads() const { return (p_.x.rows + 3) / 4; }

  const FewRowsParams& p_;
  int rank_, adapter_rank_ = 0;
  float *parts_ = nullptr, *b_ = nullptr, *all_ = nullptr;
  uint64_t* arrived_ = nullptr;
  float of_b_ = 0, scale_ = 0;
};

// Grid (N / 16, splits), in whole clusters; kTiles * 8 >= M.
template <class T, int kTiles>
__global__ void __launch_bounds__(kSkinnyThreads, 2) few_rows(const FewRowsParams p) {
  if constexpr (kCompiled<T>) {
    Shared shared;
    float* parts = shared.take<float>(kSkinnyWarps * kSkinnyRows * 8 * kTiles);
    const int column = static_cast<int>(blockIdx.x) * kSkinnyRows, rows = p.x.rows, columns = p.w.rows;
    const int steps = (p.x.columns + kStep<T> - 1) / kStep<T>, all = kSkinnyWarps * p.splits;
    const int part = static_cast<int>(blockIdx.y) * kSkinnyWarps + static_cast<int>(threadIdx.x) / 32;
    const int first = static_cast<int>(int64_t{steps} * part / all);
    const int last = static_cast<int>(int64_t{steps} * (part + 1) / all);
    // All of the warp's part of W at once: registers hold four steps.
    const int64_t from = int64_t{first} * kStepBytes, to = p.w.columns * static_cast<int64_t>(sizeof(T));
    for (int r = 0; r < kSkinnyRows && column + r < columns; ++r)
      prefetch(static_cast<const char*>(p.w.data) + (column + r) * p.w.stride * static_cast<int64_t>(sizeof(T)) + from,
               min(int64_t{last} * kStepBytes, to) - from, lane_of_warp(), 32);
    BlocksT<T, kTiles> t(p, shared, column);
    t.make();
    float c[kTiles][4] = {};
    skinny_product<T, kTiles>(c, p.w, column, columns, p.x, 0, rows, first, last, p.precise, Dropout());
    share_parts<kTiles>(parts, c);
    t.gather();
    wait_for_kernel_before();
    // At few rows several lanes share the ranks of an element; a power of two of them, so that shuffles add them up.
    int lanes = 16;
    while (lanes > 1 && lanes * rows > 16) lanes /= 2;
    const int work = kSkinnyRows * rows * lanes;
    for (int i = static_cast<int>(threadIdx.x); i - lane_of_warp() < work; i += kSkinnyThreads) {
      const int element = i / lanes, m = element / kSkinnyRows, n = element % kSkinnyRows;
      const bool valid = i < work && column + n < columns;
      float branch = 0;
      if (valid && p.makes_t)
        branch = t.of(m, n, i % lanes, lanes);
      else if (valid && p.splits == 1)
        branch = p.branch.template at<T>(m, column + n, i % lanes, lanes);
      for (int by = lanes / 2; by > 0; by /= 2) branch += __shfl_xor_sync(~0u, branch, by);
      if (!valid || i % lanes) continue;
      const float sum = sum_of_parts<kTiles>(parts, n, m);
      if (p.splits == 1)
        p.epilogue.template store<T>(sum + branch, m, column + n);
      else
        p.sums[(static_cast<int64_t>(blockIdx.y) * rows + m) * columns + column + n] = sum;
    }
  }
}

struct CombineParams {
  const float* sums = nullptr;  // [splits, rows, columns]
  int splits = 1, rows = 0;
  Branch branch;
  Epilogue epilogue;
};

// A thread for each element.
template <class T>
__global__ void __launch_bounds__(256) combine(const CombineParams p) {
  const int i = static_cast<int>(blockIdx.x * 256 + threadIdx.x), all = p.rows * p.epilogue.columns;
  if (i >= all) return;
  const int row = i / p.epilogue.columns, column = i % p.epilogue.columns;
  float sum = 0;
  for (int s = 0; s < p.splits; ++s) sum += p.sums[static_cast<int64_t>(s) * all + i];
  p.epilogue.template store<T>(sum + p.branch.template at<T>(row, column, 0, 1), row, column);
}

}  // namespace lora_kernels::cuda
