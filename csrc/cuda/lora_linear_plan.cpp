// Which kernels a lora_linear takes on a CUDA device: pure functions of the problem and of what the device says of
// itself. Times are predicted from bytes and FLOPs, in microseconds; they order the paths, and nothing has measured
// them.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <sstream>

#include "cuda/lora_linear.h"
#include "cuda/machine_hopper.h"
#include "cuda/refusals.h"

namespace lora_kernels::cuda {
namespace {

constexpr double kStepBytes = 64, kStepsOfSplit = 8;  // of depth; every warp of a block has one
constexpr int64_t kMostFewRows = 32;                  // four products of eight columns for each fragment of W
constexpr int64_t kMostInTileRank = 32;               // registers beside the base's sums (kInTileRank of gemm.cuh)
constexpr int64_t kMostRankInBlocks = 16;             // rows of one product
constexpr int64_t kMostRankBeside = 16;               // of t in half the registers (down_beside of skinny.cuh)

// FLOPs of one multiprocessor per clock, 16 bits into fp32, through mma.sync. On sm_90 that is about 60 % of what wgmma
// reaches. Unknown ones are taken for the slowest: a path that needs less arithmetic then wins, and all work.
double flops_per_clock(int arch) {
  switch (arch) {
    case 80: return 2048;
    case 90: return 2540;
    case 100: return 2048;
    default: return 1024;  // 75, 86, 89, 120
  }
}

Machine machine_of(const CudaDevice& d, DType type, bool allow_tf32) {
  // tf32 at half the rate of 16 bits; three products
  const double slower = type != DType::kFloat32 ? 1 : allow_tf32 ? 2 : 6;
  return {d, flops_per_clock(d.arch) / slower};
}

// Tiles of gemm_wgmma.cuh. Of a step two warpgroups read 64 rows of a each and all of b.
constexpr HopperTile kWideByWgmma = {256, 1, 2, 16384.0 + 2 * 32768}, kNarrowByWgmma = {128, 2, 2, 16384.0 + 2 * 16384};
// Instructions of a tile's end for each value, by the machine code: by way of shared memory to y, with a bias.
constexpr double kEndInstructions = 25;

HopperWork work_on_hopper(int64_t rows, int64_t columns, double bytes, double depth, DType type,
                          Activation activation) {
  return {rows, columns, bytes, depth / 64, kEndInstructions + activation_instructions(activation, type)};
}

// Tiles by wgmma; none without it, or in fp32. What the mask of a gradient costs is in no prediction, by wgmma as
// little as by mma.sync.
HopperTime wgmma_of(const CudaDevice& device, DType type, int64_t rows, int64_t columns, double bytes, double depth,
                    Activation activation, bool narrow = false) {
  if (!device.wgmma || type == DType::kFloat32) return {0, 0};
  const HopperWork work = work_on_hopper(rows, columns, bytes, depth, type, activation);
  if (narrow) return hopper_tiles(device, {kNarrowByWgmma}, work);
  return hopper_tiles(device, {kWideByWgmma, kNarrowByWgmma}, work);
}

int parts_of_rows(const Machine& machine, int64_t blocks, int64_t rows) {
  // Two blocks for each multiprocessor, of at least 256 rows each: fewer would read and add parts for nothing.
  const int64_t wanted = blocks > 0 ? static_cast<int64_t>(2 * machine.multiprocessors) / blocks : 1;
  return static_cast<int>(std::max<int64_t>(1, std::min({wanted, rows / 256, int64_t{64}})));
}

// u and dB from one reading of dy, or from one each. The kernels apart read dy twice, and from L2 the second time where
// it fits; together they write and read parts of both instead, and save a launch. Both ways multiply as much, which up
// to 32 ranks takes less time than memory does but for fp32 on the fastest memories: apart is better where dy stays in
// L2 and the parts are as large. Not for several adapters: a block would meet them in every order of rows, and rank
// rows of all of them do not fit its registers.
struct Readings {
  bool once = false;
  int row_tiles = 1, row_splits = 1, column_splits = 1;
  double us = 0;
};
Readings readings_of_dy(const Machine& machine, const LoraLinearProblem& p, int64_t shared_bytes, int64_t l2_bytes) {
  constexpr int64_t kTile = 64, kMostTiles = 8;
  const double size = static_cast<double>(size_of(p.dtype)), M = static_cast<double>(p.rows),
               N = static_cast<double>(p.out_features), R = static_cast<double>(p.lora.total_rank);
  const double dy_us = machine.memory_us(M * N * size);
  const double second_us = dy_us / (M * N * size < 0.5 * static_cast<double>(l2_bytes) ? kL2 : 1.0);
  // Products of sixteen or 32 ranks, of which each result is one.
  const double width = static_cast<double>(t_stride(p.lora));
  const double products_us = 4 * M * N * width / (machine.multiprocessors * machine.operations * kSmallTiles) * 1e6;
  Readings r;
  const double launch_us = machine.next_launch_us();
  r.us = std::max(dy_us + second_us, products_us) + 3 * launch_us;
  const int64_t stages = p.dtype == DType::kFloat32 ? 2 : 3;
  const int64_t staged = stages * 64 * (64 + 32 + 32) * static_cast<int64_t>(size_of(p.dtype));
  const int64_t left = (shared_bytes > 0 ? shared_bytes : 48 << 10) - staged;
  const int64_t tile_bytes = kTile * t_stride(p.lora) * 4;
  if (p.lora.adapters != 1 || p.lora.max_rank > 32 || p.rows == 0 || p.out_features == 0 || left < tile_bytes) return r;
  // As many rows in a block as fit, since dB is written once for each block of rows; columns then give the blocks, two
  // for each multiprocessor.
  const int64_t rows = (p.rows + kTile - 1) / kTile, columns = (p.out_features + kTile - 1) / kTile;
  const int64_t tiles = std::min({rows, kMostTiles, left / tile_bytes}), row_splits = (rows + tiles - 1) / tiles;
  const auto wanted = static_cast<int64_t>(2 * machine.multiprocessors) / row_splits;
  const int64_t column_splits = std::max<int64_t>(1, std::min(columns, wanted));
  const double parts = (static_cast<double>(column_splits) * M * width + static_cast<double>(row_splits) * R * N) * 4;
  const double us = std::max(dy_us + machine.memory_us(2 * parts), products_us) + 2 * launch_us;
  if (us >= r.us || row_splits > kMostGridY) return r;
  return {true, static_cast<int>(tiles), static_cast<int>(row_splits), static_cast<int>(column_splits), us};
}

}  // namespace

int64_t t_stride(const LoraShape& lora) { return round_up(std::max<int64_t>(lora.max_rank, 1), 16); }

ForwardWorkspace::ForwardWorkspace(Workspace& w, const LoraLinearPlan& plan) {
  const LoraLinearProblem& p = plan.problem;
  const auto size = static_cast<int64_t>(size_of(p.dtype));
  const bool separate = plan.cuda.path == CudaLoraLinearPath::kTwoSteps ||
                        (plan.cuda.path == CudaLoraLinearPath::kFewRows && !plan.cuda.t_in_blocks);
  a = w.take(plan.cuda.convert_a ? p.lora.total_rank * p.in_features * size : 0);
  t = w.take(separate && p.lora.present() && !p.keeps_t ? p.rows * t_stride(p.lora) * size : 0);
  sums = static_cast<float*>(w.take(plan.cuda.splits > 1 ? plan.cuda.splits * p.rows * p.out_features * 4 : 0));
}

BackwardWorkspace::BackwardWorkspace(Workspace& w, const LoraLinearBackwardPlan& plan) {
  const LoraLinearProblem& p = plan.problem.forward;
  const auto size = static_cast<int64_t>(size_of(p.dtype));
  const bool lora = p.lora.present() && (plan.problem.needs_dx || plan.problem.needs_dlora);
  const bool convert_a = lora && p.lora.dtype != p.dtype, factors = lora && plan.problem.needs_dlora;
  const auto parts = [&](bool wanted, int splits, int64_t rows, int64_t columns) {
    return static_cast<float*>(w.take(wanted && splits > 1 ? splits * rows * columns * 4 : 0));
  };
  void* converted = w.take(convert_a ? p.lora.total_rank * p.in_features * size : 0);
  a = convert_a ? converted : nullptr;
  b = w.take(lora ? p.lora.total_rank * p.out_features * size : 0);
  t = w.take(factors && !t_is_there(plan.problem) ? p.rows * t_stride(p.lora) * size : 0);
  u = w.take(lora ? p.rows * t_stride(p.lora) * size : 0);
  const bool once = factors && plan.cuda.dy_once;
  u_parts = static_cast<float*>(w.take(once ? plan.cuda.column_splits * p.rows * t_stride(p.lora) * 4 : 0));
  b_parts = static_cast<float*>(w.take(once ? plan.cuda.row_splits * p.lora.total_rank * p.out_features * 4 : 0));
  a_sums = parts(factors, plan.cuda.a_splits, p.lora.total_rank, p.in_features);
  b_sums = parts(factors && !once, plan.cuda.b_splits, p.lora.total_rank, p.out_features);
  w_sums = parts(plan.problem.needs_dweight, plan.cuda.w_splits, p.out_features, p.in_features);
}

Status supported(const LoraLinearProblem& p, const CudaDevice& device) {
  Refusals refusals;
  refusals.expect_tensor_cores(device, "dtype", p.dtype);
  refusals.expect_linear_sizes(p.rows, p.in_features, p.out_features, p.lora);
  return refusals.status("lora_linear",
                         "Convert the operands to a type that is supported, move them to the CPU, whose kernels take "
                         "any of it, or use the eager formula of lora_kernels.reference.");
}

void configure(const DeviceInfo& device, LoraLinearPlan* plan) {
  const LoraLinearProblem& p = plan->problem;
  const Machine machine = machine_of(device.cuda, p.dtype, p.allow_tf32);
  CudaLoraLinearPlan& c = plan->cuda;
  c = {};
  c.arch = device.cuda.arch;
  c.early_start = machine.early;
  const bool lora = p.lora.present() && p.in_features > 0;
  const double size = static_cast<double>(size_of(p.dtype)), M = static_cast<double>(p.rows);
  const double K = static_cast<double>(p.in_features), N = static_cast<double>(p.out_features);
  const double rank = lora ? static_cast<double>(p.lora.max_rank) : 0,
               total = lora ? static_cast<double>(p.lora.total_rank) : 0;
  // B counts wherever it is read; A where t is made.
  const double base_bytes = (N * K + M * K + M * N * (p.has_residual ? 2 : 1) + total * N) * size;
  c.convert_a = lora && p.lora.dtype != p.dtype;
  const double convert_us = c.convert_a ? kLaunchUs + machine.memory_us(2 * total * K * size) : 0;
  // t reads x once, and once more from L2 for every 32 ranks beyond the first.
  const double down_bytes = (M * K + total * K) * size;
  const double down_us = lora ? machine.memory_us(down_bytes) + machine.next_launch_us() + convert_us : 0;

  // Two large tiles share a multiprocessor, but for those that make t.
  const auto on_hopper = [&](TiledTime time, int together, double bytes, double depth) {
    if (p.dtype == DType::kFloat32) return time;
    return by_mma_on_hopper(device.cuda, time, together,
                            work_on_hopper(p.rows, p.out_features, bytes, depth, p.dtype, p.activation));
  };
  const TiledTime two = on_hopper(tiled(machine, p.rows, p.out_features, base_bytes, [&](int) { return K + rank; }), 2,
                                  base_bytes, K + rank);
  c.path = lora ? CudaLoraLinearPath::kTwoSteps : CudaLoraLinearPath::kBase;
  c.large_tiles = two.large;
  c.predicted_us = two.us + down_us;
  const double wgmma_depth = K + (lora ? static_cast<double>(round_up(p.lora.max_rank, 16)) : 0);
  HopperTime wgmma = wgmma_of(device.cuda, p.dtype, p.rows, p.out_features, base_bytes, wgmma_depth, p.activation);
  wgmma.us += down_us;
  // Two blocks of the kernel that makes t leave a multiprocessor room for a tile of 128 columns, which starts beside
  // them: both share the memory's time, and the tile's arithmetic goes on under it.
  int t_blocks = 0;
  // Few rows with many adapters: the kernel apart gives each of them blocks of its own.
  const bool shared_out = p.lora.groups > 0 && p.rows <= 8 * 16;
  if (lora && !shared_out && p.lora.max_rank <= kMostRankBeside && p.dropout_p == 0) {
    HopperTime beside = wgmma_of(device.cuda, p.dtype, p.rows, p.out_features, base_bytes + down_bytes, wgmma_depth,
                                 p.activation, true);
    beside.us += machine.next_launch_us() + convert_us;
    if (beside.columns && beside.us < wgmma.us) {
      wgmma = beside;
      t_blocks = 2 * static_cast<int>(machine.multiprocessors);
    }
  }

  if (lora && p.lora.adapters == 1 && p.lora.max_rank <= kMostInTileRank && p.dropout_p == 0 && !c.convert_a &&
      !p.keeps_t) {
    const double made = rank <= 16 ? 16 : 32;
    const double bytes = base_bytes + total * K * size;
    const auto depth_of = [&](int tile) { return K * (1 + made / tile) + rank; };
    const TiledTime in_tile =
        on_hopper(tiled(machine, p.rows, p.out_features, bytes, depth_of), 1, bytes, depth_of(128));
    if (in_tile.us < c.predicted_us) {
      c.path = CudaLoraLinearPath::kInTile;
      c.large_tiles = in_tile.large;
      c.predicted_us = in_tile.us;
    }
  }
  if (p.rows <= kMostFewRows && p.in_features > 0) {
    // W, which every block asks for at once, from memory; and what comes to a multiprocessor, from memory or L2: W, x,
    // and so many ranks of A.
    const double blocks = std::ceil(N / 16);
    const auto streams_us = [&](int splits, double ranks) {
      const double depth = K * size / splits, all = blocks * splits;
      const double asked = std::min(all, 2 * machine.multiprocessors) * 16 * depth;
      const double memory_us = machine.memory_us(base_bytes) / std::min(1.0, asked / (machine.bytes * kLatencySeconds));
      return std::max(memory_us, machine.l2_us(all, (16 + M + ranks) * depth, 2)) + (splits > 1 ? 2 : 1) * kLaunchUs;
    };
    double us = streams_us(1, 0);
    int splits = 1;
    for (const int parts : {2, 4, 8, 16}) {
      if (K * size / kStepBytes < kStepsOfSplit * parts) break;
      if (streams_us(parts, 0) < us) us = streams_us(parts, 0), splits = parts;
    }
    // t in every block, or in each of a cluster a part of it, while W comes from memory. What is left is a sum over the
    // block.
    const bool one = lora && p.lora.adapters == 1 && p.lora.total_rank <= kMostRankInBlocks && p.dropout_p == 0 &&
                     !c.convert_a && !p.keeps_t;
    int cluster = 1;
    double with_t = 0;
    for (const int together : {1, 2, 4, 8}) {
      if (!one || together > most_cluster(device.cuda)) break;
      const double one_us = streams_us(1, total / together) + kBlockSum / machine.clock * 1e6;
      if (with_t == 0 || one_us < kWorthwhile * with_t) with_t = one_us, cluster = together;
    }
    const bool t_in_blocks = with_t > 0 && with_t < us + down_us;
    us = t_in_blocks ? with_t : us + down_us;
    if (us <= c.predicted_us) {
      c.path = CudaLoraLinearPath::kFewRows;
      c.large_tiles = false;
      c.splits = t_in_blocks ? 1 : splits;
      c.t_in_blocks = t_in_blocks;
      c.cluster = t_in_blocks ? cluster : 1;
      c.predicted_us = us;
    }
  }
  if (wgmma.columns && wgmma.us < c.predicted_us) {
    c.path = lora ? CudaLoraLinearPath::kTwoSteps : CudaLoraLinearPath::kBase;
    c.wgmma_columns = wgmma.columns;
    c.t_blocks = t_blocks;
    c.large_tiles = true;
    c.splits = c.cluster = 1;
    c.t_in_blocks = false;
    c.predicted_us = wgmma.us;
  }
  c.tile_rows = c.large_tiles ? 128 : 64;
  c.tile_columns = c.wgmma_columns ? c.wgmma_columns : c.tile_rows;
  if (c.path == CudaLoraLinearPath::kFewRows) {
    c.tile_rows = static_cast<int>(round_up(std::max<int64_t>(p.rows, 1), 8));
    c.tile_columns = 16;
  }
  c.early_start = c.early_start && lora && c.path != CudaLoraLinearPath::kInTile && !c.t_in_blocks;
  Workspace w;
  ForwardWorkspace(w, *plan);
  plan->workspace = w.used;
}

void configure_mma(const DeviceInfo& device, LoraLinearPlan* plan) { configure(without_wgmma(device), plan); }

void configure_backward(const DeviceInfo& device, LoraLinearBackwardPlan* plan) {
  const LoraLinearBackwardProblem& b = plan->problem;
  const LoraLinearProblem& p = b.forward;
  const Machine machine = machine_of(device.cuda, p.dtype, p.allow_tf32);
  CudaLoraLinearBackwardPlan& c = plan->cuda;
  c = {};
  c.arch = device.cuda.arch;
  c.early_start = machine.early;
  const double size = static_cast<double>(size_of(p.dtype)), M = static_cast<double>(p.rows);
  const double K = static_cast<double>(p.in_features), N = static_cast<double>(p.out_features);
  const bool lora = p.lora.present();
  const double rank = lora ? static_cast<double>(p.lora.max_rank) : 0;
  const double dx_bytes = (N * K + M * (K + N)) * size;
  TiledTime dx = tiled(machine, p.rows, p.in_features, dx_bytes, [&](int) { return N + rank; });
  if (p.dtype != DType::kFloat32)
    dx = by_mma_on_hopper(device.cuda, dx, 2,
                          work_on_hopper(p.rows, p.in_features, dx_bytes, N + rank, p.dtype, Activation::kNone));
  const double wgmma_depth = N + (lora ? static_cast<double>(round_up(p.lora.max_rank, 16)) : 0);
  const HopperTime wgmma =
      wgmma_of(device.cuda, p.dtype, p.rows, p.in_features, dx_bytes, wgmma_depth, Activation::kNone);
  const bool by_wgmma = b.needs_dx && wgmma.columns && wgmma.us < dx.us;
  c.wgmma_columns = by_wgmma ? wgmma.columns : 0;
  c.large_tiles = by_wgmma || dx.large;
  const int64_t small_a = (p.in_features + 63) / 64, small_b = (p.out_features + 63) / 64;
  const int64_t factors = std::max<int64_t>(1, p.lora.adapters) * ((std::max<int64_t>(1, p.lora.max_rank) + 63) / 64);
  c.a_splits = parts_of_rows(machine, small_a * factors, p.rows);
  c.b_splits = parts_of_rows(machine, small_b * factors, p.rows);
  c.w_splits = parts_of_rows(machine, ((p.out_features + 127) / 128) * ((p.in_features + 127) / 128), p.rows);
  // All but the first kernel of a call start early.
  const double launch_us = machine.next_launch_us();
  if (b.needs_dx) c.predicted_us += (by_wgmma ? wgmma.us : dx.us) + (lora ? launch_us - kLaunchUs : 0);
  if (lora && p.lora.dtype != p.dtype && (b.needs_dx || b.needs_dlora))  // A's conversion
    c.predicted_us += machine.memory_us(2 * static_cast<double>(p.lora.total_rank) * K * size) + launch_us;
  if (lora && b.needs_dlora) {
    const Readings r = readings_of_dy(machine, p, device.cuda.shared_bytes, device.cuda.l2_bytes);
    c.dy_once = r.once;
    c.row_tiles = r.row_tiles;
    c.row_splits = r.row_splits;
    c.column_splits = r.column_splits;
    // B's conversion, u and dB; dA; t, unless the forward pass has handed it over.
    c.predicted_us += r.us + machine.memory_us(M * K * size) + kLaunchUs + 2 * launch_us;
    if (!t_is_there(b)) c.predicted_us += machine.memory_us(M * K * size) + launch_us;
  } else if (lora && b.needs_dx) {
    c.predicted_us += machine.memory_us(M * N * size) + kLaunchUs + launch_us;
  }
  const double behind_us = lora || b.needs_dx ? launch_us : kLaunchUs;
  if (b.needs_dweight)
    c.predicted_us +=
        tiled(machine, p.out_features, p.in_features, (M * (K + N)) * size + 4 * N * K, [&](int) { return M; }).us +
        behind_us - kLaunchUs;
  if (b.needs_dbias) c.predicted_us += machine.memory_us(M * N * size) + (b.needs_dweight ? launch_us : behind_us);
  Workspace w;
  BackwardWorkspace(w, *plan);
  plan->workspace = w.used;
}

void configure_backward_mma(const DeviceInfo& device, LoraLinearBackwardPlan* plan) {
  configure_backward(without_wgmma(device), plan);
}

}  // namespace lora_kernels::cuda

