// int8_lora_linear's CUDA kernels behind the C interface of cuda_emulated.cpp.
#include "cuda/int8_lora_linear.h"
#include "cuda/int8_shapes.h"
#include "cuda_emulated.h"

namespace lora_kernels {
std::string to_string(const Int8LoraLinearPlan& plan) { return to_string(plan.cuda); }
}  // namespace lora_kernels

using namespace lora_kernels;

namespace {

// tests/cuda/emulated_int8.py has its twin.
struct Call {
  int64_t rows, in_features, out_features, dtype, bias_dtype, norm_dtype, activation, has_bias, has_residual, has_norm;
  int64_t static_scale, top_k, log_sum, adapters, total_rank, max_rank, groups, lora_dtype;
  // path -1: the heuristic's own choice. large_tiles 128, 256 or 320: by wgmma, so many rows; 256 and 320 by four
  // blocks that stay.
  int64_t arch, path, large_tiles, splits, cluster, staged;
  int64_t x_stride, a_stride, b_stride_rank, b_stride_out, b_stride_block, shared_bytes;
  double norm_eps, host_x_scale;
  const void *x, *packed, *bias, *lora_a, *lora_b, *scales, *offsets, *adapter_ids, *residual, *x_scale, *norm_weight,
      *norm_bias;
  void *y, *top_columns, *top_values, *log_sums;
  void *q, *row_scales;  // copies of what the workspace holds behind the call, or null
};

Status plan_of(const Call* c, Int8LoraLinearPlan* chosen) {
  DeviceInfo device = device_of(c->arch);
  if (c->shared_bytes) device.cuda.shared_bytes = c->shared_bytes;
  Int8LoraLinearPlan& plan = *chosen;
  Int8LoraLinearProblem& p = plan.problem;
  p.rows = c->rows;
  p.in_features = c->in_features;
  p.out_features = c->out_features;
  p.dtype = static_cast<DType>(c->dtype);
  p.bias_dtype = static_cast<DType>(c->bias_dtype);
  p.norm_dtype = static_cast<DType>(c->norm_dtype);
  p.activation = static_cast<Activation>(c->activation);
  p.has_bias = c->has_bias != 0;
  p.has_residual = c->has_residual != 0;
  p.has_norm = c->has_norm != 0;
  p.norm_eps = static_cast<float>(c->norm_eps);
  p.static_scale = c->static_scale != 0;
  p.top_k = c->top_k;
  p.log_sum = c->log_sum != 0;
  p.lora.adapters = c->adapters;
  p.lora.total_rank = c->total_rank;
  p.lora.max_rank = c->max_rank;
  p.lora.groups = c->groups;
  p.lora.dtype = static_cast<DType>(c->lora_dtype);
  const Status status = cuda::supported(p, device.cuda);
  if (!status.ok()) return status;
  cuda::configure(device, &plan);
  if (c->path >= 0) {
    plan.cuda.path = static_cast<CudaInt8LoraLinearPath>(c->path);
    plan.cuda.large_tiles = c->large_tiles != 0;
    plan.cuda.wgmma_rows = c->large_tiles > 1 ? static_cast<int>(c->large_tiles) : 0;
    plan.cuda.resident = plan.cuda.wgmma_rows > 128 ? 4 : 0;
    plan.cuda.splits = static_cast<int>(c->splits);
    plan.cuda.cluster = static_cast<int>(c->cluster);
    if (c->staged < 2) plan.cuda.rows_of_block = cuda::kInt8Rows;  // and else as many as the heuristic takes
    if (plan.cuda.path == CudaInt8LoraLinearPath::kFused) {
      const cuda::Int8Staged staged =
          cuda::fused_staged(p, plan.cuda.cluster, static_cast<cuda::Int8Staging>(c->staged));
      plan.cuda.staged_bytes = static_cast<int>(staged.x_row);
      plan.cuda.staged_a_bytes = static_cast<int>(staged.a_row);
      plan.cuda.staged_w = staged.w;
    } else if (!c->staged) {
      plan.cuda.staged_bytes = plan.cuda.staged_a_bytes = 0;
    }
    cuda::Workspace w;
    cuda::Int8Workspace(w, plan);
    plan.workspace = w.used;
  }
  return {};
}

Int8LoraLinearArgs args_of(const Call* c) {
  Int8LoraLinearArgs args;
  args.x = c->x;
  args.x_stride = c->x_stride;
  args.packed_weight = static_cast<const uint8_t*>(c->packed);
  args.bias = c->bias;
  args.lora.a = c->lora_a;
  args.lora.a_stride = c->a_stride;
  args.lora.b = c->lora_b;
  args.lora.b_stride_rank = c->b_stride_rank;
  args.lora.b_stride_out = c->b_stride_out;
  args.lora.b_stride_block = c->b_stride_block;
  args.lora.scales = static_cast<const float*>(c->scales);
  args.lora.offsets = static_cast<const int32_t*>(c->offsets);
  args.lora.adapter_ids = static_cast<const int32_t*>(c->adapter_ids);
  args.x_scale = static_cast<const float*>(c->x_scale);
  args.host_x_scale = static_cast<float>(c->host_x_scale);
  args.norm_weight = c->norm_weight;
  args.norm_bias = c->norm_bias;
  args.residual = c->residual;
  args.y = c->y;
  args.top_columns = static_cast<int64_t*>(c->top_columns);
  args.top_values = static_cast<float*>(c->top_values);
  args.log_sum = static_cast<float*>(c->log_sums);
  return args;
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// 0: ran, and message is the plan; else message is the error.
int emulated_int8_forward(const Call* c, char* message, int64_t size) {
  Int8LoraLinearPlan plan;
  Status status = plan_of(c, &plan);
  if (!status.ok()) return answer(status.text, message, size, 1);
  const Int8LoraLinearProblem& p = plan.problem;
  const auto workspace = workspace_of(plan.workspace);
  Int8LoraLinearArgs args = args_of(c);
  args.workspace = workspace.get();
  status = cuda::launch(plan, args, Executor());
  if (status.ok() && c->q && !held_calls.on && plan.cuda.path != CudaInt8LoraLinearPath::kFused) {
    cuda::Workspace memory{static_cast<char*>(workspace.get())};
    const cuda::Int8Workspace parts(memory, plan);
    for (int64_t m = 0; m < p.rows; ++m)
      std::memcpy(static_cast<int8_t*>(c->q) + m * p.in_features, parts.q + m * parts.q_stride,
                  static_cast<size_t>(p.in_features));
    std::memcpy(c->row_scales, parts.scales, static_cast<size_t>(p.rows) * 4);
  }
  return answer(status.ok() ? to_string(plan.cuda) : status.text, message, size, status.ok() ? 0 : 1);
}

// The calls in one launch; message says how many of them fit into one, if that is not all.
int emulated_int8_together(const Call* const* calls, int64_t count, char* message, int64_t size) {
  Int8LoraLinearPlan plans[cuda::kInt8MostTogether];
  Int8LoraLinearArgs args[cuda::kInt8MostTogether];
  const Int8LoraLinearPlan* all_plans[cuda::kInt8MostTogether];
  const Int8LoraLinearArgs* all_args[cuda::kInt8MostTogether];
  for (int64_t i = 0; i < count; ++i) {
    const Status status = plan_of(calls[i], &plans[i]);
    if (!status.ok()) return answer(status.text, message, size, 1);
    args[i] = args_of(calls[i]);
    all_plans[i] = &plans[i];
    all_args[i] = &args[i];
    for (int64_t j = 0; j < i; ++j)
      if (!cuda::together(plans[j], args[j], plans[i], args[i]))
        return answer("calls " + std::to_string(j) + " and " + std::to_string(i) + " are not made together", message,
                      size, 1);
  }
  const Status status = cuda::launch_together(all_plans, all_args, static_cast<int>(count), Executor());
  return answer(status.ok() ? to_string(plans[0].cuda) : status.text, message, size, status.ok() ? 0 : 1);
}

int emulated_int8_unpack(const void* packed, int64_t out_features, int64_t in_features, void* weight, void* scales) {
  return int8_unpack_cuda(static_cast<const uint8_t*>(packed), out_features, in_features, static_cast<int8_t*>(weight),
                          static_cast<float*>(scales), nullptr)
                 .ok()
             ? 0
             : 1;
}

}  // extern "C"
#pragma GCC visibility pop
