// Composites as torch sees them: a handle, operators recorded under it with their output tensors, and one call that
// runs them all. Recorded tensors are kept alive and read and written in place at every run.
#include "lora_kernels/composite.h"

#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>

#include "calls.h"
#include "lora_kernels/implementations.h"

namespace lora_kernels {
namespace {

struct Recording {
  CompositeProblem problem;
  CompositeArgs args;
  std::vector<Tensor> keep;
  OptionalTensor on;  // an operand: all are on its device
  CompositePlan plan;
  bool planned = false;
  int threads = 0;     // of the plan
  std::string forced;  // implementation, of the plan
};

// Handles are numbers because the stable ABI has no objects of ours.
struct Registry {
  std::mutex mutex;
  std::map<int64_t, std::shared_ptr<Recording>> recordings;
  int64_t next = 1;
};
Registry& registry() {
  static Registry all;
  return all;
}

std::shared_ptr<Recording> find(int64_t handle) {
  Registry& all = registry();
  const std::lock_guard<std::mutex> lock(all.mutex);
  const auto found = all.recordings.find(handle);
  if (found == all.recordings.end())
    refuse("composite", "handle", "expected one that composite_new returned, got " + std::to_string(handle));
  return found->second;
}

int64_t create() {
  Registry& all = registry();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.recordings.emplace(all.next, std::make_shared<Recording>());
  return all.next++;
}

void release(int64_t handle) {
  Registry& all = registry();
  std::shared_ptr<Recording> last;  // dies after the lock: destroying tensors may run Python, which may come here again
  const std::lock_guard<std::mutex> lock(all.mutex);
  const auto found = all.recordings.find(handle);
  if (found == all.recordings.end()) return;
  last = std::move(found->second);
  all.recordings.erase(found);
}

// A copy made while recording would never see what is written to the original later.
void expect_in_place(const char* argument, const OptionalTensor& t) {
  if (t && !t->is_contiguous())
    refuse("composite", argument,
           "expected a contiguous tensor, as it is read anew at every run, got " + shape_of(*t) +
               " with strides; make it with .contiguous() and write to that");
}

// Bytes from the first to behind the last element.
std::pair<const char*, const char*> extent_of(const char* argument, const Tensor& t) {
  const char* begin = static_cast<const char*>(t.data_ptr());
  if (t.numel() == 0) return {begin, begin};
  int64_t last = 0;
  for (int64_t i = 0; i < t.dim(); ++i) last += (t.size(i) - 1) * t.stride(i);
  return {begin, begin + (last + 1) * static_cast<int64_t>(size_of(dtype_of("composite", argument, t)))};
}

// Tasks write their part of the result while others still read the operand.
void expect_apart(const char* argument, const Tensor& out, const char* operand, const Tensor& t) {
  const auto [begin, end] = extent_of(argument, out);
  const auto [other_begin, other_end] = extent_of(operand, t);
  if (begin < other_end && other_begin < end)
    refuse("composite", argument,
           std::string("expected memory apart from ") + operand +
               ", which is read while this is written, got memory they share; give it its own");
}

template <class Call>
void record(int64_t handle, Call& call, const CallDevice& device, std::vector<OptionalTensor> operands) {
  Recording& recording = *find(handle);
  const Tensor& first = *operands.front();
  if (recording.on && (recording.on->is_cuda() != first.is_cuda() ||
                       (first.is_cuda() && recording.on->get_device_index() != first.get_device_index())))
    refuse("composite", "x", "expected tensors on the device of the operators before, got another; move all to one");
  CompositePlan chosen;  // what no run could do is refused here
  raise_if_failed(plan(CompositeProblem{{call.problem}}, device.info(), &chosen));
  if (!recording.on) recording.on = first;
  recording.problem.stages.emplace_back(call.problem);
  recording.args.stages.emplace_back(call.args);
  recording.planned = false;
  recording.keep.insert(recording.keep.end(), call.keep.begin(), call.keep.end());
  for (const OptionalTensor& t : operands)
    if (t) recording.keep.push_back(*t);
}

Int8LoraLinearCall call_in_place(const Int8LoraLinearTensors& t) {
  expect_in_place("packed_weight", t.packed_weight);
  expect_in_place("lora_a", t.lora_a);
  expect_in_place("bias", t.bias);
  expect_in_place("residual", t.residual);
  Int8LoraLinearCall call = int8_lora_linear_call(t);
  if (call.args.x != t.x.data_ptr()) expect_in_place("x", t.x);  // rows may be apart, their elements may not
  return call;
}

void expect_output(const char* argument, const Tensor& out, ScalarType type, int64_t elements) {
  expect_in_place(argument, out);
  if (out.scalar_type() == type && out.numel() == elements) return;
  refuse("composite", argument,
         "expected the " + std::to_string(elements) + " elements of the result, in its dtype, got " + shape_of(out) +
             (out.scalar_type() == type ? "" : " of another dtype"));
}

void record_int8_lora_linear(int64_t handle, const Tensor& x, const Tensor& packed_weight, int64_t out_features,
                             const OptionalTensor& bias, const OptionalTensor& lora_a, const OptionalTensor& lora_b,
                             const OptionalTensor& scales, const OptionalTensor& offsets,
                             const OptionalTensor& adapter_ids, const OptionalTensor& residual,
                             const std::string activation, const OptionalTensor& x_scale,
                             const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, double norm_eps,
                             const Tensor& out, int64_t max_rank) {
  const CallDevice device("composite", x);
  Int8LoraLinearCall call =
      call_in_place({"int8_lora_linear", x, packed_weight, out_features, bias, lora_a, lora_b, scales, offsets,
                     adapter_ids, residual, activation, x_scale, norm_weight, norm_bias, norm_eps, max_rank});
  expect_output("out", out, x.scalar_type(), call.problem.rows * out_features);
  expect_apart("out", out, "x", x);
  call.args.y = out.data_ptr();
  record(handle, call, device,
         {x, packed_weight, bias, lora_a, lora_b, scales, offsets, adapter_ids, residual, x_scale, norm_weight,
          norm_bias, out});
}

void record_int8_lora_topk(int64_t handle, const Tensor& x, const Tensor& packed_weight, int64_t out_features,
                           int64_t k, const OptionalTensor& bias, const OptionalTensor& lora_a,
                           const OptionalTensor& lora_b, const OptionalTensor& scales, const OptionalTensor& offsets,
                           const OptionalTensor& adapter_ids, const OptionalTensor& x_scale,
                           const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, double norm_eps,
                           const Tensor& values, const Tensor& columns, const OptionalTensor& log_sum,
                           const OptionalTensor& screen, int64_t max_rank) {
  const CallDevice device("composite", x);
  Int8LoraLinearCall call = call_in_place({"int8_lora_topk",
                                           x,
                                           packed_weight,
                                           out_features,
                                           bias,
                                           lora_a,
                                           lora_b,
                                           scales,
                                           offsets,
                                           adapter_ids,
                                           {},
                                           "none",
                                           x_scale,
                                           norm_weight,
                                           norm_bias,
                                           norm_eps,
                                           max_rank});
  expect_output("values", values, ScalarType::Float, call.problem.rows * k);
  expect_output("columns", columns, ScalarType::Long, call.problem.rows * k);
  if (log_sum) expect_output("log_sum", *log_sum, ScalarType::Float, call.problem.rows);
  set_top_k(&call, k, values, columns, log_sum);
  set_screen(&call, screen);
  record(handle, call, device,
         {x, packed_weight, bias, lora_a, lora_b, scales, offsets, adapter_ids, x_scale, norm_weight, norm_bias, values,
          columns, log_sum, screen});
}

void record_kv_attention_step(int64_t handle, const Tensor& q, const OptionalTensor& k, const OptionalTensor& v,
                              const Tensor& k_cache, const Tensor& v_cache, const OptionalTensor& k_scales,
                              const OptionalTensor& v_scales, const Tensor& lengths, const OptionalTensor& slots,
                              double scale, const Tensor& out) {
  const CallDevice device("composite", q);
  expect_in_place("q", q);
  expect_in_place("k", k);
  expect_in_place("v", v);
  expect_in_place("lengths", lengths);
  expect_in_place("slots", slots);
  const std::optional<std::vector<int64_t>> heads;
  KvAttentionStepCall call =
      kv_attention_step_call({q, k, v, k_cache, v_cache, k_scales, v_scales, lengths, slots, scale, heads});
  expect_output("out", out, q.scalar_type(), q.numel());
  expect_apart("out", out, "q", q);
  call.args.out = out.data_ptr();
  record(handle, call, device, {q, k, v, k_cache, v_cache, k_scales, v_scales, lengths, slots, out});
}

void record_kv_pack(int64_t handle, const Tensor& k, const Tensor& v, int64_t heads, const Tensor& packed_k,
                    const Tensor& packed_v, const Tensor& k_scales, const Tensor& v_scales) {
  const CallDevice device("composite", k);
  KvPackCall call = kv_pack_call(k, v, heads);
  if (call.args.k != k.data_ptr()) expect_in_place("k", k);
  if (call.args.v != v.data_ptr()) expect_in_place("v", v);
  const auto elements = [](const std::vector<int64_t>& sizes) {
    return std::accumulate(sizes.begin(), sizes.end(), int64_t{1}, std::multiplies<>());
  };
  const int64_t scales = call.problem.cache_rows * heads * call.problem.head_size;
  expect_output("packed_k", packed_k, ScalarType::Char, elements(packed_key_sizes(call.problem)));
  expect_output("packed_v", packed_v, ScalarType::Char, elements(packed_value_sizes(call.problem)));
  expect_output("k_scales", k_scales, ScalarType::Float, scales);
  expect_output("v_scales", v_scales, ScalarType::Float, scales);
  set_outputs(&call, packed_k, packed_v, k_scales, v_scales);
  record(handle, call, device, {k, v, packed_k, packed_v, k_scales, v_scales});
}

void run_composite(int64_t handle) {
  const std::shared_ptr<Recording> recording = find(handle);
  if (!recording->on) return;  // nothing was recorded
  CallDevice call("composite", *recording->on);
  const DeviceInfo device = call.info();
  const std::string forced = forced_implementation();
  if (!recording->planned || recording->threads != device.threads || recording->forced != forced) {
    recording->planned = false;
    raise_if_failed(plan(recording->problem, device, &recording->plan));
    recording->planned = true;
    recording->threads = device.threads;
    recording->forced = forced;
  }
  recording->args.workspace = call.workspace(workspace_bytes(recording->plan));
  raise_if_failed(run(recording->plan, recording->args, call.executor()));
}

std::string describe_composite(int64_t handle) {
  const std::shared_ptr<Recording> recording = find(handle);
  CompositePlan chosen;
  const DeviceInfo device = recording->on ? CallDevice("composite", *recording->on).info() : current_device();
  raise_if_failed(plan(recording->problem, device, &chosen));
  return to_string(chosen);
}

}  // namespace
}  // namespace lora_kernels

