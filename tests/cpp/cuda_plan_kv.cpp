// CUDA plans of attention, of the packing of its caches, and of a decoder layer as a composite.
#include <cmath>

#include "cuda_devices.h"
#include "lora_kernels/composite.h"

using namespace lora_kernels;

namespace {

// Whisper large-v3: 20 heads of 64.
KvAttentionStepProblem kv_problem(int64_t rows, int64_t capacity, bool append) {
  KvAttentionStepProblem p;
  p.rows = p.cache_rows = rows;
  p.heads = 20;
  p.head_size = 64;
  p.capacity = capacity;
  p.dtype = p.cache_dtype = DType::kFloat16;
  p.append = append;
  return p;
}

KvAttentionStepProblem cross_problem(int64_t utterances, int64_t beams) {
  KvAttentionStepProblem p = kv_problem(utterances, 1500, false);
  p.rows = utterances * beams;
  p.slots = KvSlots::kPerRow;
  p.cache_dtype = DType::kInt8;
  p.scales = KvScales::kPerChannel;
  p.layout = KvLayout::kBlocked;
  return p;
}

KvAttentionStepPlan kv_plan(const KvAttentionStepProblem& p, const CudaDevice& device) {
  KvAttentionStepPlan chosen;
  const Status status = plan(p, on_cuda(device), &chosen);
  check(status.ok(), status.text);
  return chosen;
}

void test_kv_attention_plans() {
  CudaDevice unknown;
  unknown.arch = 130;
  for (const CudaDevice& d : {kT4, kA100, kL4, kH200, with_clusters(kH200), unknown}) {
    const KvAttentionStepPlan own = kv_plan(kv_problem(16, 448, true), d);
    check(own.cuda.fused && own.cuda.splits == own.cuda.cluster && own.cuda.chunks == 1,
          "a step of self-attention is one launch: " + to_string(own));
    check(workspace_bytes(own) == 0, "which needs no memory: " + to_string(own));
    check(std::isfinite(own.cuda.predicted_us) && own.cuda.predicted_us > 0, to_string(own));
    const KvAttentionStepPlan alone = kv_plan(cross_problem(1, 5), d);
    // Slow memory is kept busy by one block a head, which asks ahead.
    check((alone.cuda.splits > 1) == (d.memory_bytes_per_second > 1e12),
          "few heads over many positions are split: " + to_string(alone));
    check(alone.cuda.ask > 0, "what few blocks ask for is on its way at once: " + to_string(alone));
    check((alone.cuda.cluster > 1) == d.clusters, "by a cluster where there are any: " + to_string(alone));
    check(alone.cuda.cluster == 1 || alone.cuda.cluster == alone.cuda.splits,
          "which is all splits: " + to_string(alone));
    const bool parts = alone.cuda.splits > alone.cuda.cluster;
    check(workspace_bytes(alone) >= (parts ? alone.cuda.splits * 5 * 20 * 66 * 4 : 0),
          "partial sums have room: " + to_string(alone));
    check(int64_t{alone.cuda.splits} * alone.cuda.split_positions >= 1500, "all positions: " + to_string(alone));
    check(d.clusters || int64_t{alone.cuda.splits - 1} * alone.cuda.split_positions < 1500,
          "no split is empty: " + to_string(alone));
    check(to_string(alone) == to_string(kv_plan(cross_problem(1, 5), d)), "a plan is a function");
    // The beams of an utterance are one block's queries: K and V are read once, whoever shares them.
    const double one = kv_plan(cross_problem(16, 1), d).cuda.predicted_us;
    const KvAttentionStepPlan beams = kv_plan(cross_problem(16, 5), d);
    check(beams.cuda.grouped && beams.cuda.chunks == 1 && beams.cuda.predicted_us < 1.1 * one,
          "five beams take what one takes: " + to_string(beams));
    check(own.cuda.early_start == (d.arch >= 90), "kernels start early from sm_90 on");
  }
  // One utterance leaves most multiprocessors idle, unless the blocks of a cluster share out its positions.
  const CudaDevice clusters = with_clusters(kH200);
  KvAttentionStepProblem p = kv_problem(1, 448, true);
  const KvAttentionStepPlan shared = kv_plan(p, clusters);
  check(shared.cuda.cluster > 1 && workspace_bytes(shared) == 0 &&
            shared.cuda.predicted_us < kv_plan(p, kH200).cuda.predicted_us,
        "positions of one utterance are shared out: " + to_string(shared));
  p.capacity = 60;
  check(kv_plan(p, clusters).cuda.cluster == 1, "few are not: " + to_string(kv_plan(p, clusters)));
  p.capacity = 448;
  p.head_size = 80;
  check(kv_plan(p, clusters).cuda.cluster == 1, "nor where registers are full: " + to_string(kv_plan(p, clusters)));
  p.append = false;
  p.cache_dtype = DType::kInt8;
  p.scales = KvScales::kPerChannel;
  p.layout = KvLayout::kBlocked;
  check(kv_plan(p, clusters).cuda.cluster > 1, "which blocked ones are not: " + to_string(kv_plan(p, clusters)));
  p = cross_problem(1, 1);
  p.heads = 1;
  CudaDevice part = clusters;
  for (const auto& [multiprocessors, most] : {std::pair(64, 8), {63, 4}, {16, 4}, {15, 1}}) {
    part.multiprocessors = multiprocessors;
    check(kv_plan(p, part).cuda.cluster == most, "small devices have small clusters: " + to_string(kv_plan(p, part)));
  }
  p.capacity = 0;
  const KvAttentionStepPlan none = kv_plan(p, clusters);
  check(none.cuda.splits == 1 && std::isfinite(none.cuda.predicted_us), "no positions: " + to_string(none));
  p = kv_problem(4, 448, true);
  p.slots = KvSlots::kPerPosition;
  check(kv_plan(p, kA100).cuda.places && !kv_plan(p, kA100).cuda.grouped, "a table is looked up");
  p.capacity = 20000;
  check(kv_plan(p, kA100).cuda.split_positions <= 4096, "in parts that fit shared memory");
  p = kv_problem(4, 448, true);
  p.cache_dtype = DType::kInt8;
  p.scales = KvScales::kPerPosition;
  check(!kv_plan(p, kA100).cuda.fused, "an int8 cache is appended to first");
  p = kv_problem(4, 448, true);
  p.tokens = 17;
  check(!kv_plan(p, kA100).cuda.fused && kv_plan(p, kA100).cuda.chunks == 2, "and so is a long prompt");
  p = kv_problem(4, 448, true);
  p.head_size = 80;
  check(kv_plan(p, kA100).cuda.groups == 2, "heads of more than 64 channels");

  KvAttentionStepPlan chosen;
  p = kv_problem(4, 448, true);
  p.dtype = DType::kBFloat16;
  p.head_size = 129;
  Status s = plan(p, on_cuda(kT4), &chosen);
  check(s.code == StatusCode::kUnsupported && contains(s.text, "q: on sm_75 expected float16") &&
            contains(s.text, "k_cache, v_cache: expected bfloat16, as q is, or int8, got float16") &&
            contains(s.text, "head size: expected at most 128, got 129") && contains(s.text, "move them to the CPU"),
        s.text);
  p = kv_problem(4, 8, true);
  p.tokens = 9;
  s = plan(p, on_cuda(kH100), &chosen);
  check(contains(s.text, "k, v: expected at most as many new tokens as the cache has positions, 8, got 9"), s.text);
  p = kv_problem(4, 8, true);
  p.slots = KvSlots::kPerRow;
  p.cache_rows = 0;
  check(contains(plan(p, on_cuda(kH100), &chosen).text, "got a cache without any"), "no cache rows at all");

  p = kv_problem(4, 448, true);
  p.weight_heads = 1;
  check(plan(p, on_cuda(kH100), &chosen).ok(), "weights of heads have a plan");
  KvAttentionStepArgs args;
  const int64_t head = 20;
  args.weight_heads = &head;
  s = run(chosen, args, serial_executor());
  check(s.code == StatusCode::kInvalidArgument && contains(s.text, "heads: entry 0 is 20, expected a head, 0 to 19"),
        "what the host knows is refused before the launch: " + s.text);
  check(plan(cross_problem(2, 5), on_cuda(kH100), &chosen).ok(), "blocked caches have a plan");
  args.k_cache = reinterpret_cast<void*>(uintptr_t{24});
  s = run(chosen, args, serial_executor());
  check(contains(s.text, "k_cache: expected an address that is a multiple of 16, got one of 8 beyond"), s.text);
  args.k_cache = nullptr;
  s = run(chosen, args, serial_executor());
  check(s.code == StatusCode::kUnsupported && contains(s.text, "LORA_KERNELS_CUDA=ON"), s.text);
}

void test_kv_pack_plans() {
  KvPackProblem p;
  p.cache_rows = 16;
  p.positions = 1500;
  p.heads = 20;
  p.head_size = 64;
  p.dtype = DType::kFloat16;
  KvPackPlan chosen;
  const Status planned = plan(p, on_cuda(kH100), &chosen);
  check(planned.ok(), planned.text);
  check(contains(to_string(chosen), "cuda sm_90"), to_string(chosen));
  check(workspace_bytes(chosen) == 0 && chosen.cuda.predicted_us > 0, to_string(chosen));
  check(contains(run(chosen, KvPackArgs(), serial_executor()).text, "LORA_KERNELS_CUDA=ON"), "nothing runs here");
  p.dtype = DType::kBFloat16;
  const Status s = plan(p, on_cuda(kT4), &chosen);
  check(s.code == StatusCode::kUnsupported && contains(s.text, "on sm_75 expected float16"), s.text);
}

// A decoder layer, as it is recorded: every stage is planned for the device, and none is left to the CPU.
void test_composite() {
  CompositeProblem step;
  Int8LoraLinearProblem linear = int8_problem(16, 1280, 1280, 16, 4);
  linear.has_norm = true;
  KvPackProblem pack;
  pack.cache_rows = 16;
  pack.positions = 1500;
  pack.heads = 20;
  pack.head_size = 64;
  pack.dtype = DType::kFloat16;
  Int8LoraLinearProblem choice = int8_problem(16, 1280, 51866, 0);
  choice.top_k = 1;
  step.stages = {pack, linear, kv_problem(16, 448, true), cross_problem(16, 1), choice};
  CompositePlan chosen;
  const Status planned = plan(step, on_cuda(kH100), &chosen);
  check(planned.ok() && chosen.threads == 1, planned.text);
  for (const StagePlan& stage : chosen.stages) {
    const std::string text = std::visit([](const auto& p) { return to_string(p); }, stage);
    check(contains(text, "cuda sm_90"), text);
    check(std::visit([](const auto& p) { return workspace_bytes(p); }, stage) <= workspace_bytes(chosen), text);
  }
  CompositeArgs args;
  args.stages = {KvPackArgs(), Int8LoraLinearArgs(), KvAttentionStepArgs(), KvAttentionStepArgs(),
                 Int8LoraLinearArgs()};
  const Status s = run(chosen, args, serial_executor());
  check(s.code == StatusCode::kUnsupported && contains(s.text, "kv_pack") && contains(s.text, "LORA_KERNELS_CUDA=ON"),
        "it stops at its first stage in a library without kernels: " + s.text);
}

}  // namespace

void test_kv_plans() {
  test_kv_attention_plans();
  test_kv_pack_plans();
  test_composite();
}
