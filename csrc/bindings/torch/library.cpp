// The schemas of all torch operators, once. Their CPU (and CUDA) implementations register beside their translation
// (lora_linear.cpp, ...), fake kernels and autograd in Python (lora_kernels/ops).
#include "common.h"
#include "lora_kernels/implementations.h"

namespace lora_kernels {
namespace {

void force(const std::string name) { raise_if_failed(force_implementation(name)); }

std::string forced() { return forced_implementation(); }

// Lines of fields separated by tabs: "isa" and the instruction sets; "build" with compiler, build type and why CUDA is
// left out (empty: it is in); then one per implementation: op, name, available, selected, runs, reason.
std::string describe() {
  std::string text = "isa\t" + isa_names(current_device().isa) + "\n";
  text += "build\t" LORA_KERNELS_BUILD_COMPILER "\t" LORA_KERNELS_BUILD_TYPE "\t" LORA_KERNELS_BUILD_CUDA "\n";
  for (ImplementationReport row : implementations(current_device())) {
    if (row.name.rfind("cuda", 0) == 0) {  // its operands are elsewhere: what matters is whether there is such a device
      DeviceInfo device;
      const Status found = cuda_device(0, &device);
      row.available = found.ok();
      row.reason = found.ok() ? "for operands on a CUDA device" : found.text;
    }
    text += row.op + "\t" + row.name + "\t" + (row.available ? "1" : "0") + "\t" + (row.selected ? "1" : "0") + "\t" +
            std::to_string(row.runs) + "\t" + row.reason + "\n";
  }
  return text;
}

}  // namespace
}  // namespace lora_kernels

STABLE_TORCH_LIBRARY(lora_kernels, m) {
  // max_rank: the largest of the ranks that offsets tells, 0: not known. On a CUDA device, where offsets are not waited
  // for, plans otherwise reckon with the sum of the ranks.
  m.def(
      "lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? lora_a, Tensor? lora_b, Tensor? scales, "
      "Tensor? offsets, Tensor? adapter_ids, Tensor? residual, str activation, float dropout_p, "
      "Tensor? dropout_seed, int max_rank=0) -> Tensor");
  // The same, and t = s (dropout(x) At), which lora_linear_backward takes. Its rows and their type are the device's
  // own.
  m.def(
      "lora_linear_keeping_t(Tensor x, Tensor weight, Tensor? bias, Tensor? lora_a, Tensor? lora_b, Tensor? scales, "
      "Tensor? offsets, Tensor? adapter_ids, Tensor? residual, str activation, float dropout_p, "
      "Tensor? dropout_seed, int max_rank=0) -> (Tensor, Tensor)");
  m.def(
      "lora_linear_backward(Tensor dy, Tensor x, Tensor weight, Tensor? lora_a, Tensor? lora_b, Tensor? scales, "
      "Tensor? offsets, Tensor? adapter_ids, float dropout_p, Tensor? dropout_seed, bool needs_dx, "
      "bool needs_dweight, bool needs_dbias, bool needs_dlora, Tensor? t=None, int max_rank=0) -> (Tensor, Tensor, "
      "Tensor, Tensor, Tensor)");
  m.def(
      "int8_lora_linear(Tensor x, Tensor packed_weight, int out_features, Tensor? bias, Tensor? lora_a, "
      "Tensor? lora_b, Tensor? scales, Tensor? offsets, Tensor? adapter_ids, Tensor? residual, str activation, "
      "Tensor? x_scale, Tensor? norm_weight=None, Tensor? norm_bias=None, float norm_eps=1e-05, int max_rank=0) "
      "-> Tensor");
  m.def(
      "int8_lora_topk(Tensor x, Tensor packed_weight, int out_features, int k, Tensor? bias, Tensor? lora_a, "
      "Tensor? lora_b, Tensor? scales, Tensor? offsets, Tensor? adapter_ids, Tensor? x_scale, Tensor? norm_weight, "
      "Tensor? norm_bias, float norm_eps, bool log_sum, Tensor? screen=None, int max_rank=0) "
      "-> (Tensor, Tensor, Tensor)");
  m.def("int8_pack(Tensor weight, Tensor scales) -> Tensor");
  m.def("int8_pack_screen(Tensor packed_weight, int out_features, int in_features) -> Tensor");
  m.def("int8_unpack(Tensor packed_weight, int out_features, int in_features) -> (Tensor, Tensor)");
  m.def(
      "kv_attention_step(Tensor q, Tensor? k, Tensor? v, Tensor(a!) k_cache, Tensor(b!) v_cache, "
      "Tensor(c!)? k_scales, Tensor(d!)? v_scales, Tensor lengths, Tensor? slots, float scale, int[]? heads) "
      "-> (Tensor, Tensor)");
  m.def("composite_new() -> int");
  m.def("composite_free(int composite) -> ()");
  m.def("composite_run(int composite) -> ()");
  m.def("composite_describe(int composite) -> str");
  m.def(
      "composite_int8_lora_linear(int composite, Tensor x, Tensor packed_weight, int out_features, Tensor? bias, "
      "Tensor? lora_a, Tensor? lora_b, Tensor? scales, Tensor? offsets, Tensor? adapter_ids, Tensor? residual, "
      "str activation, Tensor? x_scale, Tensor? norm_weight, Tensor? norm_bias, float norm_eps, Tensor(a!) out, "
      "int max_rank=0) -> ()");
  m.def(
      "composite_int8_lora_topk(int composite, Tensor x, Tensor packed_weight, int out_features, int k, Tensor? bias, "
      "Tensor? lora_a, Tensor? lora_b, Tensor? scales, Tensor? offsets, Tensor? adapter_ids, Tensor? x_scale, "
      "Tensor? norm_weight, Tensor? norm_bias, float norm_eps, Tensor(a!) values, Tensor(b!) columns, "
      "Tensor(c!)? log_sum, Tensor? screen=None, int max_rank=0) -> ()");
  m.def(
      "composite_kv_pack(int composite, Tensor k, Tensor v, int heads, Tensor(a!) packed_k, Tensor(b!) packed_v, "
      "Tensor(c!) k_scales, Tensor(d!) v_scales) -> ()");
  m.def(
      "composite_kv_attention_step(int composite, Tensor q, Tensor? k, Tensor? v, Tensor(a!) k_cache, "
      "Tensor(b!) v_cache, Tensor(c!)? k_scales, Tensor(d!)? v_scales, Tensor lengths, Tensor? slots, float scale, "
      "Tensor(e!) out) -> ()");
  m.def("kv_pack(Tensor k, Tensor v, int heads) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "kv_relative_step(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor positions, "
      "Tensor bias_u, Tensor bias_v, Tensor lengths, int left, Tensor? counts, Tensor? slots, float scale) -> Tensor");
  m.def("allow_tf32(bool allow) -> ()");
  m.def("force_implementation(str name) -> ()");
  m.def("forced_implementation() -> str");
  m.def("describe_implementations() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(lora_kernels, CompositeExplicitAutograd, m) {
  m.impl("allow_tf32", TORCH_BOX(&lora_kernels::allow_tf32));
  m.impl("force_implementation", TORCH_BOX(&lora_kernels::force));
  m.impl("forced_implementation", TORCH_BOX(&lora_kernels::forced));
  m.impl("describe_implementations", TORCH_BOX(&lora_kernels::describe));
}
