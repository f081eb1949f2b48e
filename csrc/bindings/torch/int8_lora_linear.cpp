// int8_lora_linear and the packing of its weight as torch operators on the CPU, and on CUDA where that is built.
#include "lora_kernels/int8_lora_linear.h"

#include <cmath>
#include <tuple>

#include "calls.h"

namespace lora_kernels {
namespace {

// Packed weights as the kernels read them: checked against [N, K], contiguous.
Tensor packed_weight_of(const char* op, const Tensor& packed, int64_t out_features, int64_t in_features) {
  if (out_features < 0) refuse(op, "out_features", "expected at least 0, got " + std::to_string(out_features));
  expect_same_device(op, "packed_weight", packed);
  const int64_t bytes = int8_packed_bytes(out_features, in_features);
  if (!(packed.scalar_type() == ScalarType::Byte && packed.dim() == 1 && packed.size(0) == bytes))
    refuse(op, "packed_weight",
           "expected uint8 [" + std::to_string(bytes) + "], what int8_pack makes of a weight [" +
               std::to_string(out_features) + ", " + std::to_string(in_features) + "], got " + shape_of(packed) +
               (packed.scalar_type() == ScalarType::Byte ? "" : " of another dtype") +
               "; check out_features and the columns of x");
  return packed.is_contiguous() ? packed : torch::stable::contiguous(packed);
}

// The dtype of LayerNorm's weight and bias [K]: fp32 or that of x.
DType norm_dtype_of(const char* op, const Int8LoraLinearTensors& t, int64_t in_features) {
  const std::pair<const char*, const Tensor&> both[] = {{"norm_weight", *t.norm_weight}, {"norm_bias", *t.norm_bias}};
  for (const auto& [name, tensor] : both) {
    if (!(tensor.dim() == 1 && tensor.size(0) == in_features && tensor.is_contiguous()))
      refuse(op, name, "expected a contiguous [" + std::to_string(in_features) + "], got " + shape_of(tensor));
    const DType dtype = dtype_of(op, name, tensor);
    if (!(dtype == DType::kFloat32 || tensor.scalar_type() == t.x.scalar_type()) ||
        tensor.scalar_type() != t.norm_weight->scalar_type())
      refuse(op, name, std::string("expected float32 or the dtype of x, as the other one, got ") + name_of(dtype));
  }
  return dtype_of(op, "norm_weight", *t.norm_weight);
}

void plan_and_run(Int8LoraLinearCall* call, CallDevice* device) {
  Int8LoraLinearPlan chosen;
  raise_if_failed(plan(call->problem, device->info(), &chosen));
  call->args.workspace = device->workspace(workspace_bytes(chosen));
  raise_if_failed(run(chosen, call->args, device->executor()));
}

Tensor int8_lora_linear(const Tensor& x, const Tensor& packed_weight, int64_t out_features, const OptionalTensor& bias,
                        const OptionalTensor& lora_a, const OptionalTensor& lora_b, const OptionalTensor& scales,
                        const OptionalTensor& offsets, const OptionalTensor& adapter_ids,
                        const OptionalTensor& residual, const std::string activation, const OptionalTensor& x_scale,
                        const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, double norm_eps,
                        int64_t max_rank) {
  CallDevice device("int8_lora_linear", x);
  Int8LoraLinearCall call =
      int8_lora_linear_call({"int8_lora_linear", x, packed_weight, out_features, bias, lora_a, lora_b, scales, offsets,
                             adapter_ids, residual, activation, x_scale, norm_weight, norm_bias, norm_eps, max_rank});
  Tensor y = new_tensor(x, output_sizes(x, out_features));
  call.args.y = y.data_ptr();
  plan_and_run(&call, &device);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> int8_lora_topk(const Tensor& x, const Tensor& packed_weight, int64_t out_features,
                                                  int64_t k, const OptionalTensor& bias, const OptionalTensor& lora_a,
                                                  const OptionalTensor& lora_b, const OptionalTensor& scales,
                                                  const OptionalTensor& offsets, const OptionalTensor& adapter_ids,
                                                  const OptionalTensor& x_scale, const OptionalTensor& norm_weight,
                                                  const OptionalTensor& norm_bias, double norm_eps, bool log_sum,
                                                  const OptionalTensor& screen, int64_t max_rank) {
  CallDevice device("int8_lora_topk", x);
  Int8LoraLinearCall call = int8_lora_linear_call({"int8_lora_topk",
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
  if (k < 1) refuse("int8_lora_topk", "k", "expected at least 1, got " + std::to_string(k));
  const Tensor values = new_tensor(x, output_sizes(x, k), ScalarType::Float);
  const Tensor columns = new_tensor(x, output_sizes(x, k), ScalarType::Long);
  std::vector<int64_t> sizes = output_sizes(x, 0);
  if (log_sum) sizes.pop_back();
  const Tensor log_sums = new_tensor(x, log_sum ? sizes : std::vector<int64_t>{0}, ScalarType::Float);
  set_top_k(&call, k, values, columns, log_sum ? OptionalTensor(log_sums) : std::nullopt);
  set_screen(&call, screen);
  plan_and_run(&call, &device);
  return std::make_tuple(values, columns, log_sums);
}

Tensor pack(const Tensor& weight, const Tensor& scales) {
  const char* op = "int8_pack";
  expect_tensor(op, "weight", weight, ScalarType::Char, {-1, -1});
  const int64_t out_features = weight.size(0), in_features = weight.size(1);
  expect_tensor(op, "scales", scales, ScalarType::Float, {out_features});
  const Tensor rows = weight.is_contiguous() ? weight : torch::stable::contiguous(weight);
  const Tensor factors = scales.is_contiguous() ? scales : torch::stable::contiguous(scales);
  const int8_t* q = static_cast<const int8_t*>(rows.data_ptr());
  const float* s = static_cast<const float*>(factors.data_ptr());
  for (int64_t i = 0; i < out_features * in_features; ++i) {
    if (q[i] >= -127) continue;
    refuse(op, "weight",
           "expected values in [-127, 127], got -128 in output channel " + std::to_string(i / in_features) +
               "; quantize symmetrically (scale = amax / 127)");
  }
  for (int64_t n = 0; n < out_features; ++n) {
    if (std::isfinite(s[n])) continue;
    refuse(op, "scales",
           "expected finite scales, got " + std::to_string(s[n]) + " for output channel " + std::to_string(n) +
               "; the weight it came from holds a NaN or an infinity");
  }
  Tensor packed = new_tensor(weight, {int8_packed_bytes(out_features, in_features)}, ScalarType::Byte);
  int8_pack(q, s, out_features, in_features, static_cast<uint8_t*>(packed.data_ptr()));
  return packed;
}

Tensor pack_screen(const Tensor& packed_weight, int64_t out_features, int64_t in_features) {
  const char* op = "int8_pack_screen";
  if (in_features < 0) refuse(op, "in_features", "expected at least 0, got " + std::to_string(in_features));
  const Tensor packed = packed_weight_of(op, packed_weight, out_features, in_features);
  Tensor screen = new_tensor(packed, {int8_screen_bytes(out_features, in_features)}, ScalarType::Byte);
  int8_pack_screen(static_cast<const uint8_t*>(packed.data_ptr()), out_features, in_features,
                   static_cast<uint8_t*>(screen.data_ptr()));
  return screen;
}

std::tuple<Tensor, Tensor> unpack(const Tensor& packed_weight, int64_t out_features, int64_t in_features) {
  const char* op = "int8_unpack";
  if (in_features < 0) refuse(op, "in_features", "expected at least 0, got " + std::to_string(in_features));
  CallDevice device(op, packed_weight);
  const Tensor packed = packed_weight_of(op, packed_weight, out_features, in_features);
  Tensor weight = new_tensor(packed, {out_features, in_features}, ScalarType::Char);
  Tensor scales = new_tensor(packed, {out_features}, ScalarType::Float);
  const auto* from = static_cast<const uint8_t*>(packed.data_ptr());
  auto* to = static_cast<int8_t*>(weight.data_ptr());
  auto* to_scales = static_cast<float*>(scales.data_ptr());
  if (device.is_cuda())
    raise_if_failed(int8_unpack_cuda(from, out_features, in_features, to, to_scales, device.executor().stream));
  else
    int8_unpack(from, out_features, in_features, to, to_scales);
  return std::make_tuple(weight, scales);
}

}  // namespace

Int8LoraLinearCall int8_lora_linear_call(const Int8LoraLinearTensors& t) {
  const char* op = t.op;
  Int8LoraLinearCall call;
  Int8LoraLinearProblem& problem = call.problem;
  Int8LoraLinearArgs& args = call.args;
  problem.dtype = dtype_of(op, "x", t.x);
  const RowView rows = rows_of(op, "x", t.x);
  const Tensor packed = packed_weight_of(op, t.packed_weight, t.out_features, rows.columns);
  LoraOperands lora = lora_operands(op, t.lora_a, t.lora_b, t.scales, t.offsets, t.adapter_ids, t.max_rank,
                                    rows.columns, t.out_features);
  BiasAndResidual extra = bias_and_residual(op, t.bias, t.residual, t.x, t.out_features);
  problem.rows = rows.rows;
  problem.in_features = rows.columns;
  problem.out_features = t.out_features;
  problem.bias_dtype = extra.bias_dtype;
  problem.has_bias = extra.bias != nullptr;
  problem.has_residual = extra.residual != nullptr;
  problem.activation = activation_of(op, t.activation);
  problem.lora = lora.shape;
  if (t.x_scale) {
    problem.static_scale = true;
    if (t.x.is_cuda() && t.x_scale->is_cpu()) {  // known here: it is checked, and goes with the launch
      if (!(t.x_scale->numel() == 1 && t.x_scale->scalar_type() == ScalarType::Float))
        refuse(op, "x_scale", "expected a float32 tensor of one element, got " + shape_of(*t.x_scale));
      args.host_x_scale = *static_cast<const float*>(t.x_scale->data_ptr());
    } else {
      expect_tensor(op, "x_scale", *t.x_scale, ScalarType::Float, {1});
      args.x_scale = static_cast<const float*>(t.x_scale->data_ptr());
    }
  }
  if (t.norm_weight.has_value() != t.norm_bias.has_value())
    refuse(op, t.norm_weight ? "norm_bias" : "norm_weight", "expected both or none, got None for this one");
  if (t.norm_weight) {
    problem.has_norm = true;
    problem.norm_eps = static_cast<float>(t.norm_eps);
    problem.norm_dtype = norm_dtype_of(op, t, rows.columns);
    args.norm_weight = t.norm_weight->data_ptr();
    args.norm_bias = t.norm_bias->data_ptr();
  }
  args.x = rows.data;
  args.x_stride = rows.stride;
  args.packed_weight = static_cast<const uint8_t*>(packed.data_ptr());
  args.bias = extra.bias;
  args.lora = lora.bank;
  args.residual = extra.residual;
  call.keep = {rows.tensor, packed};
  for (std::vector<Tensor>* copies : {&lora.keep, &extra.keep})
    call.keep.insert(call.keep.end(), copies->begin(), copies->end());
  return call;
}

void set_top_k(Int8LoraLinearCall* call, int64_t k, const Tensor& values, const Tensor& columns,
               const OptionalTensor& log_sum) {
  call->problem.top_k = k;
  call->args.top_values = static_cast<float*>(values.data_ptr());
  call->args.top_columns = static_cast<int64_t*>(columns.data_ptr());
  call->problem.log_sum = log_sum.has_value();
  if (log_sum) call->args.log_sum = static_cast<float*>(log_sum->data_ptr());
}

void set_screen(Int8LoraLinearCall* call, const OptionalTensor& screen) {
  if (!screen) return;
  const char* op = "int8_lora_topk";
  const int64_t out_features = call->problem.out_features, in_features = call->problem.in_features;
  const int64_t bytes = int8_screen_bytes(out_features, in_features);
  expect_same_device(op, "screen", *screen);
  if (!(screen->scalar_type() == ScalarType::Byte && screen->dim() == 1 && screen->size(0) == bytes &&
        screen->is_contiguous()))
    refuse(op, "screen",
           "expected contiguous uint8 [" + std::to_string(bytes) + "], what int8_pack_screen makes of packed_weight [" +
               std::to_string(out_features) + ", " + std::to_string(in_features) + "], got " + shape_of(*screen) +
               (screen->scalar_type() == ScalarType::Byte ? "" : " of another dtype"));
  call->problem.has_screen = true;
  call->args.screen = static_cast<const uint8_t*>(screen->data_ptr());
}

}  // namespace lora_kernels

STABLE_TORCH_LIBRARY_IMPL(lora_kernels, CPU, m) {
  m.impl("int8_lora_linear", TORCH_BOX(&lora_kernels::int8_lora_linear));
  m.impl("int8_lora_topk", TORCH_BOX(&lora_kernels::int8_lora_topk));
  m.impl("int8_pack", TORCH_BOX(&lora_kernels::pack));
  m.impl("int8_pack_screen", TORCH_BOX(&lora_kernels::pack_screen));
  m.impl("int8_unpack", TORCH_BOX(&lora_kernels::unpack));
}

#if defined(LORA_KERNELS_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(lora_kernels, CUDA, m) {
  m.impl("int8_lora_linear", TORCH_BOX(&lora_kernels::int8_lora_linear));
  m.impl("int8_lora_topk", TORCH_BOX(&lora_kernels::int8_lora_topk));
  m.impl("int8_unpack", TORCH_BOX(&lora_kernels::unpack));
}
#endif
