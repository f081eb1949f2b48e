// Which kernels an int8_lora_linear takes on a CUDA device: pure functions of the problem and of what the device says
// of itself. Times are predicted from bytes and operations, in microseconds; they order the paths, and nothing has
// measured them.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <sstream>

#include "cuda/int8_lora_linear.h"
#include "cuda/int8_shapes.h"
#include "cuda/machine_hopper.h"
#include "cuda/refusals.h"

namespace lora_kernels::cuda {
namespace {

// What few rows wait for besides bytes, in clocks: kL2Clocks each time that something is asked for when something else
// is there; kBlockSum for the largest of a row, a norm, t and y; and instructions, of which 128 lanes are issued per
// clock. A cluster hands sums on as far as L2 is away. For each value of a row: its conversion, magnitude and
// quantization; and with a norm its sums and two normalizations.
constexpr double kRowInstructions = 12, kNormInstructions = 16;
struct Waits {
  double trips = 0, sums = 0, instructions = 0;
  double us(const Machine& machine, double at_once = 1) const {
    return (trips * kL2Clocks + sums * kBlockSum + at_once * instructions / 128) / machine.clock * 1e6;
  }
};

constexpr double kStepBytes = 64;  // of depth, of a product of t

// What times are made of.
struct Sizes {
  int64_t size, norm_size;           // of an element of x, and of a norm's
  bool lora;                         //
  double M, K, N, element;           //
  double rank, total;                // of the largest adapter, and of all
  double base_bytes, convert_bytes;  // of memory: without A and x; of A that has to be converted, or 0

  explicit Sizes(const Int8LoraLinearProblem& p)
      : size(static_cast<int64_t>(size_of(p.dtype))),
        norm_size(p.has_norm ? static_cast<int64_t>(size_of(p.norm_dtype)) : 0),
        lora(p.lora.present() && p.in_features > 0),
        M(static_cast<double>(p.rows)),
        K(static_cast<double>(p.in_features)),
        N(static_cast<double>(p.out_features)),
        element(static_cast<double>(size)),
        rank(lora ? static_cast<double>(p.lora.max_rank) : 0),
        total(lora ? static_cast<double>(p.lora.total_rank) : 0) {
    base_bytes = N * K + M * K + M * N * (p.top_k ? 4 : element) * (p.has_residual ? 2 : 1) + total * N * element;
    convert_bytes = lora && p.lora.dtype != p.dtype ? 2 * total * K * element : 0;
  }
  double convert_us(const Machine& machine) const {
    return convert_bytes > 0 ? kLaunchUs + machine.memory_us(convert_bytes) : 0;
  }
  // So many rows and who their adapters are; A. What is not staged: a norm's weights, where the adapters lie, and
  // A in turns of two steps of a warp.
  Waits rows(double count, bool staged, double depth) const {
    const double steps = depth * element / kStepBytes / kInt8Warps, norm = norm_size ? 1 : 0;
    Waits w;
    w.trips = 1 + (lora ? staged ? 1 : 1 + std::ceil(steps / 2) : 0) + (staged ? 0 : norm);
    w.sums = 1 + (lora ? 1 : 0) + norm;
    w.instructions = count * K * (kRowInstructions + norm * kNormInstructions);
    return w;
  }
};
constexpr int64_t kMostFewRows = 32;  // two products of sixteen rows for each fragment of w

// Integer operations of one multiprocessor per clock through mma.sync. Data sheets: T4 130, A100 624, L4 242, RTX 5090
// 838 TOPS; of the H100's 1979, which is wgmma's rate, 60 %. Unknown ones are taken for the slowest.
double operations_per_clock(int arch) {
  switch (arch) {
    case 80: return 4096;
    case 90: return 5080;
    case 100: return 4096;
    default: return 2048;  // 75, 86, 89, 120
  }
}

// Tiles of int8_wgmma.cuh. Of a step two warpgroups read its 16 KB of q each, and lanes w once.
constexpr HopperTile kByWgmma = {128, 2, 2, (2 + 1) * 16384.0};
// Of int8_persistent.cuh, the same for more rows; a warpgroup gets ahead of the other by what the ring holds, of four
// steps or of three, beyond the step that is multiplied, half of the one before, and one on its way.
constexpr PersistentTile kPersistent[] = {{kInt8PersistentRows, 128, (2 * 2 + 1) * 16384.0, 1.5},
                                          {kInt8PersistentMostRows, 128, (2 * 2.5 + 1) * 16384.0, 0.5}};
// Instructions of a tile's end for each value, by the machine code for 16 bits: conversion 5, by way of shared memory
// to y 10, what a step of the branch takes besides its products 5.
constexpr double kEndInstructions = 20;
// The same of int8_persistent.cuh, whose other warps bring what the end reads; and of its residual.
constexpr double kPersistentEnd = 8, kPersistentResidual = 4;

// Few rows. Blocks of 32 channels ask for their part of w at once, as many as there is room for, and read it from L2
// when the rows are there.
struct Stream {
  double blocks, of_block, bytes;  // of w by each; of the call
  double at_once;                  // blocks on a multiprocessor

