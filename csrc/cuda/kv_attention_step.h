// kv_attention_step on a CUDA device: what the core's row calls. Everything but the launches is pure and needs no
// device.
#pragma once

#include "cuda/lora_linear.h"
#include "lora_kernels/kv_attention_step.h"

namespace lora_kernels::cuda {

// Why this cannot run on the device, every reason at once and what to do instead; or ok.
Status supported(const KvAttentionStepProblem& problem, const CudaDevice& device);

// Fills the CUDA part and the workspace of a plan whose problem is set, valid and supported.
void configure(const DeviceInfo& device, KvAttentionStepPlan* plan);

Status launch(const KvAttentionStepPlan& plan, const KvAttentionStepArgs& args, const Executor& executor);

struct KvWorkspace {
  float* parts;  // [splits, rows, T, H, D] if there are several, not of one cluster
  float* stats;  // [splits, rows, T, H, 2]
  KvWorkspace(Workspace& w, const KvAttentionStepPlan& plan);
};

// The launches of one type of q; each is a translation unit of its own.
template <class Q>
struct KvAttentionStepKernels {
  static Status run(const KvAttentionStepPlan& plan, const KvAttentionStepArgs& args, void* stream);
};

}  // namespace lora_kernels::cuda
