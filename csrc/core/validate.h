// Checks that several operators share. A Check collects the first fault; later ones are not looked at.
#pragma once

#include <cmath>
#include <sstream>
#include <string>

#include "lora_kernels/lora_bank.h"
#include "lora_kernels/status.h"

namespace lora_kernels {

class Check {
 public:
  explicit Check(const char* op) : op_(op) {}

  // The text names the argument, what was expected, what came, and the fix. Call it behind an if: texts are not made
  // for calls that are right.
  void fail(const std::string& text) {
    if (status_.ok()) status_ = Status::invalid(std::string(op_) + ": " + text);
  }
  const Status& status() const { return status_; }

 private:
  const char* op_;
  Status status_;
};

inline std::string got(int64_t value) { return ", got " + std::to_string(value); }

// Sizes of a bank.
inline void check_lora_shape(Check* check, const LoraShape& lora, int64_t rows) {
  if (lora.adapters < 0) check->fail("scales: expected one per adapter" + got(lora.adapters));
  if (lora.total_rank < 0) check->fail("lora_a: expected at least 0 rank rows" + got(lora.total_rank));
  if (!is_floating(lora.dtype)) check->fail("lora_a: expected float32, float16 or bfloat16, got int8");
  if (!(lora.groups == 0 || rows % lora.groups == 0))
    check->fail("adapter_ids: its length must divide the number of rows of x (" + std::to_string(rows) + ")" +
                got(lora.groups) + "; give one id per utterance or per row");
}

// Contents of a bank that a CPU can read: offsets, ids, scales.
inline void check_lora_bank(Check* check, const LoraShape& lora, const LoraBank& bank) {
  if (bank.offsets) {
    if (bank.offsets[0] != 0) check->fail("offsets: expected to begin with 0" + got(bank.offsets[0]));
    for (int64_t i = 0; i < lora.adapters; ++i) {
      const int64_t rank = bank.offsets[i + 1] - static_cast<int64_t>(bank.offsets[i]);
      if (!(rank >= 0 && rank <= lora.max_rank))
        check->fail("offsets: adapter " + std::to_string(i) + " has rank " + std::to_string(rank) + ", expected 0 to " +
                    std::to_string(lora.max_rank));
    }
    if (bank.offsets[lora.adapters] != lora.total_rank)
      check->fail("offsets: expected to end with the rank rows of lora_a (" + std::to_string(lora.total_rank) + ")" +
                  got(bank.offsets[lora.adapters]) + "; the ranks disagree with the factors");
  }
  for (int64_t i = 0; bank.scales && i < lora.adapters; ++i)
    if (!std::isfinite(bank.scales[i]))
      check->fail("scales: entry " + std::to_string(i) + " is not finite; expected alpha / rank of the adapter");
  for (int64_t g = 0; bank.adapter_ids && g < lora.groups; ++g)
    if (!(bank.adapter_ids[g] >= -1 && bank.adapter_ids[g] < lora.adapters))
      check->fail("adapter_ids: entry " + std::to_string(g) + " is " + std::to_string(bank.adapter_ids[g]) +
                  ", expected -1 (base only) to " + std::to_string(lora.adapters - 1));
}

// For operators whose checks run at every step of every layer: a text is put together only when there is a fault.
template <class... Pieces>
Status invalid_of(const char* op, const Pieces&... pieces) {
  std::ostringstream text;
  text << op << ": ";
  (text << ... << pieces);
  return Status::invalid(text.str());
}

}  // namespace lora_kernels
