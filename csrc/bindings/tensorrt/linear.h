// What lora_linear and int8_lora_linear have in common as plugins: rows of x, and a bank of adapters.
#pragma once

#include <algorithm>

#include "lora_kernels/lora_bank.h"
#include "operator.h"

namespace lora_kernels::tensorrt {

// Positions of a bank's tensors after the first one's.
enum BankTensor { kLoraA, kLoraB, kScales, kOffsets, kAdapterIds, kBankTensors };

inline int64_t rows_of(const nvinfer1::Dims& x) {
  const int64_t depth = x.nbDims ? x.d[x.nbDims - 1] : 0;
  return depth ? volume(x) / depth : 0;
}

// The sizes of a bank whose tensors are inputs[first ...], checked against [N, K].
inline Status bank_shape(const char* op, Tensors inputs, int first, int64_t in_features, int64_t out_features,
                         LoraShape* lora) {
  const nvinfer1::Dims& a = inputs[first + kLoraA].dims;
  lora->total_rank = lora->max_rank = a.nbDims ? a.d[0] : 0;
  lora->adapters = volume(inputs[first + kScales].dims);
  lora->groups = volume(inputs[first + kAdapterIds].dims);
  lora->dtype = dtype_of(inputs[first + kLoraA].type);
  Status status = expect_dims(op, "lora_a", a, {lora->total_rank, in_features});
  if (status.ok()) status = expect_dims(op, "lora_b", inputs[first + kLoraB].dims, {lora->total_rank, out_features});
  if (status.ok()) status = expect_dims(op, "scales", inputs[first + kScales].dims, {lora->adapters});
  if (status.ok()) status = expect_dims(op, "offsets", inputs[first + kOffsets].dims, {lora->adapters + 1});
  if (status.ok()) status = expect_dims(op, "adapter_ids", inputs[first + kAdapterIds].dims, {lora->groups});
  return status;
}

inline LoraBank bank_of(const void* const* inputs, int first, int64_t in_features, int64_t out_features) {
  LoraBank bank;
  bank.a = inputs[first + kLoraA];
  bank.a_stride = in_features;
  bank.b = inputs[first + kLoraB];
  bank.b_stride_rank = out_features;
  bank.b_stride_out = 1;
  bank.scales = static_cast<const float*>(inputs[first + kScales]);
  bank.offsets = static_cast<const int32_t*>(inputs[first + kOffsets]);
  bank.adapter_ids = static_cast<const int32_t*>(inputs[first + kAdapterIds]);
  return bank;
}

// What both problems have besides W and the bank: rows, and what happens to y.
template <class Problem>
Status describe(const char* op, const Fields& fields, Tensors inputs, int x, int bias, int residual, Problem* p) {
  const nvinfer1::Dims& dims = inputs[x].dims;
  p->rows = rows_of(dims);
  p->dtype = dtype_of(inputs[x].type);
  p->has_bias = fields.has_bias != 0;
  p->has_residual = fields.has_residual != 0;
  Status status;
  if (p->has_bias) {
    p->bias_dtype = dtype_of(inputs[bias].type);
    status = expect_dims(op, "bias", inputs[bias].dims, {p->out_features});
  }
  if (status.ok() && p->has_residual) {
    std::vector<int64_t> sizes(dims.d, dims.d + dims.nbDims);
    sizes.back() = p->out_features;
    status = expect_dims(op, "residual", inputs[residual].dims, sizes);
  }
  return status;
}

// Types of a bank: A and B alike and floating, scales fp32, the rest int32.
inline bool bank_accepts(int position, int first, const Types& types) {
  switch (position - first) {
    case kLoraA: return is_floating(types[position]);
    case kLoraB: return types[position] == types[first + kLoraA];
    case kScales: return types[position] == nvinfer1::DataType::kFLOAT;
    default: return types[position] == nvinfer1::DataType::kINT32;
  }
}

// Plans differ with the number of rows and not always by needing more for more: all of them are asked up to some
// hundred rows, where paths change, and then one of each 64.
template <class Problem, class Plan>
Status most_workspace(Problem problem, int64_t least_rows, int64_t most_rows, int64_t least_rank,
                      const DeviceInfo& device, int64_t* bytes) {
  constexpr int64_t kEach = 512, kStep = 64;
  const int64_t most_rank = problem.lora.total_rank;
  if (problem.lora.groups) problem.lora.groups = 1;
  *bytes = 0;
  for (const int64_t rank : {least_rank, most_rank}) {
    problem.lora.total_rank = problem.lora.max_rank = rank;
    for (int64_t rows = least_rows; rows <= most_rows;) {
      problem.rows = rows;
      Plan made;
      if (Status status = lora_kernels::plan(problem, device, &made); !status.ok()) return status;
      *bytes = std::max(*bytes, workspace_bytes(made));
      if (rows == most_rows) break;
      rows = std::min(most_rows, rows < kEach ? rows + 1 : rows + kStep);
    }
    if (least_rank == most_rank) break;
  }
  return {};
}

}  // namespace lora_kernels::tensorrt