STABLE_TORCH_LIBRARY_IMPL(lora_kernels, CPU, m) {
  m.impl("composite_int8_lora_linear", TORCH_BOX(&lora_kernels::record_int8_lora_linear));
  m.impl("composite_int8_lora_topk", TORCH_BOX(&lora_kernels::record_int8_lora_topk));
  m.impl("composite_kv_pack", TORCH_BOX(&lora_kernels::record_kv_pack));
  m.impl("composite_kv_attention_step", TORCH_BOX(&lora_kernels::record_kv_attention_step));
}

#if defined(LORA_KERNELS_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(lora_kernels, CUDA, m) {
  m.impl("composite_int8_lora_linear", TORCH_BOX(&lora_kernels::record_int8_lora_linear));
  m.impl("composite_int8_lora_topk", TORCH_BOX(&lora_kernels::record_int8_lora_topk));
  m.impl("composite_kv_pack", TORCH_BOX(&lora_kernels::record_kv_pack));
  m.impl("composite_kv_attention_step", TORCH_BOX(&lora_kernels::record_kv_attention_step));
}
#endif

STABLE_TORCH_LIBRARY_IMPL(lora_kernels, CompositeExplicitAutograd, m) {
  m.impl("composite_new", TORCH_BOX(&lora_kernels::create));
  m.impl("composite_free", TORCH_BOX(&lora_kernels::release));
  m.impl("composite_run", TORCH_BOX(&lora_kernels::run_composite));
  m.impl("composite_describe", TORCH_BOX(&lora_kernels::describe_composite));
}
