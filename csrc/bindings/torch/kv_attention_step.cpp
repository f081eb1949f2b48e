// kv_attention_step as a torch operator.
#include "lora_kernels/kv_attention_step.h"

#include <tuple>

#include "calls.h"
#include "lora_kernels/kv_packing.h"

namespace lora_kernels {
namespace {

constexpr const char* kOp = "kv_attention_step";

std::string text_of(const std::vector<int64_t>& sizes) {
  std::string text = "[";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + "]";
}

bool has_shape(const Tensor& t, const std::vector<int64_t>& sizes) {
  if (t.dim() != static_cast<int64_t>(sizes.size())) return false;
  for (size_t i = 0; i < sizes.size(); ++i)
    if (t.size(i) != sizes[i]) return false;
  return true;
}

Tensor consecutive(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// The shape and dtype of q; text is only built on a fault.
void expect_like_q(const char* argument, const Tensor& t, const Tensor& q) {
  bool same = t.dim() == q.dim() && t.scalar_type() == q.scalar_type();
  for (int64_t i = 0; same && i < q.dim(); ++i) same = t.size(i) == q.size(i);
  if (same) return;
  refuse(kOp, argument,
         "expected the shape and dtype of q, " + shape_of(q) + " " + name_of(dtype_of(kOp, "q", q)) + ", got " +
             shape_of(t) + " " + name_of(dtype_of(kOp, argument, t)));
}

// A cache or its scales: written or at least read in place, so no copy can stand in for it.
void expect_in_place(const char* argument, const Tensor& t) {
  if (t.is_contiguous()) return;
  refuse(kOp, argument, "expected a contiguous tensor, got strides; store it with .contiguous() once");
}

// Caches [S, H, C, D].
void expect_row_major(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, KvAttentionStepProblem* p) {
  if (k_cache.dim() != 4 || k_cache.size(1) != p->heads || k_cache.size(3) != p->head_size)
    refuse(kOp, "k_cache",
           "expected [cache rows, " + std::to_string(p->heads) + " heads, capacity, " + std::to_string(p->head_size) +
               "] to go with q " + shape_of(q) + ", or what kv_pack made, got " + shape_of(k_cache));
  p->cache_rows = k_cache.size(0);
  p->capacity = k_cache.size(2);
  if (!has_shape(v_cache, {p->cache_rows, p->heads, p->capacity, p->head_size}) ||
      v_cache.scalar_type() != k_cache.scalar_type())
    refuse(kOp, "v_cache",
           "expected the shape and dtype of k_cache, " + shape_of(k_cache) + " " + name_of(p->cache_dtype) + ", got " +
               shape_of(v_cache) + " " + name_of(dtype_of(kOp, "v_cache", v_cache)));
}

// Blocked caches (kv_packing.h). V tells the number of positions, rounded up to a step.
void expect_blocked(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, KvAttentionStepProblem* p) {
  p->layout = KvLayout::kBlocked;
  p->cache_rows = k_cache.size(0);
  const std::vector<int64_t> keys = {p->cache_rows,     p->heads, k_cache.size(2), kv_key_steps(p->head_size),
                                     kKvBlockPositions, kKvStep};
  if (!has_shape(k_cache, keys))
    refuse(kOp, "k_cache",
           "expected " + text_of(keys) + ", the keys that kv_pack made, to go with q " + shape_of(q) + ", got " +
               shape_of(k_cache));
  const int64_t steps = v_cache.dim() == 5 ? v_cache.size(2) : 0;
  p->capacity = steps * kKvStep;
  const std::vector<int64_t> values = {p->cache_rows, p->heads, steps, kv_value_channels(p->head_size), kKvStep};
  if (!has_shape(v_cache, values) || kv_key_blocks(p->capacity) != k_cache.size(2) ||
      v_cache.scalar_type() != ScalarType::Char)
    refuse(kOp, "v_cache",
           "expected the int8 values that kv_pack made beside k_cache " + shape_of(k_cache) + ", [" +
               std::to_string(p->cache_rows) + ", " + std::to_string(p->heads) + ", positions / 4, " +
               std::to_string(values[3]) + ", 4], got " + shape_of(v_cache) + " " +
               name_of(dtype_of(kOp, "v_cache", v_cache)));
}

KvScales scales_of(const OptionalTensor& k_scales, const OptionalTensor& v_scales, const KvAttentionStepProblem& p,
                   KvAttentionStepArgs* args) {
  if (k_scales.has_value() != v_scales.has_value())
    refuse(kOp, k_scales ? "v_scales" : "k_scales",
           "expected the scales of both caches or of none, got None for this one");
  if (!k_scales) return KvScales::kNone;
  const std::vector<int64_t> position = {p.cache_rows, p.heads, p.capacity, 1};
  const std::vector<int64_t> channel = {p.cache_rows, p.heads, 1, p.head_size};
  const bool per_position = has_shape(*k_scales, position);
  if (!per_position && !has_shape(*k_scales, channel))
    refuse(kOp, "k_scales",
           "expected " + text_of(position) + " (one per position) or " + text_of(channel) + " (one per channel), got " +
               shape_of(*k_scales));
  expect_tensor(kOp, "k_scales", *k_scales, ScalarType::Float, per_position ? position : channel);
  expect_tensor(kOp, "v_scales", *v_scales, ScalarType::Float, per_position ? position : channel);
  expect_in_place("k_scales", *k_scales);
  expect_in_place("v_scales", *v_scales);
  args->k_scales = static_cast<float*>(k_scales->data_ptr());
  args->v_scales = static_cast<float*>(v_scales->data_ptr());
  return per_position ? KvScales::kPerPosition : KvScales::kPerChannel;
}

KvSlots slots_of(const Tensor& slots, const KvAttentionStepProblem& p) {
  const bool table = slots.dim() == 2;
  const bool fits = has_shape(slots, table ? std::vector<int64_t>{p.rows, p.capacity} : std::vector<int64_t>{p.rows});
  if (!fits || slots.scalar_type() != ScalarType::Int)
    refuse(kOp, "slots",
           "expected int32 " + text_of({p.rows}) + " (the cache row of each row of q) or " +
               text_of({p.rows, p.capacity}) + " (of each position), got " + shape_of(slots) +
               (fits ? " of another dtype; convert it with .to(torch.int32)" : ""));
  return table ? KvSlots::kPerPosition : KvSlots::kPerRow;
}

std::tuple<Tensor, Tensor> kv_attention_step(const Tensor& q, const OptionalTensor& k, const OptionalTensor& v,
                                             const Tensor& k_cache, const Tensor& v_cache,
                                             const OptionalTensor& k_scales, const OptionalTensor& v_scales,
                                             const Tensor& lengths, const OptionalTensor& slots, double scale,
                                             const std::optional<std::vector<int64_t>> heads) {
  CallDevice device(kOp, q);
  KvAttentionStepCall call =
      kv_attention_step_call({q, k, v, k_cache, v_cache, k_scales, v_scales, lengths, slots, scale, heads});
  const KvAttentionStepProblem& p = call.problem;
  KvAttentionStepPlan chosen;
  raise_if_failed(plan(p, device.info(), &chosen));
  Tensor out = new_tensor(q, {p.rows, p.tokens, p.heads, p.head_size});
  Tensor weights = new_tensor(
      q, heads ? std::vector<int64_t>{p.rows, p.weight_heads, p.tokens, p.capacity} : std::vector<int64_t>{0},
      ScalarType::Float);
  call.args.weights = p.weight_heads > 0 ? static_cast<float*>(weights.data_ptr()) : nullptr;
  call.args.out = out.data_ptr();
  call.args.workspace = device.workspace(workspace_bytes(chosen));
  raise_if_failed(run(chosen, call.args, device.executor()));
  return std::make_tuple(out, weights);
}

}  // namespace

KvAttentionStepCall kv_attention_step_call(const KvAttentionStepTensors& t) {
  const auto& [q, k, v, k_cache, v_cache, k_scales, v_scales, lengths, slots, scale, heads] = t;
  KvAttentionStepCall call;
  KvAttentionStepProblem& p = call.problem;
  KvAttentionStepArgs& args = call.args;
  if (q.dim() != 4) refuse(kOp, "q", "expected [rows, tokens, heads, head size], got " + shape_of(q));
  p.rows = q.size(0);
  p.tokens = q.size(1);
  p.heads = q.size(2);
  p.head_size = q.size(3);
  p.dtype = dtype_of(kOp, "q", q);
  p.cache_dtype = dtype_of(kOp, "k_cache", k_cache);
  expect_same_device(kOp, "v_cache", v_cache);
  if (k) expect_same_device(kOp, "k", *k);
  if (v) expect_same_device(kOp, "v", *v);
  if (slots) expect_same_device(kOp, "slots", *slots);
  if (k_cache.dim() == 6)
    expect_blocked(q, k_cache, v_cache, &p);
  else
    expect_row_major(q, k_cache, v_cache, &p);
  expect_in_place("k_cache", k_cache);
  expect_in_place("v_cache", v_cache);
  if (k.has_value() != v.has_value())
    refuse(kOp, k ? "v" : "k",
           "expected the new tokens' keys and values, or None for both (cross-attention), got None for this one");
  p.append = k.has_value();
  p.scales = scales_of(k_scales, v_scales, p, &args);
  expect_tensor(kOp, "lengths", lengths, ScalarType::Int, {p.rows});

  // What is read once and small may be copied to lie consecutively.
  const Tensor q_rows = consecutive(q), length_rows = consecutive(lengths);
  OptionalTensor k_rows, v_rows, slot_rows;
  if (k) {
    expect_like_q("k", *k, q);
    expect_like_q("v", *v, q);
    k_rows = consecutive(*k);
    v_rows = consecutive(*v);
    args.k = k_rows->data_ptr();
    args.v = v_rows->data_ptr();
  }
  if (slots) {
    p.slots = slots_of(*slots, p);
    slot_rows = consecutive(*slots);
    args.slots = static_cast<const int32_t*>(slot_rows->data_ptr());
  }
  if (heads) {
    p.weight_heads = static_cast<int64_t>(heads->size());
    args.weight_heads = heads->data();
  }
  args.q = q_rows.data_ptr();
  args.k_cache = k_cache.data_ptr();
  args.v_cache = v_cache.data_ptr();
  args.lengths = static_cast<const int32_t*>(length_rows.data_ptr());
  args.scale = static_cast<float>(scale);
  call.keep = {q_rows, length_rows};
  for (const OptionalTensor* copy : {&k_rows, &v_rows, &slot_rows})
    if (*copy) call.keep.push_back(**copy);
  return call;
}

}  // namespace lora_kernels

STABLE_TORCH_LIBRARY_IMPL(lora_kernels, CPU, m) {
  m.impl("kv_attention_step", TORCH_BOX(&lora_kernels::kv_attention_step));
}

#if defined(LORA_KERNELS_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(lora_kernels, CUDA, m) {
  m.impl("kv_attention_step", TORCH_BOX(&lora_kernels::kv_attention_step));
}
#endif
