// int8_lora_linear on a CUDA device: what the core's row calls. Everything but the launches is pure and needs no
// device.
#pragma once

#include "cuda/int8_shapes.h"
#include "cuda/lora_linear.h"
#include "lora_kernels/int8_lora_linear.h"

namespace lora_kernels::cuda {

// Why this cannot run on the device, every reason at once and what to do instead; or ok.
Status supported(const Int8LoraLinearProblem& problem, const CudaDevice& device);

// Fill the CUDA part and the workspace of a plan whose problem is set, valid and supported.
void configure(const DeviceInfo& device, Int8LoraLinearPlan* plan);
// The same without wgmma: what the row "cuda_mma" is.
void configure_mma(const DeviceInfo& device, Int8LoraLinearPlan* plan);

// What a block of a cluster of so many has in shared memory from the beginning, where every block makes rows for
// itself: nothing, all that rows are made of, or w besides.
enum class Int8Staging { kNone, kRows, kAll };
Int8Staged fused_staged(const Int8LoraLinearProblem& problem, int cluster, Int8Staging staging);

Status launch(const Int8LoraLinearPlan& plan, const Int8LoraLinearArgs& args, const Executor& executor);

// Whether one launch may make both calls: they are alike in size, and neither y is the x or the y of the other. That no
// y is another operand of the other call (a bias, a factor) is the caller's to know.
bool together(const Int8LoraLinearPlan& plan, const Int8LoraLinearArgs& args, const Int8LoraLinearPlan& other,
              const Int8LoraLinearArgs& other_args);
// Up to kInt8MostTogether calls of which each pair may be made so.
Status launch_together(const Int8LoraLinearPlan* const* plans, const Int8LoraLinearArgs* const* args, int count,
                       const Executor& executor);

struct Int8Workspace {
  int8_t* q;      // [M, q_stride]
  float* scales;  // [M]
  void* a;        // A in the type of x, [R, K]
  void* t;        // [M, t_stride] in the type of x
  int32_t* sums;  // [splits, M, N]
  float* y;       // [M, N] fp32, with top_k
  float* top_values;
  int32_t* top_places;
  float* exponents;
  int64_t q_stride;
  Int8Workspace(Workspace& w, const Int8LoraLinearPlan& plan);
};

// The launches of one storage type; each type is a translation unit of its own.
template <class T>
struct Int8LoraLinearKernels {
  static Status forward(const Int8LoraLinearPlan& plan, const Int8LoraLinearArgs& args, void* stream);
  static Status forward_together(const Int8LoraLinearPlan* const* plans, const Int8LoraLinearArgs* const* args,
                                 int count, void* stream);
};

}  // namespace lora_kernels::cuda
