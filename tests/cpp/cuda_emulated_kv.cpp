// kv_attention_step's and kv_pack's CUDA kernels behind the C interface of cuda_emulated.cpp.
#include "cuda/kv_attention_step.h"
#include "cuda/kv_pack.h"
#include "cuda/kv_shapes.h"
#include "cuda_emulated.h"

namespace lora_kernels {
std::string to_string(const KvAttentionStepPlan& plan) { return to_string(plan.cuda); }
std::string to_string(const KvPackPlan& plan) { return to_string(plan.cuda); }
}  // namespace lora_kernels

using namespace lora_kernels;

namespace {

// tests/cuda/emulated_kv.py has its twin.
struct Call {
  int64_t rows, tokens, heads, head_size, cache_rows, capacity, dtype, cache_dtype, scales, slot_kind, layout, append;
  int64_t weight_heads, arch, apart, split_positions, cluster, chunks;  // the last four 0: the plan's own choice
  double scale;
  const void *q, *k, *v;
  void *k_cache, *v_cache, *k_scales, *v_scales;
  const void *lengths, *slots, *chosen_heads;
  void *weights, *out;
};

struct PackCall {
  int64_t cache_rows, positions, heads, head_size, dtype, k_stride, v_stride, k_row_stride, v_row_stride, arch;
  const void *k, *v;
  void *packed_k, *packed_v, *k_scales, *v_scales;
};

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// 0: ran, and message is the plan; else message is the error.
int emulated_kv_attention_step(const Call* c, char* message, int64_t size) {
  const DeviceInfo device = device_of(c->arch);
  KvAttentionStepPlan plan;
  KvAttentionStepProblem& p = plan.problem;
  p.rows = c->rows;
  p.tokens = c->tokens;
  p.heads = c->heads;
  p.head_size = c->head_size;
  p.cache_rows = c->cache_rows;
  p.capacity = c->capacity;
  p.dtype = static_cast<DType>(c->dtype);
  p.cache_dtype = static_cast<DType>(c->cache_dtype);
  p.scales = static_cast<KvScales>(c->scales);
  p.slots = static_cast<KvSlots>(c->slot_kind);
  p.layout = static_cast<KvLayout>(c->layout);
  p.append = c->append != 0;
  p.weight_heads = c->weight_heads;
  Status status = cuda::supported(p, device.cuda);
  if (!status.ok()) return answer(status.text, message, size, 1);
  cuda::configure(device, &plan);
  CudaKvAttentionStepPlan& chosen = plan.cuda;
  if (c->apart && chosen.fused) {
    chosen.fused = false;
    chosen.places = p.slots == KvSlots::kPerPosition;
  }
  if (c->chunks) chosen.chunks = static_cast<int>(c->chunks);
  if (c->split_positions) {
    chosen.split_positions = static_cast<int>(c->split_positions);
    const int64_t splits = (p.capacity + c->split_positions - 1) / c->split_positions;
    chosen.splits = static_cast<int>(splits > 0 ? splits : 1);
    chosen.cluster = 1;
  }
  if (c->cluster && cuda::kv_shares(chosen.groups, p.layout == KvLayout::kBlocked)) {
    chosen.splits = chosen.cluster = static_cast<int>(c->cluster);
    chosen.split_positions = static_cast<int>(round_up((p.capacity + c->cluster - 1) / c->cluster, cuda::kKvSplitStep));
  }
  cuda::Workspace w;
  cuda::KvWorkspace(w, plan);
  const auto workspace = workspace_of(w.used);
  KvAttentionStepArgs args;
  args.q = c->q;
  args.k = c->k;
  args.v = c->v;
  args.k_cache = c->k_cache;
  args.v_cache = c->v_cache;
  args.k_scales = static_cast<float*>(c->k_scales);
  args.v_scales = static_cast<float*>(c->v_scales);
  args.lengths = static_cast<const int32_t*>(c->lengths);
  args.slots = static_cast<const int32_t*>(c->slots);
  args.scale = static_cast<float>(c->scale);
  args.weight_heads = static_cast<const int64_t*>(c->chosen_heads);
  args.weights = static_cast<float*>(c->weights);
  args.out = c->out;
  args.workspace = workspace.get();
  status = cuda::launch(plan, args, Executor());
  return answer(status.ok() ? to_string(plan.cuda) : status.text, message, size, status.ok() ? 0 : 1);
}

int emulated_kv_pack(const PackCall* c, char* message, int64_t size) {
  const DeviceInfo device = device_of(c->arch);
  KvPackPlan plan;
  KvPackProblem& p = plan.problem;
  p.cache_rows = c->cache_rows;
  p.positions = c->positions;
  p.heads = c->heads;
  p.head_size = c->head_size;
  p.dtype = static_cast<DType>(c->dtype);
  Status status = cuda::supported(p, device.cuda);
  if (!status.ok()) return answer(status.text, message, size, 1);
  cuda::configure(device, &plan);
  KvPackArgs args;
  args.k = c->k;
  args.v = c->v;
  args.k_stride = c->k_stride;
  args.v_stride = c->v_stride;
  args.k_row_stride = c->k_row_stride;
  args.v_row_stride = c->v_row_stride;
  args.packed_k = static_cast<int8_t*>(c->packed_k);
  args.packed_v = static_cast<int8_t*>(c->packed_v);
  args.k_scales = static_cast<float*>(c->k_scales);
  args.v_scales = static_cast<float*>(c->v_scales);
  status = cuda::launch(plan, args, Executor());
  return answer(status.ok() ? to_string(plan.cuda) : status.text, message, size, status.ok() ? 0 : 1);
}

}  // extern "C"
#pragma GCC visibility pop
