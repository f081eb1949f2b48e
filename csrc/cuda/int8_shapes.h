// Sizes that the plans and the kernels of int8_lora_linear share.
#pragma once

#include <cstdint>

#include "lora_kernels/types.h"

namespace lora_kernels::cuda {

// Rows that a block quantizes: what one tensor-core product of t has.
constexpr int kInt8Rows = 16;
constexpr int kInt8Threads = 256, kInt8Warps = kInt8Threads / 32;
// Depth of one step of the products: 64 bytes of q, sixteen steps of four k of the packed weight.
constexpr int kInt8Step = 64;
// Channels of a block of few_rows: eight lanes read sixteen bytes each, a line of 128.
constexpr int kInt8FewColumns = 32;
// Calls that one launch makes together: their parameters are the kernel's, of which there are at most 4 KB.
constexpr int kInt8MostTogether = 3;
// Rows of a tile of int8_persistent.cuh, and all of the shared memory that a block takes at most.
constexpr int kInt8PersistentRows = 256, kInt8PersistentMostRows = 320;
constexpr int64_t kInt8PersistentBytes = 223344;
// Columns of a vocabulary that one block chooses among.
constexpr int kTopThreads = 256, kTopEach = 8, kTopColumns = kTopThreads * kTopEach;

// Rows of shared memory that lie 64 bytes beyond a multiple of all 32 banks: lanes that read sixteen bytes each, four
// of a row, meet no conflict.
constexpr int64_t int8_shared_row(int64_t bytes) { return round_up(bytes, 128) + 64; }

// Shared memory of the quantization of sixteen rows, without what is staged: statistics, parts of t for 8 * tiles
// ranks, the adapters of the rows and where those lie.
constexpr int kInt8MostOffsets = 127;  // adapters; of more the offsets are read from L2
constexpr int64_t int8_rows_bytes(int tiles) {
  return 4 * kInt8Warps * 4 + 2 * kInt8Rows * 4 + kInt8Warps * kInt8Rows * 8 * tiles * 4 + 144 +
         (kInt8MostOffsets + 1) * 4;
}

// What is staged: up to sixteen rows of x, the weight and bias of a norm (norm_size: of an element, or 0), and of A, of
// the part of depth, 8 * tiles ranks.
struct Int8Staged {
  int64_t x_row = 0, a_row = 0, bytes = 0;
  bool w = false;  // and the block's part of it
};
constexpr Int8Staged int8_staged(int64_t rows, int64_t in_features, int64_t size, int64_t norm_size, int64_t a_depth,
                                 int tiles) {
  Int8Staged s;
  s.x_row = int8_shared_row(in_features * size);
  s.a_row = a_depth ? int8_shared_row(a_depth * size) : 0;
  s.bytes =
      (rows < kInt8Rows ? rows : kInt8Rows) * s.x_row + 2 * round_up(in_features * norm_size, 16) + 8 * tiles * s.a_row;
  return s;
}

// Of few_rows: the parts of the warps.
constexpr int64_t int8_part_bytes(int tiles) { return kInt8Warps * 16 * tiles * kInt8FewColumns * 4; }

// What the blocks of a cluster, which share out depth, send each other: sums, and parts of t if each has a part of it.
constexpr int64_t int8_exchanged_bytes(int64_t rows, int64_t t_stride, int cluster) {
  return cluster > 1 ? 16 + rows * (kInt8FewColumns + (cluster + 1) * t_stride) * 4 : 0;
}

// Of few_rows where every block makes q, scales and t for itself, without what is staged.
constexpr int64_t int8_fused_bytes(int64_t rows, int64_t in_features, int64_t t_stride, int64_t size, int cluster) {
  return rows * kInt8Warps * kInt8FewColumns * 4 + rows * int8_shared_row(round_up(in_features, kInt8Step)) +
         kInt8Rows * 4 + round_up(rows * t_stride * size, 16) + int8_rows_bytes(2) +
         int8_exchanged_bytes(rows, t_stride, cluster);
}

}  // namespace lora_kernels::cuda
