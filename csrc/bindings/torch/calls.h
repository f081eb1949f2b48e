// Operators as calls: tensors translated to a Problem and its Args, to be run at once or recorded in a composite.
#pragma once

#include "common.h"
#include "lora_kernels/int8_lora_linear.h"
#include "lora_kernels/kv_attention_step.h"
#include "lora_kernels/kv_pack.h"

namespace lora_kernels {

// What the schemas of int8_lora_linear and int8_lora_topk name; `op` is for messages.
struct Int8LoraLinearTensors {
  const char* op;
  const Tensor& x;
  const Tensor& packed_weight;
  int64_t out_features;
  const OptionalTensor &bias, &lora_a, &lora_b, &scales, &offsets, &adapter_ids, &residual;
  const std::string& activation;
  const OptionalTensor &x_scale, &norm_weight, &norm_bias;
  double norm_eps;
  int64_t max_rank;
};
struct Int8LoraLinearCall {
  Int8LoraLinearProblem problem;
  Int8LoraLinearArgs args;   // without output and workspace
  std::vector<Tensor> keep;  // copies that args point into
};
Int8LoraLinearCall int8_lora_linear_call(const Int8LoraLinearTensors& tensors);
// The screen of the packed weight, checked against it; for calls with set_top_k.
void set_screen(Int8LoraLinearCall* call, const OptionalTensor& screen);
// Values fp32 and columns int64 [..., k] of the largest outputs, and fp32 [...], in place of y.
void set_top_k(Int8LoraLinearCall* call, int64_t k, const Tensor& values, const Tensor& columns,
               const OptionalTensor& log_sum);

// What the schema of kv_attention_step names, in its order.
struct KvAttentionStepTensors {
  const Tensor& q;
  const OptionalTensor &k, &v;
  const Tensor &k_cache, &v_cache;
  const OptionalTensor &k_scales, &v_scales;
  const Tensor& lengths;
  const OptionalTensor& slots;
  double scale;
  const std::optional<std::vector<int64_t>>& heads;
};
struct KvAttentionStepCall {
  KvAttentionStepProblem problem;
  KvAttentionStepArgs args;  // without outputs and workspace; weight_heads points into tensors.heads
  std::vector<Tensor> keep;
};
KvAttentionStepCall kv_attention_step_call(const KvAttentionStepTensors& tensors);

struct KvPackCall {
  KvPackProblem problem;
  KvPackArgs args;  // without outputs and workspace
  std::vector<Tensor> keep;
};
KvPackCall kv_pack_call(const Tensor& k, const Tensor& v, int64_t heads);
std::vector<int64_t> packed_key_sizes(const KvPackProblem& problem);
std::vector<int64_t> packed_value_sizes(const KvPackProblem& problem);
void set_outputs(KvPackCall* call, const Tensor& packed_k, const Tensor& packed_v, const Tensor& k_scales,
                 const Tensor& v_scales);

}  // namespace lora_kernels
