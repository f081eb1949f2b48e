// kv_attention_step: append the new tokens' k, v to a cache and attend over it: one decoding step of self-attention
// (growing; beams reordered by an index table, never by copying) or of cross-attention (fixed K/V, shared by the beams
// of an utterance). On a CUDA device lengths, slots and scales are in its memory and cannot be refused before the
// launch: a row whose length or slot is out of range, or whose scale per channel is no positive finite number, becomes
// NaN.
//   out[i, t, h] = sum_p softmax_p(scale * q[i, t, h] . K[p, h]) V[p, h]; softmax and sums in fp32.
//   FLOPs 4 rows T H D positions; bytes 2 rows H positions D * element size (shared rows are read once): bound by
//   memory.
#pragma once

#include <string>

#include "lora_kernels/device.h"
#include "lora_kernels/executor.h"
#include "lora_kernels/status.h"
#include "lora_kernels/types.h"

namespace lora_kernels {

struct KvAttentionStepImplementation;

enum class KvScales : uint8_t {
  kNone,         // floating-point cache
  kPerPosition,  // [S, H, C, 1]: written on append
  kPerChannel,   // [S, H, 1, D]: quantized beforehand, no append
};

enum class KvSlots : uint8_t {
  kIdentity,     // row i uses cache row i
  kPerRow,       // slots [rows]
  kPerPosition,  // slots [rows, C]: position p of row i lives in cache row slots[i, p]
};

// The order of a cache's elements.
enum class KvLayout : uint8_t {
  kRowMajor,  // [S, H, C, D]
  kBlocked,   // int8 for integer dot products, by kv_pack (kv_packing.h): scales per channel, no append
};

struct KvAttentionStepProblem {
  int64_t rows = 0;               // of q: utterances x beams
  int64_t tokens = 1;             // T, new tokens per row
  int64_t heads = 0;              // H
  int64_t head_size = 0;          // D
  int64_t cache_rows = 0;         // S
  int64_t capacity = 0;           // C, positions per cache row
  DType dtype = DType::kFloat32;  // of q, k, v and out
  DType cache_dtype = DType::kFloat32;
  KvScales scales = KvScales::kNone;
  KvSlots slots = KvSlots::kIdentity;
  KvLayout layout = KvLayout::kRowMajor;
  bool append = false;       // k and v are given: causal self-attention
  int64_t weight_heads = 0;  // heads whose softmax weights are returned
};

struct KvAttentionStepArgs {
  const void* q = nullptr;  // [rows, T, H, D] contiguous
  const void* k = nullptr;  // [rows, T, H, D] contiguous, or null
  const void* v = nullptr;
  void* k_cache = nullptr;  // contiguous, by Problem.layout
  void* v_cache = nullptr;
  float* k_scales = nullptr;  // by Problem.scales
  float* v_scales = nullptr;
  const int32_t* lengths = nullptr;  // [rows]: valid positions before this call
  const int32_t* slots = nullptr;    // by Problem.slots
  float scale = 1;
  const int64_t* weight_heads = nullptr;  // [weight_heads], in the CPU's memory on any device
  float* weights = nullptr;               // [rows, weight_heads, T, C], or null
  void* out = nullptr;                    // [rows, T, H, D] contiguous
  void* workspace = nullptr;
};

// How it runs on a CUDA device, as csrc/cuda says.
struct CudaKvAttentionStepPlan {
  int arch = 0;             //
  int groups = 1;           // of 64 channels of a head
  bool fused = false;       // new tokens are appended by the kernel that attends; else by one before it
  bool grouped = false;     // a block has all queries of a cache row, which is read once for them; else those of a row
  bool places = false;      // the places of positions are looked up beforehand: new tokens, or slots per position
  int chunks = 1;           // of queries among blocks; more than so many follow in turns
  int splits = 1;           // of the positions among blocks
  int split_positions = 0;  // of each; of a cluster's splits the last may have none
  int cluster = 1;          // or splits: sums go from block to block (sm_90 on), else to memory, and a kernel adds them
  int ask = 0;              // for so many tiles of a warp ahead to come to L2
  bool early_start = false;  // kernels may start before the one before has finished, whichever operator's that is
  double predicted_us = 0;   // by the plan's bytes and FLOPs; no measurement, with a cache that is full
};
std::string to_string(const CudaKvAttentionStepPlan& plan);

struct KvAttentionStepPlan {
  KvAttentionStepProblem problem;
  const KvAttentionStepImplementation* implementation = nullptr;
  int tasks = 1;
  int64_t workspace = 0;
  CudaKvAttentionStepPlan cuda;  // of a CUDA device
};

Status plan(const KvAttentionStepProblem& problem, const DeviceInfo& device, KvAttentionStepPlan* plan);
int64_t workspace_bytes(const KvAttentionStepPlan& plan);
Status run(const KvAttentionStepPlan& plan, const KvAttentionStepArgs& args, const Executor& executor);

std::string to_string(const KvAttentionStepProblem& problem);
std::string to_string(const KvAttentionStepPlan& plan);

}  // namespace lora_kernels
