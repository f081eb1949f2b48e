// kv_pack: keys and values as a projection leaves them to fixed INT8 ones in the layout of kv_packing.h, quantized per
// channel: once per utterance and layer, for every kv_attention_step that follows.
//   scale[s, h, d] = amax / 127 over the positions, packed = clamp(rint(x * (127 / amax)), -127, 127)
// A channel of zeros, or one so small that 127 / amax overflows, gives 0 and scale 0; one that holds a NaN or an
// infinity gives 0 and scale NaN, which makes all that attends to it NaN.
#pragma once

#include <string>

#include "lora_kernels/device.h"
#include "lora_kernels/executor.h"
#include "lora_kernels/status.h"
#include "lora_kernels/types.h"

namespace lora_kernels {

struct KvPackImplementation;

struct KvPackProblem {
  int64_t cache_rows = 0;         // S, utterances
  int64_t positions = 0;          // C
  int64_t heads = 0;              // H
  int64_t head_size = 0;          // D
  DType dtype = DType::kFloat32;  // of k and v
};

struct KvPackArgs {
  const void* k = nullptr;  // [S, C, H * D], unit stride along the last dimension
  const void* v = nullptr;
  int64_t k_stride = 0, v_stride = 0;          // elements between positions
  int64_t k_row_stride = 0, v_row_stride = 0;  // elements between utterances
  int8_t* packed_k = nullptr;                  // [S, H, kv_key_bytes]
  int8_t* packed_v = nullptr;                  // [S, H, kv_value_bytes]
  float* k_scales = nullptr;                   // [S, H, 1, D]
  float* v_scales = nullptr;
  void* workspace = nullptr;
};

// How it runs on a CUDA device, as csrc/cuda says.
struct CudaKvPackPlan {
  int arch = 0;             //
  double predicted_us = 0;  // by the plan's bytes and FLOPs; no measurement
};
std::string to_string(const CudaKvPackPlan& plan);

struct KvPackPlan {
  KvPackProblem problem;
  const KvPackImplementation* implementation = nullptr;
  int tasks = 1;
  int64_t workspace = 0;
  CudaKvPackPlan cuda;  // of a CUDA device
};

Status plan(const KvPackProblem& problem, const DeviceInfo& device, KvPackPlan* plan);
int64_t workspace_bytes(const KvPackPlan& plan);
Status run(const KvPackPlan& plan, const KvPackArgs& args, const Executor& executor);

std::string to_string(const KvPackProblem& problem);
std::string to_string(const KvPackPlan& plan);

}  // namespace lora_kernels
