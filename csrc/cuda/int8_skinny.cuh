// int8_lora_linear for up to 32 rows: w streams from memory straight into registers.
//
//   few_rows  y [M, N]: 32 channels by a block, whose eight warps take eight parts of depth
//   together  few_rows of up to three calls that need nothing of each other
//   combine   integer sums of the parts into which few_rows was split, then what follows them
//
// w is read once, as it is packed: four steps of 128 bytes by a warp at a time; N K bytes over the bandwidth is the
// time of few_rows. q, t and B are small and come from L2. Sums are integers: exact in any order, so splitting depth
// changes no bit. The rows are quantized by int8_rows before, or by every block for itself (kFused), which saves that
// kernel and costs M K reads of x and, with LoRA, r K of A from L2 for each 32 channels.
//
// It starts before the kernel before it has finished (sm_90 on), and asks for its part of w to come to L2 meanwhile:
// all of it at once, where registers hold two steps of a warp. Nothing is loaded before that kernel has finished,
// whichever operator it belongs to.
//
// Sums over depth do not care for the order of k: lane t takes the sixteen k that lie together in q, 16 t ... of 64,
// and the steps 4 t ... 4 t + 3 of w, which are the same k. Registers 0 and 1 go to one product, 2 and 3 to the next.
//
// Not measured: no GPU has run this.
#pragma once

#include "cuda/int8_operands.h"
#include "cuda/int8_rows.cuh"

namespace lora_kernels::cuda {

// The LoRA branch, element by element.
struct Int8Branch {
  const void* t = nullptr;
  int64_t t_stride = 0;
  UpFactor up;
  Routing routing;

  // The terms part, part + parts, ... of (t B)(row, column), t by rows from `of_rows` on.
  template <class T>
  __device__ float at(const void* of_rows, int row, int column, int part, int parts) const {
    const int adapter = routing.adapter_of(row);
    if (adapter < 0) return 0;
    const int begin = routing.begin(adapter), rank = routing.rank(adapter);
    const T* of_row = static_cast<const T*>(of_rows) + row * t_stride;
    float sum = 0;
#pragma unroll 4
    for (int r = part; r < rank; r += parts) sum += to_float(of_row[r]) * up.at(begin + r, column);
    return sum;
  }
};

struct Int8FewRowsParams {
  Int8RowsParams rows;  // kFused: what to quantize, q_stride of shared memory; else its q and scales are read
  PackedWeight w;
  Int8Branch branch;
  Int8Epilogue epilogue;
  int splits = 1;
  int32_t* sums = nullptr;  // [splits, M, N] if there are several
};

template <int kTiles>
constexpr int kInt8PartWords = static_cast<int>(int8_part_bytes(kTiles) / 4);

// The sixteen bytes of w at four steps each.
struct Int8Fragment {
  Vector v[4];
};

template <class T, int kTiles, bool kFused>
__device__ inline void int8_few_rows_of(const Int8FewRowsParams& p) {
  if constexpr (kCompiled<T>) {
    Shared shared;
    const int lane = lane_of_warp(), g = lane / 4, t = lane % 4, rows = p.rows.x.rows, columns = p.w.columns;
    const int column = static_cast<int>(blockIdx.x) * kInt8FewColumns;
    const int steps = (p.rows.x.columns + kInt8Step - 1) / kInt8Step, all = kInt8Warps * p.splits;
    const int part = static_cast<int>(blockIdx.y) * kInt8Warps + static_cast<int>(threadIdx.x) / 32;
    const int last = static_cast<int>(int64_t{steps} * (part + 1) / all);
    int step = static_cast<int>(int64_t{steps} * part / all);

    let_next_kernel_start();
    // Lines of 128 bytes at steps of four k.
    for (int at = step * 16 + lane; at < last * 16 && at < p.w.steps; at += 32) prefetch(p.w.at(column, at), 128, 0, 1);
    if constexpr (kFused) prefetch_factor<T>(p.rows, static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x));
    wait_for_kernel_before();

    // Plain loads: those of the read-only path a compiler moves over the wait, as what nothing ever writes.
    const auto load_weight = [&](int s) {
      Int8Fragment f;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = s * 16 + t * 4 + i;
        const Vector zero = {{0, 0, 0, 0}};
        f.v[i] = s < last && at < p.w.steps ? load16(p.w.at(column + g * 4, at)) : zero;
      }
      return f;
    };
    // Weights are on their way while the rows are made.
    Int8Fragment next = load_weight(step);

    int32_t* parts = shared.take<int32_t>(kInt8PartWords<kTiles>);
    const int8_t* q = p.rows.q;
    const int64_t q_stride = p.rows.q_stride;
    const float* scales = p.rows.scales;
    const void* t_rows = p.branch.t;
    if constexpr (kFused) {
      int8_t* own_q = shared.take<int8_t>(static_cast<int>(kInt8Rows * q_stride));
      float* own_scales = shared.take<float>(kInt8Rows);
      T* own_t = shared.take<T>(static_cast<int>(kInt8Rows * p.branch.t_stride));
      Int8Rows<T, 2>(p.rows, shared, 0).run(own_q, own_scales, own_t);
      q = own_q;
      scales = own_scales;
      t_rows = own_t;
    }

