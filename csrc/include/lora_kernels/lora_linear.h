// lora_linear: y = act(x Wt + bias + s (dropout(x) At) B) + residual, and its gradients.
//   x [M, K]; W [N, K]; A [R, K]; B [R, N] by rank row; y [M, N]. Sums in fp32; storage fp32, fp16 or bf16.
//   FLOPs 2 M N K + 2 M r (K + N); bytes at one row (N K + r (K + N)) * element size: bound by memory at few rows, by
//   arithmetic at many.
#pragma once

#include <string>

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

// How it runs on a CUDA device, as csrc/cuda says.
enum class CudaLoraLinearPath : uint8_t {
  kBase,      // no LoRA branch: one tiled matrix product
  kTwoSteps,  // a kernel for t = s x At, then the base product, whose accumulators take t B as more steps over depth
  kInTile,    // one kernel: every tile makes the t of its own rows beside the base product
  kFewRows,   // up to 32 rows: W streams through registers; t, and the sum of split parts, are kernels of their own
};

struct CudaLoraLinearPlan {
  CudaLoraLinearPath path = CudaLoraLinearPath::kBase;
  int arch = 0;              // of the device, as in CudaDevice
  int tile_rows = 0;         // of a block
  int tile_columns = 0;      //
  int splits = 1;            // of K among blocks (kFewRows): partial sums go to the workspace
  bool large_tiles = false;  // which of the two tile shapes
  int wgmma_columns = 0;     // kBase, kTwoSteps: 128 or 256, of tiles by wgmma; 0: by mma.sync
  bool early_start = false;  // a kernel may start before the one whose result it needs at its end has finished
  bool t_in_blocks = false;  // kFewRows: blocks make t themselves, which saves the kernel before
  int cluster = 1;           // t_in_blocks: blocks that make it together
  // kTwoSteps: so many at most make t, beside which the product has room; 0: a block for every 16 rows
  int t_blocks = 0;
  bool convert_a = false;   // A is of another type than x: a kernel converts it first
  double predicted_us = 0;  // by the plan's bytes and FLOPs; orders the paths, and is no measurement
};
std::string to_string(const CudaLoraLinearPlan& plan);

struct CudaLoraLinearBackwardPlan {
  int arch = 0;
  bool large_tiles = false;  // of dx
  int wgmma_columns = 0;     // of dx: 128 or 256, by wgmma; 0: by mma.sync
  bool early_start = false;  //
  int a_splits = 1;          // of the rows, in the sums over rows: partial sums go to the workspace and are
  int b_splits = 1;          // added in order by a last kernel
  int w_splits = 1;          //
  // u = s dy Bt and dB = tt dy in one kernel that reads dy once; blocks take so many tiles of 64 rows, and split rows
  // and columns among them. Parts of both are added by a second kernel.
  bool dy_once = false;
  int row_tiles = 1, row_splits = 1, column_splits = 1;
  double predicted_us = 0;  //
};
std::string to_string(const CudaLoraLinearBackwardPlan& plan);

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
