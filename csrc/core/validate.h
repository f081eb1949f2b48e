// Checks that several operators share. A Check collects the first fault; later ones are not looked at.
#pragma once

#include <cmath>
#include <string>

#include "lora_kernels/lora_bank.h"
#include "lora_kernels/status.h"

namespace lora_kernels {

class Check {
 public:
  explicit Check(const char* op) : op_(op) {}

  // text names the argument, what was expected, what came, and the fix
  Check& that(bool holds, const std::string& text) {
    if (!holds && status_.ok()) status_ = Status::invalid(std::string(op_) + ": " + text);
    return *this;
  }
  const Status& status() const { return status_; }

 private:
  const char* op_;
  Status status_;
};

inline std::string got(int64_t value) { return ", got " + std::to_string(value); }

// Sizes of a bank.
inline void check_lora_shape(Check* check, const LoraShape& lora, int64_t rows) {
  check->that(lora.adapters >= 0, "scales: expected one per adapter" + got(lora.adapters));
  check->that(lora.total_rank >= 0, "lora_a: expected at least 0 rank rows" + got(lora.total_rank));
  check->that(is_floating(lora.dtype), "lora_a: expected float32, float16 or bfloat16, got int8");
  check->that(lora.groups == 0 || rows % lora.groups == 0,
              "adapter_ids: its length must divide the number of rows of x (" + std::to_string(rows) + ")" +
                  got(lora.groups) + "; give one id per utterance or per row");
}

// Contents of a bank that a CPU can read: offsets, ids, scales.
inline void check_lora_bank(Check* check, const LoraShape& lora, const LoraBank& bank) {
  if (bank.offsets) {
    check->that(bank.offsets[0] == 0, "offsets: expected to begin with 0" + got(bank.offsets[0]));
    for (int64_t i = 0; i < lora.adapters; ++i) {
      const int64_t rank = bank.offsets[i + 1] - static_cast<int64_t>(bank.offsets[i]);
      check->that(rank >= 0 && rank <= lora.max_rank, "offsets: adapter " + std::to_string(i) + " has rank " +
                                                          std::to_string(rank) + ", expected 0 to " +
                                                          std::to_string(lora.max_rank));
    }
    check->that(bank.offsets[lora.adapters] == lora.total_rank,
                "offsets: expected to end with the rank rows of lora_a (" + std::to_string(lora.total_rank) + ")" +
                    got(bank.offsets[lora.adapters]) + "; the ranks disagree with the factors");
  }
  for (int64_t i = 0; bank.scales && i < lora.adapters; ++i)
    check->that(std::isfinite(bank.scales[i]),
                "scales: entry " + std::to_string(i) + " is not finite; expected alpha / rank of the adapter");
  for (int64_t g = 0; bank.adapter_ids && g < lora.groups; ++g)
    check->that(bank.adapter_ids[g] >= -1 && bank.adapter_ids[g] < lora.adapters,
                "adapter_ids: entry " + std::to_string(g) + " is " + std::to_string(bank.adapter_ids[g]) +
                    ", expected -1 (base only) to " + std::to_string(lora.adapters - 1));
}

}  // namespace lora_kernels