  double arrived_us(const Machine& machine) const {
    const double asked = std::min(blocks, at_once * machine.multiprocessors) * of_block;
    return machine.memory_us(bytes) / std::min(1.0, asked / (machine.bytes * kLatencySeconds));
  }
  // What is left to do when all has arrived and the rows are there: blocks of the last turn read their part.
  double read_us(const Machine& machine) const {
    return machine.l2_us(blocks, of_block, at_once) / machine.turns(blocks, at_once);
  }
};

// Rows that every block makes for itself, alone or in a cluster that shares out K: the best of them.
struct Fused {
  double us = 0;  // 0: none
  int cluster = 1;
  Int8Staged staged;
};
Fused fused_of(const Machine& machine, const CudaDevice& device, const Int8LoraLinearProblem& p, const Sizes& s,
               int64_t shared_bytes) {
  Fused best;
  const int64_t steps = (p.in_features + kInt8Step - 1) / kInt8Step;
  if (p.rows > kInt8Rows || steps == 0) return best;
  for (const int cluster : {1, 2, 4, 8}) {
    if (cluster > most_cluster(device) || (cluster > 1 && steps < cluster * kInt8Warps))
      break;  // every warp has a step
    const int64_t depth = (steps + cluster - 1) / cluster * kInt8Step;
    const int64_t bytes = int8_fused_bytes(p.rows, p.in_features, t_stride(p.lora), s.size, cluster);
    for (const Int8Staging staging : {Int8Staging::kAll, Int8Staging::kRows, Int8Staging::kNone}) {
      const Int8Staged staged = fused_staged(p, cluster, staging);
      if (bytes + staged.bytes > shared_bytes) continue;
      const double at_once = bytes + staged.bytes <= (shared_bytes - 1024) / 2 ? 2.0 : 1.0;
      const double blocks = std::ceil(s.N / kInt8FewColumns) * cluster,
                   shared_by = std::min(at_once, machine.turns(blocks));
      const Stream w{blocks, s.K * kInt8FewColumns / cluster, s.base_bytes, at_once};
      Waits waits = s.rows(s.M, staged.bytes > 0, static_cast<double>(depth));
      waits.trips += (s.lora || p.has_bias ? 1 : 0) + (cluster > 1 ? 1 : 0);  // B and the bias; parts
      waits.sums += 1;                                                        // of y
      // w is on its way from L2 while the rows are made, or read behind them.
      const double a = s.total * static_cast<double>(depth);
      const double fetched = (s.M * s.K + a) * s.element + (staged.w ? w.of_block : 0);
      const double turns = machine.turns(blocks, at_once);
      const double of_all = std::max(turns * waits.us(machine, shared_by), machine.l2_us(blocks, fetched, at_once));
      // Blocks of later turns have asked for nothing while those before them make their rows.
      const double both = turns == 1 ? std::max(w.arrived_us(machine), of_all) : w.arrived_us(machine) + of_all;
      const double us = both + (staged.w ? 0 : w.read_us(machine)) + machine.next_launch_us() + s.convert_us(machine);
      if (best.us == 0 || us < kWorthwhile * best.us) best = {us, cluster, staged};
    }
  }
  return best;
}

// Where int8_persistent.cuh may be taken: pairs of 16 bits, on two multiprocessors at least. (The three products of
// fp32 want more registers.)
bool fits_persistent(const Int8LoraLinearProblem& p, const CudaDevice& device) {
  return size_of(p.dtype) == 2 && p.out_features % 2 == 0 && device.multiprocessors >= 2 &&
         device.shared_bytes >= kInt8PersistentBytes;
}

// What its end waits for besides instructions: L2 for a residual, of which half comes beside the other half; and for a
// step of the branch more, which is asked for when the one before is done, four readings one behind the other.
double persistent_waits(const Int8LoraLinearProblem& p, int tile_rows) {
  const double groups = static_cast<double>(p.lora.groups), rows = static_cast<double>(p.rows);
  const double adapters =
      p.lora.groups > 0 ? std::min(static_cast<double>(p.lora.adapters), tile_rows * groups / rows + 1) : 1;
  const double steps = p.lora.present() ? adapters * std::ceil(static_cast<double>(p.lora.max_rank) / 32) : 1;
  return kL2Clocks * ((p.has_residual ? 4 : 0) + 4 * (steps - 1));
}

}  // namespace

Int8Staged fused_staged(const Int8LoraLinearProblem& p, int cluster, Int8Staging staging) {
  if (staging == Int8Staging::kNone) return {};
  const Sizes s(p);
  const int64_t steps = (p.in_features + kInt8Step - 1) / kInt8Step;
  const int64_t depth = (steps + cluster - 1) / cluster * kInt8Step;
  Int8Staged staged = int8_staged(p.rows, p.in_features, s.size, s.norm_size, s.lora ? depth : 0, 2);
  staged.w = staging == Int8Staging::kAll;
  if (staged.w) staged.bytes += depth * kInt8FewColumns;
  return staged;
}

Int8Workspace::Int8Workspace(Workspace& w, const Int8LoraLinearPlan& plan) {
  const Int8LoraLinearProblem& p = plan.problem;
  const CudaInt8LoraLinearPlan& c = plan.cuda;
  const auto size = static_cast<int64_t>(size_of(p.dtype));
  const bool separate = c.path != CudaInt8LoraLinearPath::kFused;
  q_stride = round_up(std::max<int64_t>(p.in_features, 1), 64);
  q = static_cast<int8_t*>(w.take(separate ? p.rows * q_stride : 0));
  scales = static_cast<float*>(w.take(separate ? p.rows * 4 : 0));
  a = w.take(c.convert_a ? p.lora.total_rank * p.in_features * size : 0);
  t = w.take(separate && p.lora.present() ? p.rows * t_stride(p.lora) * size : 0);
  sums = static_cast<int32_t*>(w.take(c.splits > 1 ? c.splits * p.rows * p.out_features * 4 : 0));
  const int64_t lists = p.top_k ? p.rows * ((p.out_features + kTopColumns - 1) / kTopColumns) : 0;
  y = static_cast<float*>(w.take(p.top_k ? p.rows * p.out_features * 4 : 0));
  top_values = static_cast<float*>(w.take(lists * p.top_k * 4));
  top_places = static_cast<int32_t*>(w.take(lists * p.top_k * 4));
  exponents = static_cast<float*>(w.take(p.log_sum ? lists * 2 * 4 : 0));
}

Status supported(const Int8LoraLinearProblem& p, const CudaDevice& device) {
  Refusals refusals;
  refusals.expect_tensor_cores(device, "dtype of x", p.dtype);
  refusals.expect_linear_sizes(p.rows, p.in_features, p.out_features, p.lora);
  if (p.top_k) refusals.expect_at_most("rows of x with top_k", 65535, p.rows);
  return refusals.status("int8_lora_linear",
                         "Convert the operands to a type that is supported, pass fewer rows at a time, or move the "
                         "operands to the CPU, whose kernels take any of it.");
}

void configure(const DeviceInfo& device, Int8LoraLinearPlan* plan) {
  const Int8LoraLinearProblem& p = plan->problem;
  const Machine machine(device.cuda, operations_per_clock(device.cuda.arch));
  const int64_t shared_bytes = device.cuda.shared_bytes > 0 ? device.cuda.shared_bytes : 48 << 10;
  CudaInt8LoraLinearPlan& c = plan->cuda;
  c = {};
  c.arch = device.cuda.arch;
  c.early_start = machine.early;
  const Sizes s(p);
  c.convert_a = s.convert_bytes > 0;

  // Rows: as many multiprocessors as there are, and up to sixteen rows for each. Where there are more blocks two share
  // the memory of one. What does not fit is read from L2, rows in every pass.
  const bool few = p.rows <= kMostFewRows;
  c.rows_of_block = static_cast<int>(std::clamp(std::ceil(s.M / machine.multiprocessors), 1.0, double{kInt8Rows}));
  const double row_blocks = std::ceil(s.M / c.rows_of_block);
  const int passes = p.lora.max_rank <= 16 ? 2 : 4;
  const int64_t room =
      (row_blocks <= machine.multiprocessors ? shared_bytes : (shared_bytes - 1024) / 2) - int8_rows_bytes(passes);
  Int8Staged staged;
  for (const int64_t a_depth : {s.lora ? p.in_features : 0, int64_t{0}}) {
    const Int8Staged one =
        int8_staged(std::min<int64_t>(p.rows, c.rows_of_block), p.in_features, s.size, s.norm_size, a_depth, passes);
    if (staged.bytes == 0 && one.bytes <= room) staged = one;
  }
  const bool has_a = staged.a_row > 0 || !s.lora;
  const double waits_us =
      s.rows(c.rows_of_block, staged.bytes > 0 && has_a, s.K).us(machine, std::min(2.0, machine.turns(row_blocks)));
  // x from memory; all of A from L2 for each block, at once or while it is multiplied.
  const double port_us = machine.l2_us(1, (c.rows_of_block + s.total) * s.K * s.element);
  const double block_us = has_a ? std::max(waits_us, port_us) : waits_us + port_us;
  const double rows_us = std::max(machine.memory_us(s.M * s.K * (s.element + 1) + s.total * s.K * s.element),
                                  machine.turns(row_blocks, 2) * block_us) +
                         s.convert_us(machine);
  const double launch_us = machine.next_launch_us();
  // The branch's products have half of the rate, or in fp32 three products at an eighth, in steps of 64 bytes.
  const double branch =
      static_cast<double>(round_up(static_cast<int64_t>(s.rank), 64 / s.size)) * (s.size == 4 ? 24 : 2);
  HopperWork work{p.rows, p.out_features, s.base_bytes, std::ceil(s.K / 128),
                  kEndInstructions + activation_instructions(p.activation, p.dtype)};
  const auto branch_clocks = [&](double depth) { return 2 * 128 * depth / operations_per_clock(device.cuda.arch); };
  work.branch = branch_clocks(branch);
  const TiledTime tiles = by_mma_on_hopper(
      device.cuda, tiled(machine, p.rows, p.out_features, s.base_bytes, [&](int) { return s.K + branch; }), 1, work);
  c.large_tiles = tiles.large;
  c.predicted_us = tiles.us + rows_us + launch_us;

  const double few_blocks = std::ceil(s.N / kInt8FewColumns), few_bytes = s.K * kInt8FewColumns;
  if (few && p.in_features > 0) {
    double best = 0;
    int best_splits = 1, best_cluster = 1;
    const auto consider = [&](int splits, int cluster) {
      const int parts = splits * cluster;
      if (parts > 1 && p.in_features / kInt8Step < kInt8Warps * parts) return;  // every warp has a step
      const Stream w{few_blocks * parts, few_bytes / parts, s.base_bytes, 2};
      // q and t, or what else was asked for; parts; B and the bias. Sums of the warps.
      const double waits = Waits{cluster > 1 ? 3.0 : 2.0, 1}.us(machine);
      const double arrived = w.arrived_us(machine), read = w.read_us(machine) + waits;
      const double us = (machine.early ? std::max(arrived, rows_us) + read : rows_us + std::max(arrived, read)) +
                        (splits > 1 ? 3 : 2) * launch_us;
      if (best == 0 || us < kWorthwhile * best) best = us, best_splits = splits, best_cluster = cluster;
    };
    for (const int splits : {1, 2, 4, 8, 16}) consider(splits, 1);
    for (const int cluster : {2, 4, 8})
      if (cluster <= most_cluster(device.cuda)) consider(1, cluster);
    if (kWorthwhile * best <= c.predicted_us) {
      c.path = CudaInt8LoraLinearPath::kFewRows;
      c.splits = best_splits;
      c.cluster = best_cluster;
      c.predicted_us = best;
    }
  }
  const Fused fused = fused_of(machine, device.cuda, p, s, shared_bytes);
  if (fused.us > 0 && fused.us <= c.predicted_us) {
    c.path = CudaInt8LoraLinearPath::kFused;
    c.splits = 1;
    c.cluster = fused.cluster;
    c.predicted_us = fused.us;
  }
  // A choice among outputs is made for few rows; the kernel by wgmma has no fp32 y beside another x.
  if (device.cuda.wgmma && p.in_features > 0 && !p.top_k) {
    // The branch stays with mma.sync, in halves of its steps.
    const double halves =
        static_cast<double>(round_up(static_cast<int64_t>(s.rank), 32 / s.size)) * (s.size == 4 ? 24 : 2);
    work.branch = branch_clocks(halves);
    double us = hopper_tiles(device.cuda, {kByWgmma}, work).us;
    int tile_rows = 128;
    work.value =
        kPersistentEnd + (p.has_residual ? kPersistentResidual : 0) + activation_instructions(p.activation, p.dtype);
    if (fits_persistent(p, device.cuda))
      for (const PersistentTile& tile : kPersistent) {
        work.waits = persistent_waits(p, tile.rows);
        const double staying_us = hopper_persistent(device.cuda, tile, work);
        if (staying_us < us) us = staying_us, tile_rows = tile.rows;
      }
    if (us + rows_us + launch_us < c.predicted_us) {
      c.path = CudaInt8LoraLinearPath::kTiled;
      c.large_tiles = true;
      c.wgmma_rows = tile_rows;
      c.resident = tile_rows > 128 ? static_cast<int>(machine.multiprocessors) : 0;
      c.splits = c.cluster = 1;
      c.predicted_us = us + rows_us + launch_us;
    }
  }
  if (c.path != CudaInt8LoraLinearPath::kTiled) c.large_tiles = false;
  if (c.path == CudaInt8LoraLinearPath::kFused) staged = fused.staged;
  c.staged_bytes = static_cast<int>(staged.x_row);
  c.staged_a_bytes = static_cast<int>(staged.a_row);
  c.staged_w = staged.w;
  if (p.top_k) c.predicted_us += machine.memory_us(s.M * s.N * 4) + 2 * launch_us;
  Workspace w;
  const Int8Workspace parts(w, *plan);
  plan->workspace = w.used;
}

bool together(const Int8LoraLinearPlan& plan, const Int8LoraLinearArgs& args, const Int8LoraLinearPlan& other,
              const Int8LoraLinearArgs& other_args) {
  const Int8LoraLinearProblem &p = plan.problem, &q = other.problem;
  const auto alone = [](const Int8LoraLinearPlan& one) {
    return one.cuda.path != CudaInt8LoraLinearPath::kFused || one.workspace > 0 || one.problem.has_residual ||
           one.problem.top_k > 0 || one.cuda.arch == 0;
  };
  if (alone(plan) || alone(other)) return false;
  if (p.rows != q.rows || p.in_features != q.in_features || p.out_features != q.out_features || p.dtype != q.dtype ||
      plan.cuda.cluster != other.cuda.cluster)
    return false;
  const auto size = static_cast<int64_t>(size_of(p.dtype));
  const auto apart = [](const void* a, int64_t a_bytes, const void* b, int64_t b_bytes) {
    const auto from = reinterpret_cast<uintptr_t>(a), to = reinterpret_cast<uintptr_t>(b);
    return from + static_cast<uintptr_t>(a_bytes) <= to || to + static_cast<uintptr_t>(b_bytes) <= from;
  };
  const int64_t y_bytes = p.rows * p.out_features * size;
  const int64_t x_bytes = ((p.rows - 1) * args.x_stride + p.in_features) * size;
  return args.x == other_args.x && args.x_stride == other_args.x_stride &&
         apart(args.y, y_bytes, other_args.y, y_bytes) && apart(args.x, x_bytes, args.y, y_bytes) &&
         apart(args.x, x_bytes, other_args.y, y_bytes);
}

void configure_mma(const DeviceInfo& device, Int8LoraLinearPlan* plan) { configure(without_wgmma(device), plan); }

}  // namespace lora_kernels::cuda

namespace lora_kernels {

std::string to_string(const CudaInt8LoraLinearPlan& c) {
  std::ostringstream text;
  text << "cuda sm_" << c.arch << " "
       << (c.path == CudaInt8LoraLinearPath::kTiled     ? "tiled"
           : c.path == CudaInt8LoraLinearPath::kFewRows ? "few_rows"
                                                        : "fused");
  if (c.wgmma_rows)
    text << " wgmma tile=" << c.wgmma_rows << "x128";
  else if (c.path == CudaInt8LoraLinearPath::kTiled)
    text << " tile=" << (c.large_tiles ? "128x128" : "64x64");
  text << " splits=" << c.splits;
  if (c.cluster > 1) text << " cluster=" << c.cluster;
  text << (c.staged_w       ? " staged_all"
           : c.staged_bytes ? " staged"
                            : "")
       << (c.early_start ? " early_start" : "") << (c.convert_a ? " convert_a" : "");
  char predicted[32];
  std::snprintf(predicted, sizeof predicted, " predicted=%.1fus", c.predicted_us);
  text << predicted;
  return text.str();
}

}  // namespace lora_kernels
