// kv_relative_step as a torch operator.
#include "lora_kernels/kv_relative_step.h"

#include "common.h"

namespace lora_kernels {
namespace {

constexpr const char* kOp = "kv_relative_step";

// An operand of the dtype of q; what is read once and small may be copied to lie consecutively.
Tensor operand(const char* argument, const Tensor& t, const Tensor& q, const std::vector<int64_t>& sizes) {
  expect_tensor(kOp, argument, t, t.scalar_type(), sizes);
  if (t.scalar_type() != q.scalar_type())
    refuse(kOp, argument,
           std::string("expected the dtype of q, ") + name_of(dtype_of(kOp, "q", q)) + ", got " +
               name_of(dtype_of(kOp, argument, t)) + "; convert it with .to(q.dtype)");
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

Tensor table(const char* argument, const Tensor& t, int64_t rows) {
  expect_tensor(kOp, argument, t, ScalarType::Int, {rows});
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// Written in place, so no copy can stand in for it.
void expect_in_place(const char* argument, const Tensor& t) {
  if (t.is_contiguous()) return;
  refuse(kOp, argument, "expected a contiguous tensor, got strides; store it with .contiguous() once");
}

void expect_rings(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, KvRelativeStepProblem* p) {
  p->cache_dtype = dtype_of(kOp, "k_cache", k_cache);
  if (k_cache.dim() != 4 || k_cache.size(1) != p->heads || k_cache.size(3) != p->head_size)
    refuse(kOp, "k_cache",
           "expected [rings, " + std::to_string(p->heads) + " heads, capacity, " + std::to_string(p->head_size) +
               "] to go with q " + shape_of(q) + ", got " + shape_of(k_cache));
  p->cache_rows = k_cache.size(0);
  p->capacity = k_cache.size(2);
  bool same = dtype_of(kOp, "v_cache", v_cache) == p->cache_dtype && v_cache.dim() == 4;
  for (int64_t i = 0; same && i < 4; ++i) same = v_cache.size(i) == k_cache.size(i);
  if (!same)
    refuse(kOp, "v_cache",
           "expected the shape and dtype of k_cache, " + shape_of(k_cache) + " " + name_of(p->cache_dtype) + ", got " +
               shape_of(v_cache) + " " + name_of(dtype_of(kOp, "v_cache", v_cache)));
  expect_in_place("k_cache", k_cache);
  expect_in_place("v_cache", v_cache);
}

Tensor kv_relative_step(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
                        const Tensor& positions, const Tensor& bias_u, const Tensor& bias_v, const Tensor& lengths,
                        int64_t left, const OptionalTensor& counts, const OptionalTensor& slots, double scale) {
  CallDevice device(kOp, q);
  if (q.dim() != 4) refuse(kOp, "q", "expected [rows, frames, heads, head size], got " + shape_of(q));
  KvRelativeStepProblem p;
  p.rows = q.size(0);
  p.tokens = q.size(1);
  p.heads = q.size(2);
  p.head_size = q.size(3);
  p.dtype = dtype_of(kOp, "q", q);
  p.left = left;
  p.counts = counts.has_value();
  p.slots = slots.has_value();
  expect_rings(q, k_cache, v_cache, &p);
  KvRelativeStepPlan chosen;  // before other shapes are compared with sums of sizes
  raise_if_failed(plan(p, device.info(), &chosen));

  const std::vector<int64_t> chunk = {p.rows, p.tokens, p.heads, p.head_size}, bias = {p.heads, p.head_size};
  const Tensor q_rows = operand("q", q, q, chunk), k_rows = operand("k", k, q, chunk);
  const Tensor v_rows = operand("v", v, q, chunk);
  const Tensor embedded = operand("positions", positions, q, {left + 2 * p.tokens - 1, p.heads, p.head_size});
  const Tensor u = operand("bias_u", bias_u, q, bias), w = operand("bias_v", bias_v, q, bias);
  const Tensor heard = table("lengths", lengths, p.rows);
  OptionalTensor count_rows, slot_rows;
  KvRelativeStepArgs args;
  if (counts) {
    count_rows = table("counts", *counts, p.rows);
    args.counts = static_cast<const int32_t*>(count_rows->data_ptr());
  }
  if (slots) {
    slot_rows = table("slots", *slots, p.rows);
    args.slots = static_cast<const int32_t*>(slot_rows->data_ptr());
  }
  const Tensor out = new_tensor(q, chunk);
  args.q = q_rows.data_ptr();
  args.k = k_rows.data_ptr();
  args.v = v_rows.data_ptr();
  args.k_cache = k_cache.data_ptr();
  args.v_cache = v_cache.data_ptr();
  args.positions = embedded.data_ptr();
  args.bias_u = u.data_ptr();
  args.bias_v = w.data_ptr();
  args.lengths = static_cast<const int32_t*>(heard.data_ptr());
  args.scale = static_cast<float>(scale);
  args.out = out.data_ptr();
  args.workspace = device.workspace(workspace_bytes(chosen));
  raise_if_failed(run(chosen, args, device.executor()));
  return out;
}

}  // namespace
}  // namespace lora_kernels

STABLE_TORCH_LIBRARY_IMPL(lora_kernels, CPU, m) {
  m.impl("kv_relative_step", TORCH_BOX(&lora_kernels::kv_relative_step));
}

#if defined(LORA_KERNELS_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(lora_kernels, CUDA, m) {
  m.impl("kv_relative_step", TORCH_BOX(&lora_kernels::kv_relative_step));
}
#endif
