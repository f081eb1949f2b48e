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
// Columns of a vocabulary that one block chooses among.
constexpr int kTopThreads = 256, kTopEach = 8, kTopColumns = kTopThreads * kTopEach;

// Rows of shared memory that lie 64 bytes beyond a multiple of all 32 banks: lanes that read sixteen bytes each, four
// of a row, meet no conflict.
constexpr int64_t int8_shared_row(int64_t bytes) { return round_up(bytes, 128) + 64; }

// Shared memory of the quantization of sixteen rows, without the rows themselves: sums and statistics, parts of t for
// 8 * tiles ranks, the adapters of the rows.
constexpr int64_t int8_rows_bytes(int tiles) {
  return (2 * kInt8Warps + 2 * kInt8Rows) * 4 + kInt8Warps * kInt8Rows * 8 * tiles * 4 + 144;
}

// Of few_rows: the parts of the warps.
constexpr int64_t int8_part_bytes(int tiles) { return kInt8Warps * 16 * tiles * kInt8FewColumns * 4; }

// Of few_rows where every block makes q, scales and t for itself.
constexpr int64_t int8_fused_bytes(int64_t in_features, int64_t t_stride, int64_t size) {
  return int8_part_bytes(1) + kInt8Rows * int8_shared_row(round_up(in_features, kInt8Step)) + kInt8Rows * 4 +
         round_up(kInt8Rows * t_stride * size, 16) + int8_rows_bytes(2);
}

}  // namespace lora_kernels::cuda
