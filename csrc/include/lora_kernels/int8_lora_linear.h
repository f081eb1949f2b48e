// int8_lora_linear: y = act(s_x[m] s_w[n] (q_x q_wt) + bias + s (x At) B) + residual with W in INT8 per output channel
// and x quantized to INT8 per row on the fly (dynamic) or by a calibrated scale (static).
//   q_x = clamp(round_half_even(x * (127 / amax(row))), -127, 127); integer sums are exact, so they are equal in every
//   implementation. The LoRA branch sees x before quantization. A row with a non-finite element gives NaN.
// Prologue: x may first go through LayerNorm, in fp32; everything above then sees the normalized x. Epilogue: instead
// of y, the columns and values of each row's top_k largest y and the log of the sum of their exponentials (the choice
// over a vocabulary), which saves writing and reading y.
#pragma once

#include <string>

#include "lora_kernels/device.h"
#include "lora_kernels/executor.h"
#include "lora_kernels/int8_packing.h"
#include "lora_kernels/lora_bank.h"
#include "lora_kernels/status.h"
#include "lora_kernels/types.h"

namespace lora_kernels {

struct Int8LoraLinearImplementation;

struct Int8LoraLinearProblem {
  int64_t rows = 0;               // M
  int64_t in_features = 0;        // K
  int64_t out_features = 0;       // N
  DType dtype = DType::kFloat32;  // of x, residual and y
  DType bias_dtype = DType::kFloat32;
  bool has_bias = false;
  bool has_residual = false;
  bool static_scale = false;  // x_scale is given
  bool has_norm = false;      // x becomes (x - mean) / sqrt(variance + norm_eps) * norm_weight + norm_bias
  DType norm_dtype = DType::kFloat32;
  float norm_eps = 1e-5f;
  int64_t top_k = 0;     // over 0: columns and values of the largest y, and not y; the first column among equals
  bool log_sum = false;  // with top_k: also log(sum over n of exp(y[m, n]))
  // With top_k: Args.screen is given. A few rows without LoRA and log_sum read it in place of most of the weight; all
  // others leave it alone. The results are the same (cpu/int8_screen.inl says with what probability).
  bool has_screen = false;
  Activation activation = Activation::kNone;
  LoraShape lora;
};

struct Int8LoraLinearArgs {
  const void* x = nullptr;  // [M, K], rows of stride x_stride elements
  int64_t x_stride = 0;
  const uint8_t* packed_weight = nullptr;  // int8_packed_bytes(N, K), aligned to 64 bytes
  const uint8_t* screen = nullptr;         // int8_screen_bytes(N, K) of this weight, aligned to 64 bytes, or null
  const void* bias = nullptr;              // [N]
  LoraBank lora;
  // [1], for static quantization. On CUDA in the device's memory, where no positive finite number makes every row NaN,
  // or null and host_x_scale given instead.
  const float* x_scale = nullptr;
  float host_x_scale = 0;
  const void* norm_weight = nullptr;  // [K]
  const void* norm_bias = nullptr;    // [K]
  const void* residual = nullptr;     // [M, N] contiguous
  void* y = nullptr;                  // [M, N] contiguous, or null
  int64_t* top_columns = nullptr;     // [M, top_k], largest first
  float* top_values = nullptr;        // [M, top_k], or null
  float* log_sum = nullptr;           // [M], with Problem.log_sum
  void* workspace = nullptr;          // workspace_bytes(plan), aligned to 64 bytes (256 on a CUDA device)
};

// How it runs on a CUDA device, as csrc/cuda says.
enum class CudaInt8LoraLinearPath : uint8_t {
  kTiled,    // a kernel for INT8 rows, their scales and t, then INT8 tiles whose sums take t B as more steps over depth
  kFewRows,  // up to 32 rows: the same kernel, then W streamed through registers
  kFused,    // up to 16 rows: one kernel, whose blocks quantize the rows and make t for themselves
};

struct CudaInt8LoraLinearPlan {
  CudaInt8LoraLinearPath path = CudaInt8LoraLinearPath::kTiled;
  int arch = 0;              //
  bool large_tiles = false;  // kTiled: 128 x 128, or 64 x 64
  int wgmma_rows = 0;        // kTiled: 128, 256 or 320, of tiles of 128 channels by wgmma; 0: by mma.sync
  int resident = 0;          // of more than 128 rows: so many blocks at most, which take tile after tile
  int splits = 1;            // kFewRows: of K among blocks; integer parts go to the workspace
  // kTiled: the product may start before the kernel that makes its rows has finished. kFewRows, kFused: every kernel
  // may start before the one before it has, whichever operator that is of; so may the choice among outputs.
  bool early_start = false;
  bool convert_a = false;  // A is of another type than x: a kernel converts it first
  int cluster = 1;         // kFewRows, kFused: blocks that share out K; integer parts go from one to the other
  int rows_of_block = 16;  // kTiled, kFewRows: that the kernel before quantizes in a block
  // Of shared memory while rows are quantized: for each row of x, and of the first ranks of an A of few rows; 0: they
  // are read from L2.
  int staged_bytes = 0, staged_a_bytes = 0;
  bool staged_w = false;    // kFused: and a block's part of w
  double predicted_us = 0;  // by the plan's bytes and FLOPs; no measurement
};
std::string to_string(const CudaInt8LoraLinearPlan& plan);

struct Int8LoraLinearPlan {
  Int8LoraLinearProblem problem;
  const Int8LoraLinearImplementation* implementation = nullptr;
  int tasks = 1;
  bool bf16_dot = false;  // bf16 adapters are multiplied as bf16, x too (vdpbf16ps, or in tiles)
  bool tiles = false;     // AMX
  int64_t workspace = 0;
  CudaInt8LoraLinearPlan cuda;  // on a CUDA device, where tasks and bf16_dot are idle and a screen is not read
};

Status plan(const Int8LoraLinearProblem& problem, const DeviceInfo& device, Int8LoraLinearPlan* plan);
int64_t workspace_bytes(const Int8LoraLinearPlan& plan);
Status run(const Int8LoraLinearPlan& plan, const Int8LoraLinearArgs& args, const Executor& executor);

// How many of these calls, from the first on and at least one, a device can make in one launch: calls of one size and
// one x that need nothing of each other, as q, k and v of a layer do. run() of so many of them is that launch.
int together(const Int8LoraLinearPlan* const* plans, const Int8LoraLinearArgs* const* args, int count);
Status run(const Int8LoraLinearPlan* const* plans, const Int8LoraLinearArgs* const* args, int count,
           const Executor& executor);

std::string to_string(const Int8LoraLinearProblem& problem);
std::string to_string(const Int8LoraLinearPlan& plan);

}  // namespace lora_kernels
