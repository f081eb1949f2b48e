// Tiles of matrices in shared memory, and fragments of them in registers.
//
// A tile has rows of whole chunks of 16 bytes, and a swizzle: the chunk's place in its row is exclusive-or'ed with bits
// of the row, so that the eight rows of one column of chunks that ldmatrix reads at a time lie in eight different bank
// groups. Rows of 64 bytes: two rows share the 32 banks, bits 1 and 2 of the row. Longer rows: the low three bits. fp32
// with depth along rows cannot be transposed by ldmatrix and is read as words, four rows by eight columns: twice the
// low two bits, and the third bit below them, for ldmatrix of tiles that are longer than a step.
#pragma once

#include "cuda/numbers.h"

namespace lora_kernels::cuda {

// A row-major matrix in global memory.
struct Matrix {
  const void* data = nullptr;
  int64_t stride = 0;  // elements from row to row
  int rows = 0, columns = 0;
  bool aligned = false;  // data and stride are multiples of 16 bytes: chunks can be copied whole
};

template <class T>
inline Matrix matrix(const void* data, int64_t stride, int64_t rows, int64_t columns) {
  const bool aligned =
      reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * static_cast<int64_t>(sizeof(T)) % 16 == 0;
  return {data, stride, static_cast<int>(rows), static_cast<int>(columns), aligned};
}

template <class T_, int kRows_, int kColumns_>
struct Tile {
  using T = T_;
  static constexpr int kRows = kRows_, kColumns = kColumns_;
  static constexpr int kChunks = kColumns * static_cast<int>(sizeof(T)) / 16;
  static constexpr int kBytes = kRows * kChunks * 16;
  static_assert(kChunks == 4 || kChunks % 8 == 0, "the swizzle is made for rows of 64 bytes, or of whole 128");

  __device__ static int swizzle(int row) {
    if constexpr (kChunks == 4) return row >> 1 & 3;
    if constexpr (sizeof(T) == 4) return (row & 3) << 1 | (row >> 2 & 1);
    return row & 7;
  }
  __device__ static int offset(int row, int chunk) { return (row * kChunks + (chunk ^ swizzle(row))) * 16; }
};

struct KeepAll {
  __device__ bool operator()(int) const { return true; }
};

// Rows `row` on and columns `column` on of a matrix; what lies outside of it, and rows that `keep` (by the row of the
// tile) refuses, become zeros. Whole chunks are copied asynchronously; others, and with dropout, land at once.
template <class Tile, int kThreads, class Keep = KeepAll>
__device__ inline void load_tile(char* tile, const Matrix& m, int row, int column, const Keep& keep = Keep(),
                                 const Dropout& dropout = Dropout()) {
  using T = typename Tile::T;
  static_assert(Tile::kRows * Tile::kChunks % kThreads == 0 || Tile::kRows * Tile::kChunks < kThreads,
                "every thread has the same number of chunks, or at most one");
#pragma unroll
  for (int i = 0; i < (Tile::kRows * Tile::kChunks + kThreads - 1) / kThreads; ++i) {
    const int index = static_cast<int>(threadIdx.x) + i * kThreads;
    if (Tile::kRows * Tile::kChunks < kThreads && index >= Tile::kRows * Tile::kChunks) continue;
    const int r = index / Tile::kChunks, chunk = index % Tile::kChunks, c = column + chunk * kPerChunk<T>;
    const int count = of_chunk<T>(row + r < m.rows && keep(r) ? m.columns - c : 0);
    const T* from = static_cast<const T*>(m.data) + (count ? (row + r) * m.stride + c : 0);
    char* to = tile + Tile::offset(r, chunk);
    if (m.aligned && !dropout.on) {
      copy16_async(to, from, count * static_cast<int>(sizeof(T)));
    } else {
      Vector v = gather16<T>(count, [&](int j) { return from[j]; });
      if (dropout.on)
        v = drop<T>(
            v, kept_bits(dropout, static_cast<uint64_t>(row + r) * static_cast<uint64_t>(m.columns) + c, kPerChunk<T>));
      store16(to, v);
    }
  }
}

__device__ inline int lane_of_warp() { return static_cast<int>(threadIdx.x) % 32; }
// The thread of the block, read where it stands: what is made of it is not kept in registers over what lies before.
__device__ inline unsigned thread_asked_anew() {
#if defined(LORA_KERNELS_EMULATION)
  return threadIdx.x;
#else
  unsigned thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
#endif
}

// Fragments of one tensor-core step (half of a Step): `half` is 0 or 1. For A, 16 rows of the result from `row` on; for
// B, 16 columns from `row` on: b[0], b[1] of the first eight, b[2], b[3] of the others. Depth lies along the rows of
// the tile (kDepthInRows), or across them.

template <class Tile>
__device__ inline void load_a(uint32_t (&a)[4], const char* tile, int row, int half, int lane = lane_of_warp()) {
  ldmatrix(a, tile + Tile::offset(row + lane % 16, half * 2 + lane / 16));
}

template <class Tile>
__device__ inline void load_b(uint32_t (&b)[4], const char* tile, int row, int half, int lane = lane_of_warp()) {
  ldmatrix(b, tile + Tile::offset(row + lane / 16 * 8 + lane % 8, half * 2 + lane / 8 % 2));
}

template <class Tile>
__device__ inline uint32_t word_at(const char* tile, int row, int column) {
  return read_shared(tile + Tile::offset(row, column / 4) + column % 4 * 4);
}

template <class Tile>
__device__ inline void load_a_across(uint32_t (&a)[4], const char* tile, int column, int half) {
  const int lane = lane_of_warp();
  if constexpr (sizeof(typename Tile::T) == 4) {
    const int k = half * 8 + lane % 4, m = column + lane / 4;
    a[0] = word_at<Tile>(tile, k, m);
    a[1] = word_at<Tile>(tile, k, m + 8);
    a[2] = word_at<Tile>(tile, k + 4, m);
    a[3] = word_at<Tile>(tile, k + 4, m + 8);
  } else {
    ldmatrix_trans(a, tile + Tile::offset(half * 16 + lane / 16 * 8 + lane % 8, column / 8 + lane / 8 % 2));
  }
}

template <class Tile>
__device__ inline void load_b_across(uint32_t (&b)[4], const char* tile, int column, int half) {
  const int lane = lane_of_warp();
  if constexpr (sizeof(typename Tile::T) == 4) {
    const int k = half * 8 + lane % 4, n = column + lane / 4;
    b[0] = word_at<Tile>(tile, k, n);
    b[1] = word_at<Tile>(tile, k + 4, n);
    b[2] = word_at<Tile>(tile, k, n + 8);
    b[3] = word_at<Tile>(tile, k + 4, n + 8);
  } else {
    ldmatrix_trans(b, tile + Tile::offset(half * 16 + lane / 8 % 2 * 8 + lane % 8, column / 8 + lane / 16));
  }
}

}  // namespace lora_kernels::cuda
