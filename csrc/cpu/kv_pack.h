// The CPU implementations of kv_pack, as rows for the core's table.
#pragma once

#include "lora_kernels/kv_pack.h"

namespace lora_kernels {

struct KvPackImplementation {
  const char* name;
  uint32_t required_isa;
  // Fill tasks and workspace of a plan whose problem is set and valid.
  void (*configure)(const DeviceInfo&, KvPackPlan*);
  void (*run)(const KvPackPlan&, const KvPackArgs&, const Executor&);
};

extern const KvPackImplementation kKvPackGeneric;
#if defined(__x86_64__)
extern const KvPackImplementation kKvPackAvx2;
extern const KvPackImplementation kKvPackAvx512;
#endif

}  // namespace lora_kernels
