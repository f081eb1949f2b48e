// lora_linear on a CUDA device: what the core's row calls. Everything but the launches is pure and needs no device.
#pragma once

#include "lora_kernels/lora_linear.h"

namespace lora_kernels::cuda {

// Why this cannot run on the device, every reason at once and what to do instead; or ok.
Status supported(const LoraLinearProblem& problem, const CudaDevice& device);

// Fill the CUDA part and the workspace of a plan whose problem is set, valid and supported.
void configure(const DeviceInfo& device, LoraLinearPlan* plan);
// The same without wgmma: what the row "cuda_mma" is.
void configure_mma(const DeviceInfo& device, LoraLinearPlan* plan);
void configure_backward(const DeviceInfo& device, LoraLinearBackwardPlan* plan);
void configure_backward_mma(const DeviceInfo& device, LoraLinearBackwardPlan* plan);

Status launch(const LoraLinearPlan& plan, const LoraLinearArgs& args, const Executor& executor);
Status launch_backward(const LoraLinearBackwardPlan& plan, const LoraLinearBackwardArgs& args,
                       const Executor& executor);

// The parts of the workspace, one after another on lines of 256 bytes: offsets from a null base say its size.
struct Workspace {
  char* base = nullptr;
  int64_t used = 0;
  void* take(int64_t bytes) {
    char* p = base + used;
    used += round_up(bytes, 256);
    return p;
  }
};

int64_t t_stride(const LoraShape& lora);  // elements from row to row of t and u

// Whether the backward pass has t from the forward pass. (Without columns of x that wrote nothing.)
inline bool t_is_there(const LoraLinearBackwardProblem& p) { return p.has_t && p.forward.in_features > 0; }

struct ForwardWorkspace {
  void* a;      // A in the type of x, [R, K]
  void* t;      // [M, t_stride] in the type of x
  float* sums;  // [splits, M, N]
  ForwardWorkspace(Workspace& w, const LoraLinearPlan& plan);
};

struct BackwardWorkspace {
  void *a, *b;               // the factors in the type of x, [R, K] and [R, N]
  void *t, *u;               // [M, t_stride]; t only if it was not handed over
  float *u_parts, *b_parts;  // of dy_once: [column_splits, M, t_stride] and [row_splits, R, N]
  float *a_sums, *b_sums, *w_sums;
  BackwardWorkspace(Workspace& w, const LoraLinearBackwardPlan& plan);
};

}  // namespace lora_kernels::cuda
