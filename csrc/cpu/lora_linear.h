// The CPU implementations of lora_linear, as rows for the core's table.
#pragma once

#include "lora_kernels/lora_linear.h"

namespace lora_kernels {

struct LoraLinearImplementation {
  const char* name;
  uint32_t required_isa;
  // Fill path, tasks and workspace of a plan whose problem is set and valid.
  void (*configure)(const DeviceInfo&, LoraLinearPlan*);
  void (*run)(const LoraLinearPlan&, const LoraLinearArgs&, const Executor&);
  void (*configure_backward)(const DeviceInfo&, LoraLinearBackwardPlan*);
  void (*run_backward)(const LoraLinearBackwardPlan&, const LoraLinearBackwardArgs&, const Executor&);
};

extern const LoraLinearImplementation kLoraLinearGeneric;
#if defined(__x86_64__)
extern const LoraLinearImplementation kLoraLinearAvx2;
extern const LoraLinearImplementation kLoraLinearAvx512;
extern const LoraLinearImplementation kLoraLinearAmx;
#endif

}  // namespace lora_kernels
