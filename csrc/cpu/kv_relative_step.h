// The CPU implementations of kv_relative_step, as rows for the core's table.
#pragma once

#include "lora_kernels/kv_relative_step.h"

namespace lora_kernels {

struct KvRelativeStepImplementation {
  const char* name;
  uint32_t required_isa;
  // Fill tasks and workspace of a plan whose problem is set and valid.
  void (*configure)(const DeviceInfo&, KvRelativeStepPlan*);
  void (*run)(const KvRelativeStepPlan&, const KvRelativeStepArgs&, const Executor&);
};

extern const KvRelativeStepImplementation kKvRelativeStepGeneric;
#if defined(__x86_64__)
extern const KvRelativeStepImplementation kKvRelativeStepAvx2;
extern const KvRelativeStepImplementation kKvRelativeStepAvx512;
#endif

}  // namespace lora_kernels
