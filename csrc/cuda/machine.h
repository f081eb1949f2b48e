// What the plans of all operators take a machine to be, and the limits of all kernels.
#pragma once

#include <climits>
#include <string>
#include <vector>

#include "lora_kernels/device.h"
#include "lora_kernels/lora_bank.h"

namespace lora_kernels::cuda {

// What a kernel more on the same stream costs: the gap between dependent kernels. With an early start its blocks are
// resident when the one before ends. Vendors and papers report 1 to 3 and under 1.
constexpr double kLaunchUs = 2.5, kEarlyLaunchUs = 1.0;
// The part of the memory's peak that streams are expected to reach.
constexpr double kMemory = 0.85;
// From a load to its data on a busy device: bandwidth times this must be in flight, or memory idles.
constexpr double kLatencySeconds = 0.8e-6;
// How much faster than memory L2 is taken to be.
constexpr double kL2 = 2.5;

constexpr int64_t kMostAdapters = 4096;  // times splits, a dimension of the grid

inline std::string joined(const std::vector<std::string>& reasons) {
  std::string text;
  for (const std::string& reason : reasons) text += (text.empty() ? "" : "; ") + reason;
  return text;
}

// Why no linear operator's kernels take these sizes: indices are ints, a bank has a bound.
inline void add_size_reasons(int64_t rows, int64_t in_features, int64_t out_features, const LoraShape& lora,
                             std::vector<std::string>* reasons) {
  for (const auto& [name, value] : {std::pair<const char*, int64_t>{"rows of x", rows},
                                    {"in_features", in_features},
                                    {"out_features", out_features}})
    if (value > INT_MAX / 2)
      reasons->push_back(std::string(name) + ": expected at most " + std::to_string(INT_MAX / 2) + ", got " +
                         std::to_string(value));
  if (lora.total_rank > INT_MAX / 2 || lora.max_rank > lora.total_rank)
    reasons->push_back("rank: expected ranks that sum to at most " + std::to_string(INT_MAX / 2) + ", the largest " +
                       std::to_string(lora.max_rank) + ", got a sum of " + std::to_string(lora.total_rank));
  if (lora.adapters > kMostAdapters)
    reasons->push_back("adapters: expected at most " + std::to_string(kMostAdapters) + " in a bank, got " +
                       std::to_string(lora.adapters));
}

}  // namespace lora_kernels::cuda
