// The adapters of one layer, ragged: the rank rows of n adapters one after the other, never padded to the largest rank.
#pragma once

#include <cstdint>

#include "lora_kernels/types.h"

namespace lora_kernels {

// Sizes; part of a Problem.
struct LoraShape {
  int64_t adapters = 0;    // n; 0: no LoRA branch
  int64_t total_rank = 0;  // R, the sum of the n ranks
  int64_t max_rank = 0;    // the largest of the n ranks (R is always a safe bound)
  int64_t groups = 0;      // G, entries of adapter_ids; 0: every row uses adapter 0
  DType dtype = DType::kFloat32;

  bool present() const { return adapters > 0 && total_rank > 0; }
};

constexpr int64_t kLoraBlockColumns = 64;

// Pointers; part of Args. Strides count elements.
struct LoraBank {
  const void* a = nullptr;  // [R, K], rows of stride a_stride, unit stride along K
  int64_t a_stride = 0;
  const void* b = nullptr;  // [R, N] by rank row; PEFT's B [N, r] is b_stride_rank 1, b_stride_out r
  int64_t b_stride_rank = 0;
  int64_t b_stride_out = 0;
  // Over 0: b is [N64 / 64, R, 64] instead, N64 = N rounded up to 64, and this lies between its blocks; b_stride_out is
  // then 1. Few rows read that as one stream, where [R, N] is as many as there are rank rows, each in a page of its
  // own.
  int64_t b_stride_block = 0;
  const float* scales = nullptr;         // [n], or null: all 1
  const int32_t* offsets = nullptr;      // [n + 1], or null: one adapter of all R rank rows
  const int32_t* adapter_ids = nullptr;  // [G]: the adapter of rows g*M/G ... (g+1)*M/G - 1; -1: base only
};

}  // namespace lora_kernels
