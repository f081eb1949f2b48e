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
constexpr double kFirstUs = 1.0, kLastUs = 1.0;
// Of what a warp's registers hold of K and V, the part that is on its way at any time.
constexpr double kOnItsWay = 0.5;
// A warp's tiles follow one another: K and V from L2 at best, then two products and a softmax between them.
constexpr double kTripUs = 0.5;
// A growing cache of at most so many positions is split by a cluster or not at all: decoders want one launch for append
// and attention.
constexpr int64_t kMostInOneLaunch = 512;
// Parts from the blocks of a cluster: two barriers, and what comes from another multiprocessor as from L2.
constexpr double kExchangeUs = 0.5;

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

// How positions are shared out.
struct Split {
  int splits = 1, cluster = 1, positions = 0;
  // Those that have positions when the cache is full.
  int busy(int64_t capacity) const {
    return static_cast<int>(std::max<int64_t>(1, (capacity + positions - 1) / positions));
  }
};

// Blocks of a launch that have positions.
double blocks_of(const KvAttentionStepProblem& p, const CudaKvAttentionStepPlan& c, const Split& s) {
  return static_cast<double>(std::min(units_of(p, c.grouped), p.rows) * p.heads * c.chunks * s.busy(p.capacity));
}

// Tiles that each warp asks for ahead: of what all may ask for, and no more than a block has.
int asked_ahead(const Machine& machine, const KvAttentionStepProblem& p, const CudaKvAttentionStepPlan& c,
                const Split& s) {
  const double at_once = std::min(blocks_of(p, c, s), resident(p) * machine.multiprocessors);
  const auto step = static_cast<int64_t>(kKvMostAsked / (std::max(1.0, at_once) * bytes_of_tiles(p)));
  const int64_t trips =
      p.capacity / s.busy(p.capacity) / (kKvWarps * (p.layout == KvLayout::kBlocked ? kKvBlockedTile : kKvTile));
  return static_cast<int>(std::min(step, trips));
}

double time_of(const Machine& machine, const KvAttentionStepProblem& p, const CudaKvAttentionStepPlan& c,
               const Split& s) {
  const int ask = asked_ahead(machine, p, c, s);
  const double room = resident(p) * machine.multiprocessors, blocks = blocks_of(p, c, s);
  const double size = static_cast<double>(element_size(p.cache_dtype)), D = static_cast<double>(p.head_size);
  const double vectors = static_cast<double>(p.rows * p.tokens * p.heads);
  const double bytes = 2 * static_cast<double>(p.capacity) * D * size / s.busy(p.capacity);  // of a block
  const double in_flight = std::min(bytes, (kOnItsWay + ask) * bytes_of_tiles(p));
  const double most = 2 * static_cast<double>(std::min<int64_t>(p.capacity, s.positions)) * D * size;
  const double trips_us = most / bytes_of_tiles(p) * kTripUs;
  // As many blocks as there is room for share the memory, then the rest: few of them cannot keep it busy.
  const double needed = machine.bytes * kLatencySeconds, first_us = machine.next_launch_us() + kFirstUs;
  // `ahead`: for so many microseconds memory has worked for them before they begin.
  const auto wave_us = [&](double count, double ahead) {
    if (count <= 0 || bytes <= 0) return 0.0;
    return std::max(machine.memory_us(count * bytes) / std::min(1.0, count * in_flight / needed) - ahead, trips_us);
  };
  const double first = std::min(blocks, room), rest = blocks - first;
  const auto full = static_cast<double>(static_cast<int64_t>(rest / room));
  // What blocks ask for before they wait for the kernel before comes while that ends and queries are found.
  const bool before = machine.early && p.layout == KvLayout::kBlocked;
  const double asked = before ? first * std::min(bytes, ask * bytes_of_tiles(p)) : 0;
  double us = first_us + wave_us(first, std::min(first_us, machine.memory_us(asked))) + kLastUs;
  us += full * wave_us(room, 0) + wave_us(rest - full * room, 0);
  us += machine.memory_us((p.append ? 6 : 2) * vectors * D * static_cast<double>(element_size(p.dtype)));
  if (s.cluster > 1)
    us += kExchangeUs;
  else if (s.splits > 1)
    us += machine.memory_us(2 * s.splits * vectors * (D + 2) * 4) / kL2 + machine.next_launch_us();
  if (p.append && !c.fused) us += machine.next_launch_us();
  if (p.weight_heads) us += machine.next_launch_us();
  return us;
}

}  // namespace

KvWorkspace::KvWorkspace(Workspace& w, const KvAttentionStepPlan& plan) {
  const KvAttentionStepProblem& p = plan.problem;
  const int64_t vectors = plan.cuda.splits > plan.cuda.cluster ? plan.cuda.splits * p.rows * p.tokens * p.heads : 0;
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

  const auto split_of = [&](int splits, int cluster) {
    const int64_t positions =
        std::max<int64_t>(round_up((p.capacity + splits - 1) / splits, kKvSplitStep), kKvSplitStep);
    Split s{splits, cluster, static_cast<int>(positions)};
    if (cluster == 1) s.splits = s.busy(p.capacity);  // steps are rounded up, so that fewer may do
    return s;
  };
  const int least =  // places wait in shared memory
      c.places ? static_cast<int>(std::max<int64_t>(1, (p.capacity + kKvMostPlaces - 1) / kKvMostPlaces)) : 1;
  Split best = split_of(least, 1);
  c.predicted_us = time_of(machine, p, c, best);
  const auto consider = [&](const Split& s) {
    const double us = time_of(machine, p, c, s);
    if (s.splits >= least && us < kWorthwhile * c.predicted_us) best = s, c.predicted_us = us;
  };
  const bool shares = kv_shares(c.groups, p.layout == KvLayout::kBlocked);
  for (int cluster = 2; shares && cluster <= std::min(kKvMostCluster, most_cluster(device.cuda)); cluster *= 2)
    consider(split_of(cluster, cluster));
  if (!p.append || p.capacity > kMostInOneLaunch)
    for (const int splits : {2, 3, 4, 6, 8, 12, 16, 24, 32}) consider(split_of(splits, 1));
  c.splits = best.splits;
  c.split_positions = best.positions;
  c.cluster = best.cluster;
  c.ask = asked_ahead(machine, p, c, best);
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
       << " splits=" << c.splits << "x" << c.split_positions << (c.cluster > 1 ? " cluster" : "") << " ask=" << c.ask
       << (c.early_start ? " early_start" : "");
  char predicted[32];
  std::snprintf(predicted, sizeof predicted, " predicted=%.1fus", c.predicted_us);
  text << predicted;
  return text.str();
}

}  // namespace lora_kernels