namespace lora_kernels {

std::string to_string(const CudaLoraLinearPlan& c) {
  std::ostringstream text;
  text << "cuda sm_" << c.arch << " "
       << (c.path == CudaLoraLinearPath::kBase       ? "base"
           : c.path == CudaLoraLinearPath::kTwoSteps ? "two_steps"
           : c.path == CudaLoraLinearPath::kInTile   ? "in_tile"
                                                     : "few_rows")
       << (c.wgmma_columns ? " wgmma" : "") << " tile=" << c.tile_rows << "x" << c.tile_columns
       << " splits=" << c.splits << (c.t_in_blocks ? " t_in_blocks" : "")
       << (c.cluster > 1 ? " cluster=" + std::to_string(c.cluster) : "")
       << (c.t_blocks ? " t_blocks=" + std::to_string(c.t_blocks) : "") << (c.early_start ? " early_start" : "")
       << (c.convert_a ? " convert_a" : "");
  char predicted[32];
  std::snprintf(predicted, sizeof predicted, " predicted=%.1fus", c.predicted_us);
  text << predicted;
  return text.str();
}

std::string to_string(const CudaLoraLinearBackwardPlan& c) {
  std::ostringstream text;
  const int tile = c.large_tiles ? 128 : 64;
  text << "sm_" << c.arch << (c.wgmma_columns ? " wgmma" : "") << " dx_tile=" << tile << "x"
       << (c.wgmma_columns ? c.wgmma_columns : tile) << " splits=" << c.a_splits << "," << c.b_splits << ","
       << c.w_splits << (c.early_start ? " early_start" : "");
  if (c.dy_once) text << " dy_once=" << c.row_splits << "x" << c.column_splits;
  char predicted[32];
  std::snprintf(predicted, sizeof predicted, " predicted=%.1fus", c.predicted_us);
  text << predicted;
  return text.str();
}

}  // namespace lora_kernels
