// lora_linear: y = act(x Wt + bias + s (dropout(x) At) B) + residual, and its gradients.
//   x [M, K]; W [N, K]; A [R, K]; B [R, N] by rank row; y [M, N]. Sums in fp32; storage fp32, fp16 or bf16.
//   FLOPs 2 M N K + 2 M r (K + N); bytes at one row (N K + r (K + N)) * element size: bound by memory at few rows, by
//   arithmetic at many.
#pragma once

#include <string>

#include "lora_kernels/cuda_plan.h"
#include "lora_kernels/device.h"
#include "lora_kernels/executor.h"
#include "lora_kernels/lora_bank.h"
#include "lora_kernels/status.h"
#include "lora_kernels/types.h"

namespace lora_kernels {

struct LoraLinearImplementation;  // a row of the table of implementations

struct LoraLinearProblem {
  int64_t rows = 0;               // M
  int64_t in_features = 0;        // K
  int64_t out_features = 0;       // N
  DType dtype = DType::kFloat32;  // of x, W, residual and y
  DType bias_dtype = DType::kFloat32;
  bool has_bias = false;
  bool has_residual = false;
  Activation activation = Activation::kNone;
  LoraShape lora;
  double dropout_p = 0;  // of the LoRA branch's input; 0: none
  bool keeps_t = false;  // run() hands out t = s (dropout(x) At), for the gradients to come
  // On CUDA, products of fp32 storage are made of three tf32 products each, which keeps fp32's precision. This allows
  // one, of 10 bits, as torch.backends.cuda.matmul.allow_tf32 does.
  bool allow_tf32 = false;
};

struct LoraLinearArgs {
  const void* x = nullptr;  // [M, K], rows of stride x_stride elements
  int64_t x_stride = 0;
  const void* weight = nullptr;  // [N, K], rows of stride weight_stride
  int64_t weight_stride = 0;
  const void* bias = nullptr;  // [N]
  LoraBank lora;
  const void* residual = nullptr;  // [M, N] contiguous
  void* y = nullptr;               // [M, N] contiguous
  void* t = nullptr;               // with keeps_t: [M, kept_t_columns(lora)] of kept_t_dtype()
  uint64_t dropout_seed = 0;
  const int64_t* dropout_seed_on_device = nullptr;  // CUDA: read by the kernels in place of dropout_seed, unless null
  void* workspace = nullptr;                        // workspace_bytes(plan), aligned to 64 bytes (256 on a CUDA device)
};

// t of row m holds the ranks of m's own adapter, from column 0 on; what else is in a row, and in rows of the base
// alone, is for nobody to read. Its width follows from the sum of the ranks alone: offsets may be on a device.
inline int64_t kept_t_columns(const LoraShape& lora) { return round_up(lora.total_rank, 16); }
inline DType kept_t_dtype(const LoraLinearProblem& p, const DeviceInfo& device) {
  return device.cuda.arch ? p.dtype : DType::kFloat32;
}

// How the product is computed; chosen by plan() from the problem and the device alone.
enum class LoraLinearPath : uint8_t {
  kDot,    // few rows: dot products with W as it lies in memory, which is then read once
  kPanel,  // many rows: W repacked into panels of some columns, register tiles of rows x columns
};

struct LoraLinearPlan {
  LoraLinearProblem problem;
  const LoraLinearImplementation* implementation = nullptr;
  LoraLinearPath path = LoraLinearPath::kDot;
  int tasks = 1;            // of the executor
  int64_t l2_bytes = 0;     // of the device: blocks of rows are cut to fit it
  bool bf16_dot = false;    // bf16 storage is multiplied as bf16 (vdpbf16ps, or in tiles)
  int64_t workspace = 0;    // bytes
  CudaLoraLinearPlan cuda;  // on a CUDA device: everything above but problem, implementation and workspace is idle
};

Status plan(const LoraLinearProblem& problem, const DeviceInfo& device, LoraLinearPlan* plan);
int64_t workspace_bytes(const LoraLinearPlan& plan);
Status run(const LoraLinearPlan& plan, const LoraLinearArgs& args, const Executor& executor);

// Gradients of y = x Wt + bias + s (dropout(x) At) B for a given dy. An activation's derivative is applied by the
// caller (dy is then the gradient before it); the residual's gradient is dy itself.
struct LoraLinearBackwardProblem {
  LoraLinearProblem forward;
  bool needs_dx = false;
  bool needs_dweight = false;
  bool needs_dbias = false;
  bool needs_dlora = false;  // dA and dB
  bool has_t = false;        // args.t is what the forward pass handed out: it need not be made again for dB
};

struct LoraLinearBackwardArgs {
  const void* dy = nullptr;  // [M, N] contiguous, forward.dtype
  const void* x = nullptr;   // as in the forward pass
  int64_t x_stride = 0;
  const void* weight = nullptr;
  int64_t weight_stride = 0;
  LoraBank lora;
  const void* t = nullptr;  // with has_t: as in the forward pass
  uint64_t dropout_seed = 0;
  const int64_t* dropout_seed_on_device = nullptr;
  void* dx = nullptr;        // [M, K] contiguous, forward.dtype
  float* dweight = nullptr;  // [N, K] contiguous fp32
  float* dbias = nullptr;    // [N] fp32
  float* dlora_a = nullptr;  // [R, K] contiguous fp32
  float* dlora_b = nullptr;  // [R, N] contiguous fp32
  void* workspace = nullptr;
};

struct LoraLinearBackwardPlan {
  LoraLinearBackwardProblem problem;
  const LoraLinearImplementation* implementation = nullptr;
  int tasks = 1;
  int64_t l2_bytes = 0;
  int64_t workspace = 0;
  CudaLoraLinearBackwardPlan cuda;
};

Status plan(const LoraLinearBackwardProblem& problem, const DeviceInfo& device, LoraLinearBackwardPlan* plan);
int64_t workspace_bytes(const LoraLinearBackwardPlan& plan);
Status run(const LoraLinearBackwardPlan& plan, const LoraLinearBackwardArgs& args, const Executor& executor);

std::string to_string(const LoraLinearProblem& problem);
std::string to_string(const LoraLinearPlan& plan);
std::string to_string(const LoraLinearBackwardPlan& plan);

}  // namespace lora_kernels
