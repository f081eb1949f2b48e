// int8_lora_linear's CUDA kernels behind the C interface of cuda_emulated.cpp.
#include "cuda/int8_lora_linear.h"
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
  // path -1: the heuristic's own choice. large_tiles 128 or 256: by wgmma, so wide.
  int64_t arch, path, large_tiles, splits, staged;
  int64_t x_stride, a_stride, b_stride_rank, b_stride_out, b_stride_block, shared_bytes;
  double norm_eps, host_x_scale;
  const void *x, *packed, *bias, *lora_a, *lora_b, *scales, *offsets, *adapter_ids, *residual, *x_scale, *norm_weight,
      *norm_bias;
  void *y, *top_columns, *top_values, *log_sums;
  void *q, *row_scales;  // copies of what the workspace holds behind the call, or null
};

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// 0: ran, and message is the plan; else message is the error.
int emulated_int8_forward(const Call* c, char* message, int64_t size) {
  DeviceInfo device = device_of(c->arch);
  if (c->shared_bytes) device.cuda.shared_bytes = c->shared_bytes;
  Int8LoraLinearPlan plan;
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
  Status status = cuda::supported(p, device.cuda);
  if (!status.ok()) return answer(status.text, message, size, 1);
  cuda::configure(device, &plan);
  if (c->path >= 0) {
    plan.cuda.path = static_cast<CudaInt8LoraLinearPath>(c->path);
    plan.cuda.large_tiles = c->large_tiles != 0;
    plan.cuda.wgmma_columns = c->large_tiles > 1 ? static_cast<int>(c->large_tiles) : 0;
    plan.cuda.splits = static_cast<int>(c->splits);
    if (!c->staged) plan.cuda.staged_bytes = 0;
    cuda::Workspace w;
    cuda::Int8Workspace(w, plan);
    plan.workspace = w.used;
  }
  const auto workspace = workspace_of(plan.workspace);
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

int emulated_int8_unpack(const void* packed, int64_t out_features, int64_t in_features, void* weight, void* scales) {
  return int8_unpack_cuda(static_cast<const uint8_t*>(packed), out_features, in_features, static_cast<int8_t*>(weight),
                          static_cast<float*>(scales), nullptr)
                 .ok()
             ? 0
             : 1;
}

}  // extern "C"
#pragma GCC visibility pop
