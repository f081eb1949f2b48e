// kv_pack on a CUDA device: what the core's row calls.
#pragma once

#include "cuda/lora_linear.h"
#include "lora_kernels/kv_pack.h"

namespace lora_kernels::cuda {

// Why this cannot run on the device, every reason at once and what to do instead; or ok.
Status supported(const KvPackProblem& problem, const CudaDevice& device);

void configure(const DeviceInfo& device, KvPackPlan* plan);

Status launch(const KvPackPlan& plan, const KvPackArgs& args, const Executor& executor);

template <class Q>
struct KvPackKernels {
  static Status run(const KvPackPlan& plan, const KvPackArgs& args, void* stream);
};

}  // namespace lora_kernels::cuda
