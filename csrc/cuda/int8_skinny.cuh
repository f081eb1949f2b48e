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
// whichever operator it belongs to. Then w comes to shared memory while the block makes its rows (staged_w), or to
// registers.
//
// Sums over depth do not care for the order of k: lane t takes the sixteen k that lie together in q, 16 t ... of 64,
// and the steps 4 t ... 4 t + 3 of w, which are the same k. Registers 0 and 1 go to one product, 2 and 3 to the next.
//
// Not measured: no GPU has run this.
#pragma once

#include "cuda/int8_exchange.cuh"
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
  int cluster = 1;          // blocks that share out depth, if splits is 1
  bool staged_w = false;    // kFused: a block's part of w fits into its shared memory
};

// The sixteen bytes of w at four steps each.
struct Int8Fragment {
  Vector v[4];
};

// y from the sums over depth of `channels` channels from `column` on. A power of two of lanes shares the ranks of an
// element, so that shuffles add them up: eight at few rows.
template <class T, class Sum>
__device__ inline void int8_finish(const Int8FewRowsParams& p, const Int8Branch& branch, const float* scales,
                                   int column, int channels, const Sum& sum) {
  const int lane = lane_of_warp(), rows = p.rows.x.rows;
  int lanes = 8;
  while (lanes > 1 && lanes * rows * channels > kInt8Threads) lanes /= 2;
  const int work = channels * rows * lanes;
  for (int i = static_cast<int>(threadIdx.x); i - lane < work; i += kInt8Threads) {
    const int element = i / lanes, m = element / channels, n = element % channels;
    const bool valid = i < work && column + n < p.w.columns;
    float of_branch = 0;
    if (valid && p.splits == 1) of_branch = branch.template at<T>(branch.t, m, column + n, i % lanes, lanes);
    for (int by = lanes / 2; by > 0; by /= 2) of_branch += __shfl_xor_sync(~0u, of_branch, by);
    if (!valid || i % lanes) continue;
    if (p.splits == 1)
      p.epilogue.template store<T>(static_cast<float>(sum(m, n)) * (scales[m] * p.w.scale(column + n)) + of_branch, m,
                                   column + n);
    else
      p.sums[(static_cast<int64_t>(blockIdx.y) * rows + m) * p.w.columns + column + n] = sum(m, n);
  }
}

