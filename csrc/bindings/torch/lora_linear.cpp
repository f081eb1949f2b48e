// lora_linear and its gradients as torch operators on the CPU, and on CUDA where that is built.
#include "lora_kernels/lora_linear.h"

#include <tuple>

#include "common.h"

namespace lora_kernels {
namespace {

// What forward and backward translate alike; keeps the views alive as long as their pointers.
struct Operands {
  RowView x, weight;
  LoraOperands lora;
  LoraLinearProblem problem;
  uint64_t seed = 0;
  const int64_t* seed_on_device = nullptr;
};

Operands operands(const char* op, const Tensor& x, const Tensor& weight, const OptionalTensor& lora_a,
                  const OptionalTensor& lora_b, const OptionalTensor& scales, const OptionalTensor& offsets,
                  const OptionalTensor& adapter_ids, double dropout_p, const OptionalTensor& dropout_seed,
                  int64_t max_rank) {
  Operands o;
  o.x = rows_of(op, "x", x);
  if (!(weight.dim() == 2 && weight.size(1) == o.x.columns))
    refuse(op, "weight",
           "expected [out_features, " + std::to_string(o.x.columns) + "] to go with x " + shape_of(x) + ", got " +
               shape_of(weight));
  o.problem.dtype = dtype_of(op, "x", x);
  const DType weight_dtype = dtype_of(op, "weight", weight);
  if (weight_dtype != o.problem.dtype)
    refuse(op, "weight",
           std::string("expected the dtype of x, ") + name_of(o.problem.dtype) + ", got " + name_of(weight_dtype) +
               "; convert one of them with .to(...)");
  o.weight = rows_of(op, "weight", weight);
  o.lora = lora_operands(op, lora_a, lora_b, scales, offsets, adapter_ids, max_rank, o.x.columns, weight.size(0));
  o.problem.rows = o.x.rows;
  o.problem.in_features = o.x.columns;
  o.problem.out_features = weight.size(0);
  o.problem.lora = o.lora.shape;
  o.problem.dropout_p = dropout_p;
  o.problem.allow_tf32 = tf32_allowed();
  if (dropout_p > 0) {
    if (!dropout_seed.has_value())
      refuse(op, "dropout_seed", "expected an int64 tensor of one element with dropout_p > 0, got None");
    if (x.is_cuda() && dropout_seed->is_cpu()) {  // known here: it goes with the launch
      if (!(dropout_seed->numel() == 1 && dropout_seed->scalar_type() == ScalarType::Long))
        refuse(op, "dropout_seed", "expected an int64 tensor of one element, got " + shape_of(*dropout_seed));
    } else {
      expect_tensor(op, "dropout_seed", *dropout_seed, ScalarType::Long, {1});
    }
    const auto* seed = static_cast<const int64_t*>(dropout_seed->data_ptr());
    if (dropout_seed->is_cpu())
      o.seed = static_cast<uint64_t>(*seed);
    else
      o.seed_on_device = seed;
  }
  return o;
}

ScalarType kept_t_type(const Tensor& x, const LoraLinearProblem& problem, const DeviceInfo& device) {
  return kept_t_dtype(problem, device) == DType::kFloat32 ? ScalarType::Float : x.scalar_type();
}

// With `t`, what the gradients need of the LoRA branch is left there.
Tensor forward(const char* op, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
               const OptionalTensor& lora_a, const OptionalTensor& lora_b, const OptionalTensor& scales,
               const OptionalTensor& offsets, const OptionalTensor& adapter_ids, const OptionalTensor& residual,
               const std::string& activation, double dropout_p, const OptionalTensor& dropout_seed, int64_t max_rank,
               Tensor* t) {
  CallDevice device(op, x);
  Operands o = operands(op, x, weight, lora_a, lora_b, scales, offsets, adapter_ids, dropout_p, dropout_seed, max_rank);
  o.problem.activation = activation_of(op, activation);
  LoraLinearArgs args;
  const BiasAndResidual extra = bias_and_residual(op, bias, residual, x, o.problem.out_features);
  o.problem.has_bias = extra.bias != nullptr;
  o.problem.bias_dtype = extra.bias_dtype;
  o.problem.has_residual = extra.residual != nullptr;
  o.problem.keeps_t = t && o.problem.lora.present();
  LoraLinearPlan chosen;
  const DeviceInfo info = device.info();
  raise_if_failed(plan(o.problem, info, &chosen));
  if (t) {
    *t = new_tensor(x, {o.x.rows, kept_t_columns(o.problem.lora)}, kept_t_type(x, o.problem, info));
    args.t = t->data_ptr();
  }
  Tensor y = new_tensor(x, output_sizes(x, o.problem.out_features));
  args.x = o.x.data;
  args.x_stride = o.x.stride;
  args.weight = o.weight.data;
  args.weight_stride = o.weight.stride;
  args.bias = extra.bias;
  args.lora = o.lora.bank;
  args.residual = extra.residual;
  args.y = y.data_ptr();
  args.dropout_seed = o.seed;
  args.dropout_seed_on_device = o.seed_on_device;
  args.workspace = device.workspace(workspace_bytes(chosen));
  raise_if_failed(run(chosen, args, device.executor()));
  return y;
}

Tensor lora_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& lora_a,
                   const OptionalTensor& lora_b, const OptionalTensor& scales, const OptionalTensor& offsets,
                   const OptionalTensor& adapter_ids, const OptionalTensor& residual, const std::string activation,
                   double dropout_p, const OptionalTensor& dropout_seed, int64_t max_rank) {
  return forward("lora_linear", x, weight, bias, lora_a, lora_b, scales, offsets, adapter_ids, residual, activation,
                 dropout_p, dropout_seed, max_rank, nullptr);
}

std::tuple<Tensor, Tensor> lora_linear_keeping_t(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                                 const OptionalTensor& lora_a, const OptionalTensor& lora_b,
                                                 const OptionalTensor& scales, const OptionalTensor& offsets,
                                                 const OptionalTensor& adapter_ids, const OptionalTensor& residual,
                                                 const std::string activation, double dropout_p,
                                                 const OptionalTensor& dropout_seed, int64_t max_rank) {
  Tensor t;
  Tensor y = forward("lora_linear_keeping_t", x, weight, bias, lora_a, lora_b, scales, offsets, adapter_ids, residual,
                     activation, dropout_p, dropout_seed, max_rank, &t);
  return std::make_tuple(y, t);
}

// Gradients that are not needed come back as empty tensors.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lora_linear_backward(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const OptionalTensor& lora_a, const OptionalTensor& lora_b,
    const OptionalTensor& scales, const OptionalTensor& offsets, const OptionalTensor& adapter_ids, double dropout_p,
    const OptionalTensor& dropout_seed, bool needs_dx, bool needs_dweight, bool needs_dbias, bool needs_dlora,
    const OptionalTensor& t, int64_t max_rank) {
  const char* op = "lora_linear_backward";
  CallDevice device(op, x);
  Operands o = operands(op, x, weight, lora_a, lora_b, scales, offsets, adapter_ids, dropout_p, dropout_seed, max_rank);
  const int64_t M = o.problem.rows, N = o.problem.out_features, K = o.problem.in_features;
  expect_same_device(op, "dy", dy);
  const Tensor g = dy.is_contiguous() ? dy : torch::stable::contiguous(dy);
  if (!(g.numel() == M * N && g.scalar_type() == x.scalar_type()))
    refuse(op, "dy", "expected the shape and dtype of the result, got " + shape_of(dy));
  LoraLinearBackwardProblem problem;
  problem.forward = o.problem;
  problem.needs_dx = needs_dx;
  problem.needs_dweight = needs_dweight;
  problem.needs_dbias = needs_dbias;
  problem.needs_dlora = needs_dlora && o.problem.lora.adapters > 0;
  LoraLinearBackwardArgs args;
  const DeviceInfo info = device.info();
  if (t && problem.needs_dlora) {
    expect_same_device(op, "t", *t);
    const int64_t columns = kept_t_columns(o.problem.lora);
    if (!(t->dim() == 2 && t->size(0) == M && t->size(1) == columns && t->is_contiguous() &&
          t->scalar_type() == kept_t_type(x, o.problem, info)))
      refuse(op, "t",
             "expected what lora_linear_keeping_t returned for these operands, [" + std::to_string(M) + ", " +
                 std::to_string(columns) + "], got " + shape_of(*t) + " or another type or layout");
    problem.has_t = true;
    args.t = t->data_ptr();
  }
  LoraLinearBackwardPlan chosen;
  raise_if_failed(plan(problem, info, &chosen));
  const auto fp32 = [&](bool wanted, std::vector<int64_t> sizes) {
    return new_tensor(x, wanted ? sizes : std::vector<int64_t>{0}, ScalarType::Float);
  };
  Tensor dx = new_tensor(x, needs_dx ? output_sizes(x, K) : std::vector<int64_t>{0});
  Tensor dweight = fp32(needs_dweight, {N, K}), dbias = fp32(needs_dbias, {N});
  const int64_t R = o.problem.lora.total_rank;
  Tensor da = fp32(problem.needs_dlora, {R, K}), db = fp32(problem.needs_dlora, {R, N});
  args.dy = g.data_ptr();
  args.x = o.x.data;
  args.x_stride = o.x.stride;
  args.weight = o.weight.data;
  args.weight_stride = o.weight.stride;
  args.lora = o.lora.bank;
  args.dropout_seed = o.seed;
  args.dropout_seed_on_device = o.seed_on_device;
  args.dx = dx.data_ptr();
  args.dweight = static_cast<float*>(dweight.data_ptr());
  args.dbias = static_cast<float*>(dbias.data_ptr());
  args.dlora_a = static_cast<float*>(da.data_ptr());
  args.dlora_b = static_cast<float*>(db.data_ptr());
  args.workspace = device.workspace(workspace_bytes(chosen));
  raise_if_failed(run(chosen, args, device.executor()));
  return std::make_tuple(dx, dweight, dbias, da, db);
}

}  // namespace
}  // namespace lora_kernels

STABLE_TORCH_LIBRARY_IMPL(lora_kernels, CPU, m) {
  m.impl("lora_linear", TORCH_BOX(&lora_kernels::lora_linear));
  m.impl("lora_linear_keeping_t", TORCH_BOX(&lora_kernels::lora_linear_keeping_t));
  m.impl("lora_linear_backward", TORCH_BOX(&lora_kernels::lora_linear_backward));
}

#if defined(LORA_KERNELS_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(lora_kernels, CUDA, m) {
  m.impl("lora_linear", TORCH_BOX(&lora_kernels::lora_linear));
  m.impl("lora_linear_keeping_t", TORCH_BOX(&lora_kernels::lora_linear_keeping_t));
  m.impl("lora_linear_backward", TORCH_BOX(&lora_kernels::lora_linear_backward));
}
#endif
