// kv_relative_step: one chunk of a stream through self-attention with relative positions (Dai et al. 2019,
// arXiv:1901.02860, section 3.3; the attention of Conformers): append the chunk's k and v to a ring of cached frames
// and attend from every frame of the chunk to the whole chunk and to at most `left` frames before it.
//   s[i, h, f] = scale ((q[i, h] + u[h]) . K[f, h] + (q[i, h] + v[h]) . P[left + T - 1 - (n + i - f), h])
//   out[i, h] = sum_f softmax_f(s[i, h, f]) V[f, h]; f from max(0, n - left) to n + count - 1
// n: frames heard before this chunk, which has T, or count where it is shorter. Frame f of a stream lives at f mod
// capacity of its ring. Scores, softmax and sums in fp32.
//
// FLOPs 6 rows T H D (left + T); bytes rows H D (2 (left + T) cache + 4 T element) + H D (left + 2 T - 1) element.
#pragma once

#include <string>

#include "lora_kernels/device.h"
#include "lora_kernels/executor.h"
#include "lora_kernels/status.h"
#include "lora_kernels/types.h"

namespace lora_kernels {

struct KvRelativeStepImplementation;

struct KvRelativeStepProblem {
  int64_t rows = 0;               // streams of this call
  int64_t tokens = 1;             // T, frames of a chunk
  int64_t heads = 0;              // H
  int64_t head_size = 0;          // D
  int64_t cache_rows = 0;         // S, rings
  int64_t capacity = 0;           // C, frames of a ring: at least left + tokens, so that no frame in use is overwritten
  int64_t left = 0;               // most frames before the chunk that are attended to
  DType dtype = DType::kFloat32;  // of q, k, v, positions, both biases and out
  DType cache_dtype = DType::kFloat32;  // fp32, fp16 or bf16
  bool counts = false;                  // chunks may be shorter than T
  bool slots = false;                   // row i is not in ring i
};

struct KvRelativeStepArgs {
  const void* q = nullptr;  // [rows, T, H, D] contiguous
  const void* k = nullptr;
  const void* v = nullptr;
  void* k_cache = nullptr;  // [S, H, C, D] contiguous
  void* v_cache = nullptr;
  const void* positions = nullptr;   // [left + 2 T - 1, H, D]: projected embeddings of distances, the largest first
  const void* bias_u = nullptr;      // [H, D], added to q before K
  const void* bias_v = nullptr;      // [H, D], added to q before positions
  const int32_t* lengths = nullptr;  // [rows]: frames heard before this chunk
  const int32_t* counts = nullptr;   // [rows]: frames of this chunk, 0 to T; the others' k and v are ignored
  const int32_t* slots = nullptr;    // [rows]: the ring of each row
  float scale = 1;
  void* out = nullptr;  // [rows, T, H, D] contiguous; 0 for frames from counts on
  void* workspace = nullptr;
};

// How it runs on a CUDA device, as csrc/cuda says.
struct CudaKvRelativeStepPlan {
  int arch = 0;             //
  int groups = 1;           // of 64 channels of a head
  int chunks = 1;           // of a row's queries among blocks
  double predicted_us = 0;  // by the plan's bytes and FLOPs; no measurement
};
std::string to_string(const CudaKvRelativeStepPlan& plan);

struct KvRelativeStepPlan {
  KvRelativeStepProblem problem;
  const KvRelativeStepImplementation* implementation = nullptr;
  int tasks = 1;
  int64_t workspace = 0;
  CudaKvRelativeStepPlan cuda;  // of a CUDA device
};

Status plan(const KvRelativeStepProblem& problem, const DeviceInfo& device, KvRelativeStepPlan* plan);
int64_t workspace_bytes(const KvRelativeStepPlan& plan);
Status run(const KvRelativeStepPlan& plan, const KvRelativeStepArgs& args, const Executor& executor);

std::string to_string(const KvRelativeStepProblem& problem);
std::string to_string(const KvRelativeStepPlan& plan);

}  // namespace lora_kernels
