// kv_relative_step on a CUDA device: what the core's row calls. Everything but the launches is pure and needs no
// device.
#pragma once

#include "cuda/lora_linear.h"
#include "lora_kernels/kv_relative_step.h"

namespace lora_kernels::cuda {

// Why this cannot run on the device, every reason at once and what to do instead; or ok.
Status supported(const KvRelativeStepProblem& problem, const CudaDevice& device);

// Fills the CUDA part and the workspace of a plan whose problem is set, valid and supported.
void configure(const DeviceInfo& device, KvRelativeStepPlan* plan);

Status launch(const KvRelativeStepPlan& plan, const KvRelativeStepArgs& args, const Executor& executor);

// The launches of one type of q; each is a translation unit of its own.
template <class Q>
struct KvRelativeStepKernels {
  static Status run(const KvRelativeStepPlan& plan, const KvRelativeStepArgs& args, void* stream);
};

}  // namespace lora_kernels::cuda
