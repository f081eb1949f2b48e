// The CPU implementations of int8_lora_linear, as rows for the core's table.
#pragma once

#include "lora_kernels/int8_lora_linear.h"

namespace lora_kernels {

struct Int8LoraLinearImplementation {
  const char* name;
  uint32_t required_isa;
  // Fill tasks and workspace of a plan whose problem is set and valid.
  void (*configure)(const DeviceInfo&, Int8LoraLinearPlan*);
  void (*run)(const Int8LoraLinearPlan&, const Int8LoraLinearArgs&, const Executor&);
};

extern const Int8LoraLinearImplementation kInt8LoraLinearGeneric;
#if defined(__x86_64__)
extern const Int8LoraLinearImplementation kInt8LoraLinearAvx2;
extern const Int8LoraLinearImplementation kInt8LoraLinearAvx2Vnni;
extern const Int8LoraLinearImplementation kInt8LoraLinearAvx512;
extern const Int8LoraLinearImplementation kInt8LoraLinearAmx;
#endif

}  // namespace lora_kernels
