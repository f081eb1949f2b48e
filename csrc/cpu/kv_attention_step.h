// The CPU implementations of kv_attention_step, as rows for the core's table.
#pragma once

#include "lora_kernels/kv_attention_step.h"

namespace lora_kernels {

struct KvAttentionStepImplementation {
  const char* name;
  uint32_t required_isa;
  // Fill tasks and workspace of a plan whose problem is set and valid.
  void (*configure)(const DeviceInfo&, KvAttentionStepPlan*);
  void (*run)(const KvAttentionStepPlan&, const KvAttentionStepArgs&, const Executor&);
};

extern const KvAttentionStepImplementation kKvAttentionStepGeneric;
#if defined(__x86_64__)
extern const KvAttentionStepImplementation kKvAttentionStepAvx2;
extern const KvAttentionStepImplementation kKvAttentionStepAvx2Vnni;
extern const KvAttentionStepImplementation kKvAttentionStepAvx512;
extern const KvAttentionStepImplementation kKvAttentionStepAmx;
#endif

}  // namespace lora_kernels
