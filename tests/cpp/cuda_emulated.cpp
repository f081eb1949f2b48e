// lora_linear's CUDA kernels, compiled for the host, behind a C interface that Python's ctypes can call: what the tests
// in tests/cuda compare with the reference. Paths, tiles and splits can be chosen by hand, so that every kernel is met
// on every shape, whatever the heuristic would take.
#include "cuda_emulated.h"

#include "cuda/emulation/emulation.h"
#include "cuda/lora_linear.h"

// The core's, which is not linked: its tables would want every CPU implementation.
namespace lora_kernels {
std::string to_string(const LoraLinearPlan& plan) { return to_string(plan.cuda); }
std::string to_string(const LoraLinearBackwardPlan& plan) { return to_string(plan.cuda); }
}  // namespace lora_kernels

using namespace lora_kernels;

namespace {

// Everything in one structure of plain fields; tests/cuda/emulated.py has its twin.
struct Call {
  int64_t rows, in_features, out_features, dtype, bias_dtype, activation, has_bias, has_residual;
  int64_t adapters, total_rank, max_rank, groups, lora_dtype, allow_tf32;
  // path -1: the heuristic's own choice, tiles and splits included. large_tiles 128 or 256: by wgmma, so wide.
  int64_t arch, path, large_tiles, splits;
  int64_t x_stride, weight_stride, a_stride, b_stride_rank, b_stride_out, dropout_seed;
  int64_t needs_dx, needs_dweight, needs_dbias, needs_dlora, with_t, dy_once;  // dy_once -1: the heuristic's own choice
  int64_t t_blocks;
  double dropout_p;
  const void *x, *weight, *bias, *lora_a, *lora_b, *scales, *offsets, *adapter_ids, *residual, *dy;
  void *t, *y, *dx, *dweight, *dbias, *dlora_a, *dlora_b;
};

LoraLinearProblem problem_of(const Call& c) {
  LoraLinearProblem p;
  p.rows = c.rows;
  p.in_features = c.in_features;
  p.out_features = c.out_features;
  p.dtype = static_cast<DType>(c.dtype);
  p.bias_dtype = static_cast<DType>(c.bias_dtype);
  p.activation = static_cast<Activation>(c.activation);
  p.has_bias = c.has_bias != 0;
  p.has_residual = c.has_residual != 0;
  p.lora.adapters = c.adapters;
  p.lora.total_rank = c.total_rank;
  p.lora.max_rank = c.max_rank;
  p.lora.groups = c.groups;
  p.lora.dtype = static_cast<DType>(c.lora_dtype);
  p.dropout_p = c.dropout_p;
  p.allow_tf32 = c.allow_tf32 != 0;
  p.keeps_t = c.with_t != 0;
  return p;
}

LoraBank bank_of(const Call& c) {
  LoraBank b;
  b.a = c.lora_a;
  b.a_stride = c.a_stride;
  b.b = c.lora_b;
  b.b_stride_rank = c.b_stride_rank;
  b.b_stride_out = c.b_stride_out;
  b.scales = static_cast<const float*>(c.scales);
  b.offsets = static_cast<const int32_t*>(c.offsets);
  b.adapter_ids = static_cast<const int32_t*>(c.adapter_ids);
  return b;
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

void emulated_order(int order, uint64_t seed) {
  emulation::options.order = static_cast<emulation::Order>(order);
  emulation::options.seed = seed;
}

// Between the two, the last kernel of a call runs only when the next call's first is there, which may start early.
void emulated_hold() {
  emulation::hold();
  held_calls.on = true;
}
int emulated_finish(char* message, int64_t size) {
  held_calls.on = false;
  Status status;
  try {
    emulation::finish();
  } catch (const emulation::Error& error) {
    status = Status::failed(error.what());
  }
  held_calls.workspaces.clear();
  return answer(status.text, message, size, status.ok() ? 0 : 1);
}

// Extra passes of ldmatrix since the last call.
uint64_t emulated_bank_conflicts() {
  const uint64_t count = emulation::bank_conflicts;
  emulation::bank_conflicts = 0;
  return count;
}

// Boxes that TMA would have loaded since the last call.
uint64_t emulated_boxes() {
  const uint64_t count = emulation::boxes;
  emulation::boxes = 0;
  return count;
}

// 0: ran, and message is the plan; else message is the error.
int emulated_forward(const Call* c, char* message, int64_t size) {
  const DeviceInfo device = device_of(c->arch);
  LoraLinearPlan plan;
  plan.problem = problem_of(*c);
  Status status = cuda::supported(plan.problem, device.cuda);
  if (!status.ok()) return answer(status.text, message, size, 1);
  cuda::configure(device, &plan);
  if (c->path >= 0) {
    plan.cuda.path = static_cast<CudaLoraLinearPath>(c->path);
    plan.cuda.large_tiles = c->large_tiles != 0;
    plan.cuda.wgmma_columns = c->large_tiles > 1 ? static_cast<int>(c->large_tiles) : 0;
    // Few rows have no tiles: the same wish says whether blocks make t, and splits how many of them together.
    plan.cuda.t_in_blocks = plan.cuda.path == CudaLoraLinearPath::kFewRows && c->large_tiles != 0;
    (plan.cuda.t_in_blocks ? plan.cuda.cluster : plan.cuda.splits) = static_cast<int>(c->splits);
    (plan.cuda.t_in_blocks ? plan.cuda.splits : plan.cuda.cluster) = 1;
    plan.cuda.t_blocks = static_cast<int>(c->t_blocks);
    cuda::Workspace w;
    cuda::ForwardWorkspace(w, plan);
    plan.workspace = w.used;
  }
  const auto workspace = workspace_of(plan.workspace);
  LoraLinearArgs args;
  args.x = c->x;
  args.x_stride = c->x_stride;
  args.weight = c->weight;
  args.weight_stride = c->weight_stride;
  args.bias = c->bias;
  args.lora = bank_of(*c);
  args.residual = c->residual;
  args.y = c->y;
  args.t = c->t;
  args.dropout_seed = static_cast<uint64_t>(c->dropout_seed);
  args.workspace = workspace.get();
  status = cuda::launch(plan, args, Executor());
  return answer(status.ok() ? to_string(plan.cuda) : status.text, message, size, status.ok() ? 0 : 1);
}

int emulated_backward(const Call* c, char* message, int64_t size) {
  const DeviceInfo device = device_of(c->arch);
  LoraLinearBackwardPlan plan;
  plan.problem.forward = problem_of(*c);
  plan.problem.needs_dx = c->needs_dx != 0;
  plan.problem.needs_dweight = c->needs_dweight != 0;
  plan.problem.needs_dbias = c->needs_dbias != 0;
  plan.problem.needs_dlora = c->needs_dlora != 0;
  plan.problem.has_t = c->with_t != 0;
  Status status = cuda::supported(plan.problem.forward, device.cuda);
  if (!status.ok()) return answer(status.text, message, size, 1);
  cuda::configure_backward(device, &plan);
  if (c->path >= 0) {
    plan.cuda.large_tiles = c->large_tiles != 0;
    plan.cuda.wgmma_columns = c->large_tiles > 1 ? static_cast<int>(c->large_tiles) : 0;
    plan.cuda.a_splits = plan.cuda.b_splits = plan.cuda.w_splits = static_cast<int>(c->splits);
    if (c->dy_once >= 0) {
      plan.cuda.dy_once = c->dy_once != 0 && c->adapters == 1 && c->max_rank <= 32;
      plan.cuda.row_tiles = 2;
      plan.cuda.row_splits = static_cast<int>((c->rows + 127) / 128);
      const int64_t column_tiles = (c->out_features + 63) / 64;
      plan.cuda.column_splits = static_cast<int>(c->splits < column_tiles ? c->splits : column_tiles);
    }
    cuda::Workspace w;
    cuda::BackwardWorkspace(w, plan);
    plan.workspace = w.used;
  }
  const auto workspace = workspace_of(plan.workspace);
  LoraLinearBackwardArgs args;
  args.dy = c->dy;
  args.x = c->x;
  args.x_stride = c->x_stride;
  args.weight = c->weight;
  args.weight_stride = c->weight_stride;
  args.lora = bank_of(*c);
  args.t = c->t;
  args.dropout_seed = static_cast<uint64_t>(c->dropout_seed);
  args.dx = c->dx;
  args.dweight = static_cast<float*>(c->dweight);
  args.dbias = static_cast<float*>(c->dbias);
  args.dlora_a = static_cast<float*>(c->dlora_a);
  args.dlora_b = static_cast<float*>(c->dlora_b);
  args.workspace = workspace.get();
  status = cuda::launch_backward(plan, args, Executor());
  return answer(status.ok() ? to_string(plan.cuda) : status.text, message, size, status.ok() ? 0 : 1);
}

}  // extern "C"
#pragma GCC visibility pop
