// kv_relative_step's CUDA kernel behind the C interface of cuda_emulated.cpp.
#include "cuda/kv_relative_step.h"
#include "cuda_emulated.h"

namespace lora_kernels {
std::string to_string(const KvRelativeStepPlan& plan) { return to_string(plan.cuda); }
}  // namespace lora_kernels

using namespace lora_kernels;

namespace {

// tests/cuda/emulated_kv.py has its twin.
struct RelativeCall {
  int64_t rows, tokens, heads, head_size, cache_rows, capacity, left, dtype, cache_dtype, arch;
  int64_t chunks;  // 0: the plan's own choice
  double scale;
  const void *q, *k, *v;
  void *k_cache, *v_cache;
  const void *positions, *bias_u, *bias_v, *lengths, *counts, *slots;
  void* out;
};

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// 0: ran, and message is the plan; else message is the error.
int emulated_kv_relative_step(const RelativeCall* c, char* message, int64_t size) {
  const DeviceInfo device = device_of(c->arch);
  KvRelativeStepPlan plan;
  KvRelativeStepProblem& p = plan.problem;
  p.rows = c->rows;
  p.tokens = c->tokens;
  p.heads = c->heads;
  p.head_size = c->head_size;
  p.cache_rows = c->cache_rows;
  p.capacity = c->capacity;
  p.left = c->left;
  p.dtype = static_cast<DType>(c->dtype);
  p.cache_dtype = static_cast<DType>(c->cache_dtype);
  p.counts = c->counts != nullptr;
  p.slots = c->slots != nullptr;
  Status status = cuda::supported(p, device.cuda);
  if (!status.ok()) return answer(status.text, message, size, 1);
  cuda::configure(device, &plan);
  if (c->chunks) plan.cuda.chunks = static_cast<int>(c->chunks);
  KvRelativeStepArgs args;
  args.q = c->q;
  args.k = c->k;
  args.v = c->v;
  args.k_cache = c->k_cache;
  args.v_cache = c->v_cache;
  args.positions = c->positions;
  args.bias_u = c->bias_u;
  args.bias_v = c->bias_v;
  args.lengths = static_cast<const int32_t*>(c->lengths);
  args.counts = static_cast<const int32_t*>(c->counts);
  args.slots = static_cast<const int32_t*>(c->slots);
  args.scale = static_cast<float>(c->scale);
  args.out = c->out;
  status = cuda::launch(plan, args, Executor());
  return answer(status.ok() ? to_string(plan.cuda) : status.text, message, size, status.ok() ? 0 : 1);
}

}  // extern "C"
#pragma GCC visibility pop
