// A kernel with a fault, or none, in several orders of its threads: what the tests of the emulation expect of it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "check.h"
#include "cuda/emulation/emulation.h"
#include "lora_kernels/status.h"

struct InOrder {
  lora_kernels::emulation::Order order;
  uint64_t seed;
};

inline const std::vector<InOrder> kFiveOrders = {{lora_kernels::emulation::Order::kForward, 1},
                                                 {lora_kernels::emulation::Order::kReverse, 1},
                                                 {lora_kernels::emulation::Order::kShuffled, 2},
                                                 {lora_kernels::emulation::Order::kShuffled, 3},
                                                 {lora_kernels::emulation::Order::kShuffled, 4}};
inline std::vector<InOrder> three_orders(uint64_t seed) {
  return {{lora_kernels::emulation::Order::kForward, seed},
          {lora_kernels::emulation::Order::kReverse, seed},
          {lora_kernels::emulation::Order::kShuffled, seed}};
}

enum class Caught { kNever, kInSomeOrder, kInEveryOrder };

// `run` counts what is wrong, or is refused, which is as good; the last refusal has the words.
template <class Run>
void expect_in(const std::vector<InOrder>& orders, const char* name, const char* words, Caught expected, Run run) {
  size_t caught = 0;
  std::string text;
  for (const InOrder& in : orders) {
    lora_kernels::emulation::options = {in.order, in.seed};
    int wrong = 0;
    const lora_kernels::Status status = run(&wrong);
    if (!status.ok()) text = status.text;
    caught += !status.ok() || wrong > 0;
  }
  const bool right = expected == Caught::kNever         ? caught == 0
                     : expected == Caught::kInSomeOrder ? caught > 0
                                                        : caught == orders.size();
  check(right, std::string(name) + ": caught in " + std::to_string(caught) + " of " + std::to_string(orders.size()) +
                   " orders: " + text);
  check(contains(text, words), std::string(name) + ": '" + words + "' is in: " + text);
}
