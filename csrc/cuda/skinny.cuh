// Products with one short side, whose operands stream from memory straight into registers: t = s drop(x) At (also
// u = s dy Bt of the backward pass) here, and y for up to 32 rows in few_rows.cuh.
//
//   down      t [M, r]   16 rows of x against the rank rows of their adapters
//
// Bytes: down reads x once for up to 32 ranks (r / 32 times beyond, from L2) and r K of A for every 16 rows.
//
// Sums over depth do not care for the order of k, so each lane takes the 16 bytes that lie together: four lanes read 64
// bytes of a row in one access, and both operands are permuted alike (lane t's 16 bytes are registers 0 and 1 of one
// tensor-core step, 2 and 3 of the next). The eight warps of a block take eight parts of depth and are added in order.
//
// Not measured: no GPU has run this.
#pragma once

#include "cuda/epilogue.h"
#include "cuda/primitives/launch.h"
#include "cuda/primitives/wgmma.h"
#include "cuda/routing.h"
#include "cuda/tile.h"

namespace lora_kernels::cuda {

constexpr int kSkinnyThreads = 256, kSkinnyWarps = kSkinnyThreads / 32, kSkinnyRows = 16;

// kFresh: what a kernel before this one in the same call has made, which the read-only path may not see.
template <bool kFresh>
__device__ inline Vector load16_of(const void* from) {
  return kFresh ? load16(from) : load16_constant(from);
}

// The sixteen bytes of a row from column k on; zeros where `valid` is false or the row ends.
template <class T, bool kFresh = false>
__device__ inline Vector row_chunk(const Matrix& m, int row, bool valid, int k) {
  const int left = valid ? m.columns - k : 0;
  const T* from = static_cast<const T*>(m.data) + (left > 0 ? row * m.stride + k : 0);
  if (m.aligned && left >= kPerChunk<T>) return load16_of<kFresh>(from);
  return gather16<T>(left < kPerChunk<T> ? left : kPerChunk<T>, [&](int j) { return from[j]; });
}

template <int kTiles>
constexpr int kStepsAhead = kTiles > 2 ? 2 : 4;  // 128 or 256 bytes of a row

// c [16 rows of P, 8 * kTiles rows of Q] += P Qt over the steps [first, last) of depth. p_row, q_row: where the
// operands' rows begin; rows from p_end, q_end on are zeros. With dropout the mask is of P's elements.
// kAhead: steps whose loads are in flight together. kFresh: Q is.
template <class T, int kTiles, int kAhead = kStepsAhead<kTiles>, bool kFresh = false>
__device__ inline void skinny_product(float (&c)[kTiles][4], const Matrix& p, int p_row, int p_end, const Matrix& q,
                                      int q_row, int q_end, int first, int last, bool precise, const Dropout& dropout) {
  const int g = lane_of_warp() / 4, t = lane_of_warp() % 4;
  const auto one = [&](const Vector& low, const Vector& high, const Vector(&b)[kTiles]) {
#pragma unroll
    for (int h = 0; h < 4; h += 2) {
      const uint32_t a[4] = {low.v[h], high.v[h], low.v[h + 1], high.v[h + 1]};
#pragma unroll
      for (int j = 0; j < kTiles; ++j) product<T>(c[j], a, b[j].v[h], b[j].v[h + 1], precise);
    }
  };
  const auto kept_of = [&](int row, int k) {
    return kept_bits(dropout, static_cast<uint64_t>(row) * static_cast<uint64_t>(p.columns) + k, kPerChunk<T>);
  };
  const bool low_valid = p_row + g < p_end, high_valid = p_row + g + 8 < p_end;
  int step = first;
  // Whole chunks only: no element is looked at one by one.
  if (p.aligned && q.aligned) {
    const int whole = p.columns / kStep<T> < last ? p.columns / kStep<T> : last;
    const T* low_from = static_cast<const T*>(p.data) + (low_valid ? (p_row + g) * p.stride : 0);
    const T* high_from = static_cast<const T*>(p.data) + (high_valid ? (p_row + g + 8) * p.stride : 0);
    const Vector zero = {{0, 0, 0, 0}};
    for (; step + kAhead <= whole; step += kAhead) {
      Vector low[kAhead], high[kAhead], b[kAhead][kTiles];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int k = (step + i) * kStep<T> + t * kPerChunk<T>;
        low[i] = low_valid ? load16_constant(low_from + k) : zero;
        high[i] = high_valid ? load16_constant(high_from + k) : zero;
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          const int row = q_row + j * 8 + g;
          b[i][j] = row < q_end ? load16_of<kFresh>(static_cast<const T*>(q.data) + row * q.stride + k) : zero;
        }
      }
      if (dropout.on) {
        uint64_t kept = 0;
#pragma unroll 1
        for (int i = 0; i < 2 * kAhead; ++i)
          kept |= static_cast<uint64_t>(kept_of(p_row + g + i % 2 * 8, (step + i / 2) * kStep<T> + t * kPerChunk<T>))
                  << i * kPerChunk<T>;
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          low[i] = drop<T>(low[i], static_cast<uint32_t>(kept >> 2 * i * kPerChunk<T>));
          high[i] = drop<T>(high[i], static_cast<uint32_t>(kept >> (2 * i + 1) * kPerChunk<T>));
        }
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) one(low[i], high[i], b[i]);
    }
  }
#pragma unroll 1
  for (; step < last; ++step) {
    const int k = step * kStep<T> + t * kPerChunk<T>;
    Vector low = row_chunk<T>(p, p_row + g, low_valid, k), high = row_chunk<T>(p, p_row + g + 8, high_valid, k);
    Vector b[kTiles];
#pragma unroll
    for (int j = 0; j < kTiles; ++j) b[j] = row_chunk<T, kFresh>(q, q_row + j * 8 + g, q_row + j * 8 + g < q_end, k);
    if (dropout.on) {
      low = drop<T>(low, kept_of(p_row + g, k));
      high = drop<T>(high, kept_of(p_row + g + 8, k));
    }
    one(low, high, b);
  }
}

