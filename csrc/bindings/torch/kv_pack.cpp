// kv_pack as a torch operator.
#include "lora_kernels/kv_pack.h"

#include <tuple>

#include "calls.h"
#include "lora_kernels/kv_packing.h"

namespace lora_kernels {
namespace {

constexpr const char* kOp = "kv_pack";

// [S, C, H * D] with unit stride along the last dimension: a view where memory allows (a slice of a fused projection),
// else a copy.
Tensor states_of(const Tensor& t) { return t.stride(2) == 1 || t.size(2) <= 1 ? t : torch::stable::contiguous(t); }

std::tuple<Tensor, Tensor, Tensor, Tensor> kv_pack(const Tensor& k, const Tensor& v, int64_t heads) {
  CallDevice device(kOp, k);
  KvPackCall call = kv_pack_call(k, v, heads);
  KvPackPlan chosen;
  raise_if_failed(plan(call.problem, device.info(), &chosen));
  const Tensor packed_k = new_tensor(k, packed_key_sizes(call.problem), ScalarType::Char);
  const Tensor packed_v = new_tensor(k, packed_value_sizes(call.problem), ScalarType::Char);
  const std::vector<int64_t> scales = {call.problem.cache_rows, heads, 1, call.problem.head_size};
  const Tensor k_scales = new_tensor(k, scales, ScalarType::Float), v_scales = new_tensor(k, scales, ScalarType::Float);
  set_outputs(&call, packed_k, packed_v, k_scales, v_scales);
  call.args.workspace = device.workspace(workspace_bytes(chosen));
  raise_if_failed(run(chosen, call.args, device.executor()));
  return std::make_tuple(packed_k, packed_v, k_scales, v_scales);
}

}  // namespace

KvPackCall kv_pack_call(const Tensor& k, const Tensor& v, int64_t heads) {
  KvPackCall call;
  KvPackProblem& p = call.problem;
  p.dtype = dtype_of(kOp, "k", k);
  if (k.dim() != 3) refuse(kOp, "k", "expected [utterances, positions, heads * head size], got " + shape_of(k));
  bool same = v.dim() == 3 && dtype_of(kOp, "v", v) == p.dtype;
  for (int64_t i = 0; same && i < 3; ++i) same = v.size(i) == k.size(i);
  if (!same)
    refuse(kOp, "v",
           "expected the shape and dtype of k, " + shape_of(k) + " " + name_of(p.dtype) + ", got " + shape_of(v) + " " +
               name_of(dtype_of(kOp, "v", v)));
  if (heads < 1 || k.size(2) % heads != 0)
    refuse(kOp, "heads",
           "expected a number of heads that divides the " + std::to_string(k.size(2)) + " columns of k, got " +
               std::to_string(heads));
  p.cache_rows = k.size(0);
  p.positions = k.size(1);
  p.heads = heads;
  p.head_size = k.size(2) / heads;
  const Tensor k_states = states_of(k), v_states = states_of(v);
  call.args.k = k_states.data_ptr();
  call.args.v = v_states.data_ptr();
  call.args.k_stride = k_states.stride(1);
  call.args.v_stride = v_states.stride(1);
  call.args.k_row_stride = k_states.stride(0);
  call.args.v_row_stride = v_states.stride(0);
  call.keep = {k_states, v_states};
  return call;
}

std::vector<int64_t> packed_key_sizes(const KvPackProblem& p) {
  return {p.cache_rows, p.heads, kv_key_blocks(p.positions), kv_key_steps(p.head_size), kKvBlockPositions, kKvStep};
}

std::vector<int64_t> packed_value_sizes(const KvPackProblem& p) {
  return {p.cache_rows, p.heads, kv_value_steps(p.positions), kv_value_channels(p.head_size), kKvStep};
}

void set_outputs(KvPackCall* call, const Tensor& packed_k, const Tensor& packed_v, const Tensor& k_scales,
                 const Tensor& v_scales) {
  call->args.packed_k = static_cast<int8_t*>(packed_k.data_ptr());
  call->args.packed_v = static_cast<int8_t*>(packed_v.data_ptr());
  call->args.k_scales = static_cast<float*>(k_scales.data_ptr());
  call->args.v_scales = static_cast<float*>(v_scales.data_ptr());
}

}  // namespace lora_kernels

STABLE_TORCH_LIBRARY_IMPL(lora_kernels, CPU, m) { m.impl("kv_pack", TORCH_BOX(&lora_kernels::kv_pack)); }

#if defined(LORA_KERNELS_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(lora_kernels, CUDA, m) { m.impl("kv_pack", TORCH_BOX(&lora_kernels::kv_pack)); }
#endif