template <class T, int kTiles, bool kFused>
__device__ inline void int8_few_rows_of(const Int8FewRowsParams& p) {
  if constexpr (kCompiled<T>) {
    Shared shared;
    const int lane = lane_of_warp(), g = lane / 4, t = lane % 4, rows = p.rows.x.rows;
    // The block's part of depth, among those of a cluster or of a split, in which each warp has one.
    const int parts = p.cluster > 1 ? p.cluster : p.splits;
    const int of_parts = p.cluster > 1 ? static_cast<int>(blockIdx.x) % p.cluster : static_cast<int>(blockIdx.y);
    const int column = static_cast<int>(blockIdx.x) / p.cluster * kInt8FewColumns;
    const int64_t steps = (p.rows.x.columns + kInt8Step - 1) / kInt8Step;
    const int begin = static_cast<int>(steps * of_parts / parts),
              end = static_cast<int>(steps * (of_parts + 1) / parts);
    const int warp = static_cast<int>(threadIdx.x) / 32;
    const int last = begin + (end - begin) * (warp + 1) / kInt8Warps;
    int step = begin + (end - begin) * warp / kInt8Warps;

    let_next_kernel_start();
    // Lines of 128 bytes at steps of four k.
    for (int at = step * 16 + lane; at < last * 16 && at < p.w.steps; at += 32) prefetch(p.w.at(column, at), 128, 0, 1);
    if constexpr (kFused) prefetch_factor<T>(p.rows, static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x));
    const int kept = kFused ? rows : 16 * kTiles;
    int32_t* sums = shared.take<int32_t>(kInt8Warps * kept * kInt8FewColumns);
    const int t_stride = kFused && p.branch.routing.adapters ? static_cast<int>(p.branch.t_stride) : 0;
    Int8Exchange exchange(shared, p.cluster, rows, t_stride);
    wait_for_kernel_before();

    // Plain loads: those of the read-only path a compiler moves over the wait, as what nothing ever writes. They read
    // shared memory as well, where pieces of 16 bytes lie so that eight lanes meet no conflict.
    const uint8_t* staged_w = nullptr;
    const auto load_weight = [&](int s) {
      Int8Fragment f;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = s * 16 + t * 4 + i;
        const Vector zero = {{0, 0, 0, 0}};
        const uint8_t* from =
            staged_w ? staged_w + (at - begin * 16) * 128 + (g ^ t * 2) * 16 : p.w.at(column + g * 4, at);
        f.v[i] = s < last && at < p.w.steps ? load16(from) : zero;
      }
      return f;
    };
    const int8_t* q = p.rows.q;
    const int64_t q_stride = p.rows.q_stride;
    const float* scales = p.rows.scales;
    Int8Branch branch = p.branch;
    if constexpr (kFused) {
      int8_t* own_q = shared.take<int8_t>(static_cast<int>(rows * q_stride));
      float* own_scales = shared.take<float>(kInt8Rows);
      T* own_t = shared.take<T>(static_cast<int>(rows * p.branch.t_stride));
      Int8Rows<T, 2> own(p.rows, shared, 0, begin * kInt8Step, end * kInt8Step);
      if (p.staged_w) {  // on its way while the rows are made
        uint8_t* memory = shared.take<uint8_t>((end - begin) * 16 * 128);
        const int lines = (end * 16 < p.w.steps ? end * 16 : p.w.steps) - begin * 16;
#pragma unroll 1
        for (int i = static_cast<int>(threadIdx.x); i < lines * 8; i += kInt8Threads) {
          const int line = i / 8, piece = i % 8;
          copy16_async(memory + line * 128 + (piece ^ line / 4 % 4 * 2) * 16,
                       p.w.at(column + piece * 4, begin * 16 + line), 16);
        }
        staged_w = memory;
      }
      own.run(own_q, own_scales, [&](int m, int r, float sum, float scale) {
        if (p.cluster > 1)
          exchange.own_t()[m * t_stride + r] = sum;
        else
          own_t[m * t_stride + r] = from_float<T>(sum * scale);
      });
      q = own_q;
      scales = own_scales;
      branch.t = own_t;
      branch.routing = own.routing();
    }

    int32_t c[kTiles][4][4] = {};
    Int8Fragment next = load_weight(step);
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
    int32_t* mine = sums + warp * kept * kInt8FewColumns;
#pragma unroll
    for (int r = 0; r < kTiles; ++r)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int m = r * 16 + g + e / 2 * 8;
        if (m >= kept) continue;
#pragma unroll
        for (int j = 0; j < 4; ++j) mine[m * kInt8FewColumns + t * 8 + e % 2 * 4 + j] = c[r][j][e];
      }
    __syncthreads();
    const auto of_warps = [&](int m, int n) {
      int32_t sum = 0;
#pragma unroll
      for (int w = 0; w < kInt8Warps; ++w) sum += sums[(w * kept + m) * kInt8FewColumns + n];
      return sum;
    };
    if (p.cluster == 1) {
      int8_finish<T>(p, branch, scales, column, kInt8FewColumns, of_warps);
      return;
    }
    exchange.run(of_warps);
    if constexpr (kFused) {
      T* own_t = static_cast<T*>(const_cast<void*>(branch.t));
      for (int i = static_cast<int>(threadIdx.x); i < rows * t_stride; i += kInt8Threads) {
        const int adapter = branch.routing.adapter_of(i / t_stride);
        if (adapter >= 0) own_t[i] = from_float<T>(exchange.t(i) * branch.routing.scale(adapter));
      }
      __syncthreads();
    }
    const int channels = kInt8FewColumns / p.cluster;
    int8_finish<T>(p, branch, scales, column + of_parts * channels, channels,
                   [&](int m, int n) { return exchange.sum(m, n); });
  }
}

// Grid (N / 32 * cluster, splits); kTiles * 16 >= M.
template <class T, int kTiles, bool kFused>
__global__ void __launch_bounds__(kInt8Threads, 2) int8_few_rows(const Int8FewRowsParams p) {
  int8_few_rows_of<T, kTiles, kFused>(p);
}

// Calls of the same sizes that need nothing of each other, in one launch: q, k and v of a decoder's layer.
struct Int8Together {
  Int8FewRowsParams of[kInt8MostTogether];
};
static_assert(sizeof(Int8Together) <= 4096, "a kernel has no more parameters everywhere");

// Grid (N / 32 * cluster, 1, calls). Parameters that are found by an index want registers beyond the 128 of two blocks;
// there are hardly more blocks than multiprocessors.
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
