// What tiles of y transposed have in common (int8_wgmma.cuh, int8_persistent.cuh): wgmma takes its left operand from
// registers, in the fragments of mma.sync, and that is the packed weight as it is; its right one from shared memory by
// rows, and that is q.
//
// Channels of a tile may be taken in any order. A lane (g = lane / 4, t = lane % 4) reads eight bytes of w, words of
// four k of two neighbouring channels: rows g and g + 8 of its warp's sixteen. So each lane ends with two neighbouring
// channels of y, and those are rows of its fragments of B in the LoRA branch as well.
#pragma once

#include "cuda/int8_gemm.cuh"
#include "cuda/primitives/tma.h"
#include "cuda/primitives/wgmma_int8.h"

namespace lora_kernels::cuda {

constexpr int kRunChannels = 2, kWarpChannels = 16;  // of a lane, of a warp
// One place in the ring: 64 channels of w, 128 k deep, in packed steps of 256 bytes that are rows of 128 bytes in the
// 128-byte swizzle.
constexpr int kInt8WgmmaDepth = 128, kInt8WgmmaBlockBytes = 64 * kInt8WgmmaDepth;

struct Int8WgmmaParams {
  TensorMap q, w;
  Int8GemmParams gemm;
};

// Maps of both operands, in boxes of so many rows of q and so many blocks of 64 channels; false where there can be
// none.
inline bool make_int8_maps(Int8WgmmaParams* p, int rows_of_box, int blocks_of_box) {
  const Int8GemmParams& g = p->gemm;
  const int64_t rows = g.rows, steps = g.w.steps, blocks = (int64_t{g.w.columns} + 63) / 64;
  const BytePlanes q{g.q, 1, rows, g.q_stride, rows * g.q_stride, g.q_stride};
  const BytePlanes w{g.w.data, blocks, steps * (kInt8StepBytes / 128), 128, g.w.block_bytes, 128};
  return make_tensor_map(&p->q, q, 1, rows_of_box) &&
         make_tensor_map(&p->w, w, blocks_of_box, kInt8WgmmaDepth / 4 * (kInt8StepBytes / 128));
}

// Where in a tile of w the words of this lane's channels lie, from `channel` on. Eight lanes read 128 bytes from 32
// different banks, as the swizzle has it: the four words t lie 256 bytes apart.
__device__ inline int weight_offset(int channel, int lane = lane_of_warp()) {
  const int at = lane % 4 * kInt8StepBytes + channel % 64 * 4;
  return channel / 64 * kInt8WgmmaBlockBytes + (at ^ (at >> 7 & 7) << 4);
}

// Words t and t + 4 of 32 k, which are a left operand. (Eight words later the swizzle is the same.)
__device__ inline void load_weight(const char* of_lane, int step, uint32_t (&words)[4]) {
#pragma unroll
  for (int high = 0; high < 2; ++high) {
    const uint2 two = *reinterpret_cast<const uint2*>(of_lane + (step * 8 + high * 4) * kInt8StepBytes);
    words[high * 2] = two.x;
    words[high * 2 + 1] = two.y;
  }
}

// A step of B beside it, of ranks `begin` on, so many, for the channels from n on: row 8 h + g of a warp's sixteen is
// channel 2 g + h. By kThreads threads, of which this one is `thread`.
template <class T, class Tile, int kThreads>
__device__ inline void load_factor(char* tile, const UpFactor& up, int columns, int n, int begin, int ranks,
                                   int thread) {
#pragma unroll 1
  for (int i = thread; i < Tile::kRows * 4; i += kThreads) {
    const int at = i % Tile::kRows, part = i / Tile::kRows, r = part * kPerChunk<T>;
    const int channel = n + at / kWarpChannels * kWarpChannels + at % 8 * kRunChannels + at % kWarpChannels / 8;
    store16(tile + Tile::offset(at, part),
            up.chunk<T>(begin + r, channel, of_chunk<T>(channel < columns ? ranks - r : 0)));
  }
}

// A step of the branch, of which so many ranks are left, onto the sums of a warp's channels: a half that has none is
// left out. Fragments of mma.sync for a warp are wgmma's.
template <class T, class TileT, class TileB, int kEights>
__device__ inline void add_branch(float (&c)[kEights][4], const char* t, const char* factor, int warp_channel,
                                  int ranks, bool precise, int lane = lane_of_warp()) {
#pragma unroll 1
  for (int half = 0; half < 2 && half * (kStep<T> / 2) < ranks; ++half) {
    uint32_t a[4], b[4];
    load_a<TileB>(a, factor, warp_channel, half, lane);
#pragma unroll
    for (int j = 0; j < kEights; j += 2) {
      load_b<TileT>(b, t, j * 8, half, lane);
      product<T>(c[j], a, b[0], b[1], precise);
      product<T>(c[j + 1], a, b[2], b[3], precise);
    }
  }
}

}  // namespace lora_kernels::cuda
