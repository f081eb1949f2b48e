// Which kernels a kv_attention_step takes on a CUDA device: pure functions of the problem and of what the device says
// of itself. Times are predicted from bytes, in microseconds; they choose the splits, and nothing has measured them.
#include <algorithm>
#include <climits>
#include <cstdio>
#include <sstream>

#include "cuda/kv_attention_step.h"
#include "cuda/kv_shapes.h"
#include "cuda/machine.h"
#include "cuda/refusals.h"
#include "lora_kernels/kv_packing.h"

namespace lora_kernels::cuda {
namespace {

// A block begins by finding its queries, and ends by adding up its warps: microseconds besides its bytes.
constexpr double kEdgesUs = 2.0;
// Of what a warp's registers hold of K and V, the part that is on its way at any time.
constexpr double kOnItsWay = 0.5;
// A warp's tiles follow one another: K and V from L2 at best, then two products and a softmax between them.
constexpr double kTripUs = 0.5;
// A growing cache of at most so many positions is not split: decoders want one launch for append and attention.
constexpr int64_t kMostUnsplit = 512;

int64_t element_size(DType type) { return static_cast<int64_t>(size_of(type)); }

int64_t units_of(const KvAttentionStepProblem& p, bool grouped) { return grouped ? p.cache_rows : p.rows; }

// Blocks share a multiprocessor by their registers: up to 168 of a thread, more than 200 where products are tf32 or
// heads have more than 64 channels.
double resident(const KvAttentionStepProblem& p) {
  return p.head_size > 64 || (p.dtype == DType::kFloat32 && p.layout == KvLayout::kRowMajor) ? 2 : 3;
}

// Of K and V in the tiles that the warps of a block have at a time.
double bytes_of_tiles(const KvAttentionStepProblem& p) {
  const int tile = p.layout == KvLayout::kBlocked ? kKvBlockedTile : kKvTile;
  return 2.0 * kKvWarps * tile * static_cast<double>(p.head_size * element_size(p.cache_dtype));
}

// Blocks of a launch.
double blocks_of(const KvAttentionStepProblem& p, const CudaKvAttentionStepPlan& c, int splits) {
  return static_cast<double>(std::min(units_of(p, c.grouped), p.rows) * p.heads * c.chunks * splits);
}

// Tiles that each warp asks for ahead: of what all may ask for, and no more than a block has.
int asked_ahead(const Machine& machine, const KvAttentionStepProblem& p, const CudaKvAttentionStepPlan& c, int splits) {
  const double at_once = std::min(blocks_of(p, c, splits), resident(p) * machine.multiprocessors);
  const auto step = static_cast<int64_t>(kKvMostAsked / (std::max(1.0, at_once) * bytes_of_tiles(p)));
  const int64_t trips = p.capacity / splits / (kKvWarps * (p.layout == KvLayout::kBlocked ? kKvBlockedTile : kKvTile));
  return static_cast<int>(std::min(step, trips));
}

double time_of(const Machine& machine, const KvAttentionStepProblem& p, const CudaKvAttentionStepPlan& c, int splits) {
  const int ask = asked_ahead(machine, p, c, splits);
  const double room = resident(p) * machine.multiprocessors, blocks = blocks_of(p, c, splits);
  const double size = static_cast<double>(element_size(p.cache_dtype)), D = static_cast<double>(p.head_size);
  const double vectors = static_cast<double>(p.rows * p.tokens * p.heads);
  const double bytes = 2 * static_cast<double>(p.capacity) * D * size / splits;  // of a block
  const double in_flight = std::min(bytes, (kOnItsWay + ask) * bytes_of_tiles(p));
  const double trips_us = bytes / bytes_of_tiles(p) * kTripUs;
  // As many blocks as there is room for share the memory, then the rest: few of them cannot keep it busy.
  const double needed = machine.bytes * kLatencySeconds;
  const auto wave_us = [&](double count) {
    if (count <= 0) return 0.0;
    return std::max(machine.memory_us(count * bytes) / std::min(1.0, count * in_flight / needed), trips_us);
  };
  const auto full = static_cast<double>(static_cast<int64_t>(blocks / room));
  double us = full * wave_us(room) + wave_us(blocks - full * room) + kEdgesUs + machine.next_launch_us();
  us += machine.memory_us((p.append ? 6 : 2) * vectors * D * static_cast<double>(element_size(p.dtype)));
  if (splits > 1) us += machine.memory_us(2 * splits * vectors * (D + 2) * 4) / kL2 + machine.next_launch_us();
  if (p.append && !c.fused) us += machine.next_launch_us();
  if (p.weight_heads) us += machine.next_launch_us();
  return us;
}

}  // namespace

KvWorkspace::KvWorkspace(Workspace& w, const KvAttentionStepPlan& plan) {
  const KvAttentionStepProblem& p = plan.problem;
  const int64_t vectors = plan.cuda.splits > 1 ? plan.cuda.splits * p.rows * p.tokens * p.heads : 0;
  parts = static_cast<float*>(w.take(vectors * p.head_size * 4));
  stats = static_cast<float*>(w.take(vectors * 2 * 4));
}

Status supported(const KvAttentionStepProblem& p, const CudaDevice& device) {
  Refusals refusals;
  refusals.expect_tensor_cores(device, "q", p.dtype);
  const bool same = p.cache_dtype == p.dtype || p.cache_dtype == DType::kInt8;
  if (!same && p.dtype != DType::kFloat32)
    refusals.add(std::string("k_cache, v_cache: expected ") + name_of(p.dtype) + ", as q is, or int8, got " +
                 name_of(p.cache_dtype));
  refusals.expect_at_most("head size", kKvMostHeadSize, p.head_size);
  refusals.expect_at_most("heads to return weights of", kKvMostWeightHeads, p.weight_heads);
  refusals.expect_at_most("capacity", INT_MAX / 2, p.capacity);
  refusals.expect_attention_sizes(p.rows, p.tokens, p.heads, p.cache_rows);
  if (refusals.none()) {
    if (p.weight_heads > 0)
      refusals.expect_at_most("rows of q times tokens, with weights", INT_MAX / 2, p.rows * p.tokens);
    refusals.expect_at_most("rows of q times tokens times heads", INT_MAX / 4, p.rows * p.tokens * p.heads);
    refusals.expect_at_most("rows of k_cache times heads", INT_MAX / 4096, p.cache_rows * p.heads);
  }
  return refusals.status(
      "kv_attention_step",
      "Convert the operands to what is supported, or move them to the CPU, whose kernels take any of it.");
}

void configure(const DeviceInfo& device, KvAttentionStepPlan* plan) {
  const KvAttentionStepProblem& p = plan->problem;
  const Machine machine(device.cuda, 1024);
  CudaKvAttentionStepPlan& c = plan->cuda;
  c = {};
  c.arch = device.cuda.arch;
  c.early_start = machine.early;
  c.groups = p.head_size > 64 ? 2 : 1;
  c.grouped = p.slots == KvSlots::kPerRow && !p.append;
  c.fused = p.append && p.cache_dtype == p.dtype && p.tokens <= kKvMostAppended;
  c.places = c.fused || p.slots == KvSlots::kPerPosition;
  const int64_t queries = p.layout == KvLayout::kBlocked ? kKvBlockedQueries : kKvQueries;
  // On average; a unit with more goes through them in turns.
  const int64_t of_unit =
      c.grouped ? (p.rows * p.tokens + p.cache_rows - 1) / std::max<int64_t>(1, p.cache_rows) : p.tokens;
  c.chunks = static_cast<int>(std::clamp<int64_t>((of_unit + queries - 1) / queries, 1, 65535));

  const auto split_of = [&](int splits) {
    const int64_t positions = round_up((p.capacity + splits - 1) / splits, kKvSplitStep);
    return static_cast<int>(std::max<int64_t>(positions, kKvSplitStep));
  };
  const auto splits_of = [&](int positions) {
    return static_cast<int>(std::max<int64_t>(1, (p.capacity + positions - 1) / positions));
  };
  int least = 1;  // places wait in shared memory
  if (c.places) least = splits_of(kKvMostPlaces);
  c.splits = splits_of(split_of(least));
  c.predicted_us = time_of(machine, p, c, c.splits);
  if (!(p.append && p.capacity <= kMostUnsplit))
    for (int wish : {2, 3, 4, 6, 8, 12, 16, 24, 32}) {
      if (wish < least) continue;
      const int splits = splits_of(split_of(wish));  // steps are rounded up, so that fewer may do
      const double us = time_of(machine, p, c, splits);
      if (us < kWorthwhile * c.predicted_us) {
        c.splits = splits;
        c.predicted_us = us;
      }
    }
  c.split_positions = split_of(c.splits);
  c.ask = asked_ahead(machine, p, c, c.splits);
  Workspace w;
  const KvWorkspace parts(w, *plan);
  plan->workspace = w.used;
}

}  // namespace lora_kernels::cuda

namespace lora_kernels {

std::string to_string(const CudaKvAttentionStepPlan& c) {
  std::ostringstream text;
  text << "cuda sm_" << c.arch << (c.fused ? " fused" : "") << (c.grouped ? " grouped" : "")
       << (c.places ? " places" : "") << " channels=" << 64 * c.groups << " chunks=" << c.chunks
       << " splits=" << c.splits << "x" << c.split_positions << " ask=" << c.ask
       << (c.early_start ? " early_start" : "");
  char predicted[32];
  std::snprintf(predicted, sizeof predicted, " predicted=%.1fus", c.predicted_us);
  text << predicted;
  return text.str();
}

}  // namespace lora_kernels