    int32_t c[kTiles][4][4] = {};
    for (; step < last; ++step) {
      const Int8Fragment w = next;
      next = load_weight(step + 1);
#pragma unroll
      for (int r = 0; r < kTiles; ++r) {
        const int low_row = r * 16 + g, high_row = low_row + 8, k = step * kInt8Step + t * 16;
        const Vector zero = {{0, 0, 0, 0}};
        const Vector low = low_row < rows ? load16(q + low_row * q_stride + k) : zero;
        const Vector high = high_row < rows ? load16(q + high_row * q_stride + k) : zero;
#pragma unroll
        for (int h = 0; h < 4; h += 2) {
          const uint32_t a[4] = {low.v[h], high.v[h], low.v[h + 1], high.v[h + 1]};
#pragma unroll
          for (int j = 0; j < 4; ++j) mma_m16n8k32_s8(c[r][j], a, w.v[h].v[j], w.v[h + 1].v[j]);
        }
      }
    }
    int32_t* mine = parts + static_cast<int>(threadIdx.x) / 32 * 16 * kTiles * kInt8FewColumns;
#pragma unroll
    for (int r = 0; r < kTiles; ++r)
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          mine[(r * 16 + g + e / 2 * 8) * kInt8FewColumns + t * 8 + e % 2 * 4 + j] = c[r][j][e];
    __syncthreads();

    // At few rows several lanes share the ranks of an element; a power of two of them, so that shuffles add them up.
    int lanes = 8;
    while (lanes > 1 && lanes * rows > 8) lanes /= 2;
    const int work = kInt8FewColumns * rows * lanes;
    for (int i = static_cast<int>(threadIdx.x); i - lane < work; i += kInt8Threads) {
      const int element = i / lanes, m = element / kInt8FewColumns, n = element % kInt8FewColumns;
      const bool valid = i < work && column + n < columns;
      float branch = 0;
      if (valid && p.splits == 1) branch = p.branch.template at<T>(t_rows, m, column + n, i % lanes, lanes);
      for (int by = lanes / 2; by > 0; by /= 2) branch += __shfl_xor_sync(~0u, branch, by);
      if (!valid || i % lanes) continue;
      int32_t sum = 0;
#pragma unroll
      for (int w = 0; w < kInt8Warps; ++w) sum += parts[(w * 16 * kTiles + m) * kInt8FewColumns + n];
      if (p.splits == 1)
        p.epilogue.template store<T>(static_cast<float>(sum) * (scales[m] * p.w.scale(column + n)) + branch, m,
                                     column + n);
      else
        p.sums[(static_cast<int64_t>(blockIdx.y) * rows + m) * columns + column + n] = sum;
    }
  }
}

// Grid (N / 32, splits); kTiles * 16 >= M.
template <class T, int kTiles, bool kFused>
__global__ void __launch_bounds__(kInt8Threads, 2) int8_few_rows(const Int8FewRowsParams p) {
  int8_few_rows_of<T, kTiles, kFused>(p);
}

// Calls of the same sizes that need nothing of each other, in one launch: q, k and v of a decoder's layer.
struct Int8Together {
  Int8FewRowsParams of[kInt8MostTogether];
};
static_assert(sizeof(Int8Together) <= 4096, "a kernel has no more parameters everywhere");

// Grid (N / 32, 1, calls). Parameters that are found by an index want registers beyond the 128 of two blocks; there are
// hardly more blocks than multiprocessors.
template <class T>
__global__ void __launch_bounds__(kInt8Threads, 1) int8_together(const __grid_constant__ Int8Together p) {
  int8_few_rows_of<T, 1, true>(p.of[blockIdx.z]);
}

// A thread for each element.
template <class T>
__global__ void __launch_bounds__(256) int8_combine(const Int8FewRowsParams p) {
  let_next_kernel_start();
  wait_for_kernel_before();
  const int i = static_cast<int>(blockIdx.x * 256 + threadIdx.x), all = p.rows.x.rows * p.w.columns;
  if (i >= all) return;
  const int row = i / p.w.columns, column = i % p.w.columns;
  int32_t sum = 0;
  for (int s = 0; s < p.splits; ++s) sum += p.sums[static_cast<int64_t>(s) * all + i];
  const float of_base = static_cast<float>(sum) * (p.rows.scales[row] * p.w.scale(column));
  p.epilogue.template store<T>(of_base + p.branch.template at<T>(p.branch.t, row, column, 0, 1), row, column);
}

}  // namespace lora_kernels::cuda
