// Why the CUDA kernels of an operator cannot run a problem: every reason at once, in the same words everywhere.
#pragma once

#include <climits>
#include <string>
#include <utility>

#include "lora_kernels/device.h"
#include "lora_kernels/lora_bank.h"
#include "lora_kernels/status.h"

namespace lora_kernels::cuda {

constexpr int64_t kMostGridY = 65535;               // blocks along y and z of a grid
constexpr int64_t kMostRankRows = kMostGridY * 32;  // convert_factor's tiles are its y
constexpr int64_t kMostAdapters = 4096;             // times splits, a dimension of the grid

class Refusals {
 public:
  bool none() const { return reasons_.empty(); }

  void add(const std::string& reason) { reasons_ += (none() ? "" : "; ") + reason; }

  void expect_at_most(const std::string& what, int64_t most, int64_t value) {
    if (value > most) add(what + ": expected at most " + std::to_string(most) + ", got " + std::to_string(value));
  }

  // Tensor cores are there from sm_75 on, and before sm_80 multiply fp16 and INT8 alone. `operand` is what has this
  // type.
  void expect_tensor_cores(const CudaDevice& device, const std::string& operand, DType type) {
    const std::string arch = "sm_" + std::to_string(device.arch);
    if (device.arch < 75)
      add("architecture: expected sm_75 or later, whose tensor cores these kernels use, got " + arch);
    else if (device.arch < 80 && type != DType::kFloat16)
      add(operand + ": on " + arch + " expected float16, all that its tensor cores multiply beside INT8, got " +
          name_of(type));
  }

  // Indices are ints, a bank has a bound.
  void expect_linear_sizes(int64_t rows, int64_t in_features, int64_t out_features, const LoraShape& lora) {
    expect_at_most("rows of x", INT_MAX / 2, rows);
    expect_at_most("in_features", INT_MAX / 2, in_features);
    expect_at_most("out_features", INT_MAX / 2, out_features);
    if (lora.total_rank > kMostRankRows || lora.max_rank > lora.total_rank)
      add("rank: expected ranks that sum to at most " + std::to_string(kMostRankRows) + ", the largest " +
          std::to_string(lora.max_rank) + ", got a sum of " + std::to_string(lora.total_rank));
    expect_at_most("adapters", kMostAdapters, lora.adapters);
  }

  // Bounded apart, so that products of these cannot overflow.
  void expect_attention_sizes(int64_t rows, int64_t tokens, int64_t heads, int64_t cache_rows) {
    for (const auto& [name, value] : {std::pair<const char*, int64_t>{"rows of q", rows},
                                      {"tokens", tokens},
                                      {"heads", heads},
                                      {"rows of k_cache", cache_rows}})
      expect_at_most(name, 1 << 20, value);
  }

  // OK where there is no reason.
  Status status(const std::string& op, const std::string& remedy) const {
    return none() ? Status{} : Status::unsupported(op + ": CUDA kernels cannot run this: " + reasons_ + ". " + remedy);
  }

 private:
  std::string reasons_;
};

}  // namespace lora_kernels::cuda