// The warps' parts [warp][16][8 * kTiles] to shared memory. Ends with a barrier.
template <int kTiles>
__device__ inline void share_parts(float* parts, const float (&c)[kTiles][4]) {
  constexpr int kWidth = 8 * kTiles;
  float* mine = parts + static_cast<int>(threadIdx.x) / 32 * kSkinnyRows * kWidth;
  const int g = lane_of_warp() / 4, t = lane_of_warp() % 4;
#pragma unroll
  for (int j = 0; j < kTiles; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) mine[(g + e / 2 * 8) * kWidth + j * 8 + t * 2 + e % 2] = c[j][e];
  __syncthreads();
}

// Element (row, column) of the sum of the parts.
template <int kTiles>
__device__ inline float sum_of_parts(const float* parts, int row, int column) {
  constexpr int kWidth = 8 * kTiles;
  float sum = 0;
#pragma unroll
  for (int w = 0; w < kSkinnyWarps; ++w) sum += parts[(w * kSkinnyRows + row) * kWidth + column];
  return sum;
}

struct DownParams {
  Matrix x;  // [M, K]
  Matrix a;  // [R, K]
  Routing routing;
  Dropout dropout;
  float factor = 1;   // 1 / (1 - p)
  void* t = nullptr;  // [M, t_stride]: row m has the ranks of its own adapter from 0 on; the rest is not written
  int64_t t_stride = 0;
  bool precise = false;
};

template <int kTiles>
constexpr size_t kDownSharedBytes = (kSkinnyWarps * kSkinnyRows * 8 * kTiles) * sizeof(float) +
                                    (TileAdapters<kSkinnyRows, kSkinnyThreads>::kWords * 4 + 15) / 16 * 16;

// t of sixteen rows, whose adapters are shared out among the blocks of y.
template <class T, int kTiles, int kAhead, bool kFresh>
__device__ inline void down_of_rows(const DownParams& p, int row, float* parts, int* words, const Dropout& dropout) {
  const TileAdapters<kSkinnyRows, kSkinnyThreads> adapters(p.routing, words, row, p.x.rows);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int steps = (p.x.columns + kStep<T> - 1) / kStep<T>;
  const int first = steps * warp / kSkinnyWarps, last = steps * (warp + 1) / kSkinnyWarps;
  for (int slot = static_cast<int>(blockIdx.y); slot < adapters.count(); slot += static_cast<int>(gridDim.y)) {
    const int adapter = adapters.adapter(slot), begin = p.routing.begin(adapter), rank = p.routing.rank(adapter);
    const float scale = p.routing.scale(adapter) * p.factor;
    for (int r = 0; r < rank; r += 8 * kTiles) {
      float c[kTiles][4] = {};
      skinny_product<T, kTiles, kAhead, kFresh>(c, p.x, row, p.x.rows, p.a, begin + r, begin + rank, first, last,
                                                p.precise, dropout);
      share_parts<kTiles>(parts, c);
      for (int i = static_cast<int>(threadIdx.x); i < kSkinnyRows * 8 * kTiles; i += kSkinnyThreads) {
        const int m = i / (8 * kTiles), j = i % (8 * kTiles);
        if (row + m < p.x.rows && r + j < rank && adapters.uses(m, adapter))
          static_cast<T*>(p.t)[(row + m) * p.t_stride + r + j] =
              from_float<T>(sum_of_parts<kTiles>(parts, m, j) * scale);
      }
      __syncthreads();  // the parts are free again
    }
  }
}

// Grid (rows / 16, slots).
template <class T, int kTiles>
__global__ void __launch_bounds__(kSkinnyThreads, 2) down(const DownParams p) {
  if constexpr (kCompiled<T>) {
    let_next_kernel_start();
    wait_for_kernel_before();
    Shared shared;
    float* parts = shared.take<float>(kSkinnyWarps * kSkinnyRows * 8 * kTiles);
    int* words = shared.take<int>(TileAdapters<kSkinnyRows, kSkinnyThreads>::kWords);
    down_of_rows<T, kTiles, kStepsAhead<kTiles>, true>(p, static_cast<int>(blockIdx.x) * kSkinnyRows, parts, words,
                                                       p.dropout.with_seed());
  }
}

// The same in half the registers, with half the loads in flight and without dropout: two blocks of it leave room on a
// multiprocessor for one of the product that starts early (gemm_wgmma, 128 columns of y). No more than that are
// launched, so that all of them can say at once that it may; each goes on to other rows.
template <class T>
__global__ void __launch_bounds__(kSkinnyThreads, 4) down_beside(const DownParams p) {
  if constexpr (kWgmma) {
    let_next_kernel_start();
    wait_for_kernel_before();
    Shared shared;
    float* parts = shared.take<float>(kSkinnyWarps * kSkinnyRows * 16);
    int* words = shared.take<int>(TileAdapters<kSkinnyRows, kSkinnyThreads>::kWords);
    for (int row = static_cast<int>(blockIdx.x) * kSkinnyRows; row < p.x.rows;
         row += static_cast<int>(gridDim.x) * kSkinnyRows)
      down_of_rows<T, 2, 2, false>(p, row, parts, words, Dropout());
  } else {
#if !defined(LORA_KERNELS_EMULATION)
    __trap();  // a plan takes it only beside gemm_wgmma
#endif
  }
}

}  // namespace lora_kernels::cuda
