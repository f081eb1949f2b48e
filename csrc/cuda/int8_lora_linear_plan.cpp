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

// A row waits for its maximum before it is quantized, and t for its parts: what that takes besides bytes.
constexpr double kPassesUs = 1.5;

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

// Tiles of int8_wgmma.cuh. Of a step two warpgroups read its 16 KB of q for each 64 channels, and lanes w once.
constexpr HopperTile kWideByWgmma = {256, 1, 2, (4 + 2) * 16384.0}, kNarrowByWgmma = {128, 2, 2, (2 + 1) * 16384.0};
// Instructions of a tile's end for each value, by the machine code for 16 bits: conversion 5, by way of shared memory
// to y 10, what a step of the branch takes besides its products 5.
constexpr double kEndInstructions = 20;

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

}  // namespace

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
  const bool lora = p.lora.present() && p.in_features > 0;
  const auto size = static_cast<int64_t>(size_of(p.dtype));
  const double M = static_cast<double>(p.rows), K = static_cast<double>(p.in_features);
  const double N = static_cast<double>(p.out_features), element = static_cast<double>(size);
  const double rank = lora ? static_cast<double>(p.lora.max_rank) : 0,
               total = lora ? static_cast<double>(p.lora.total_rank) : 0;
  const double y_size = p.top_k ? 4 : element;
  const double base_bytes = N * K + M * K + M * N * y_size * (p.has_residual ? 2 : 1) + total * N * element;
  c.convert_a = lora && p.lora.dtype != p.dtype;
  const double convert_us = c.convert_a ? kLaunchUs + machine.memory_us(2 * total * K * element) : 0;

  // Two blocks share a multiprocessor's memory; rows that are wider are read again, from L2.
  const int64_t row = int8_shared_row(p.in_features * size);
  c.staged_bytes = kInt8Rows * row + int8_rows_bytes(4) <= (shared_bytes - 1024) / 2 ? static_cast<int>(row) : 0;

  // The rows: x from memory, and for each sixteen of them all of A from L2, by one multiprocessor.
  const double own_bytes = (std::min(M, 16.0) + total) * K * element;
  const double block_us = kPassesUs + machine.l2_us(1, own_bytes);
  const double rows_us = std::max(machine.memory_us(M * K * (element + 1) + total * K * element),
                                  machine.turns((M + 15) / 16, 2) * block_us) +
                         convert_us;
  const double launch_us = machine.next_launch_us();
  // The branch's products have half of the rate, or in fp32 three products at an eighth, in steps of 64 bytes.
  const double branch = static_cast<double>(round_up(static_cast<int64_t>(rank), 64 / size)) * (size == 4 ? 24 : 2);
  HopperWork work{p.rows, p.out_features, base_bytes, std::ceil(K / 128),
                  kEndInstructions + activation_instructions(p.activation)};
  const auto branch_clocks = [&](double depth) { return 2 * 128 * depth / operations_per_clock(device.cuda.arch); };
  work.branch = branch_clocks(branch);
  const TiledTime tiles = by_mma_on_hopper(
      device.cuda, tiled(machine, p.rows, p.out_features, base_bytes, [&](int) { return K + branch; }), 1, work);
  c.large_tiles = tiles.large;
  c.predicted_us = tiles.us + rows_us + launch_us;

  const double few_blocks = (N + kInt8FewColumns - 1) / kInt8FewColumns, few_bytes = K * kInt8FewColumns;
  if (p.rows <= kMostFewRows && p.in_features > 0) {
    double best = 0;
    int best_splits = 0;
    for (const int splits : {1, 2, 4, 8, 16}) {
      if (splits > 1 && p.in_features / kInt8Step < kInt8Warps * splits) break;  // every warp has a step
      const Stream w{few_blocks * splits, few_bytes / splits, base_bytes, 2};
      const double arrived = w.arrived_us(machine), read = w.read_us(machine);
      const double us = (machine.early ? std::max(arrived, rows_us) + read : rows_us + std::max(arrived, read)) +
                        (splits > 1 ? 3 : 2) * launch_us;
      if (best_splits == 0 || us < kWorthwhile * best) best = us, best_splits = splits;
    }
    if (kWorthwhile * best <= c.predicted_us) {
      c.path = CudaInt8LoraLinearPath::kFewRows;
      c.splits = best_splits;
      c.predicted_us = best;
    }
  }
  const int64_t fused_bytes = int8_fused_bytes(p.in_features, t_stride(p.lora), size);
  if (p.rows <= kInt8Rows && p.in_features > 0 && fused_bytes <= shared_bytes) {
    const Stream w{few_blocks, few_bytes, base_bytes, fused_bytes <= shared_bytes / 2 ? 2.0 : 1.0};
    const double rows_of_all =
        machine.turns(w.blocks, w.at_once) * kPassesUs + machine.l2_us(w.blocks, own_bytes, w.at_once);
    // Blocks of later turns have asked for nothing while those before them make their rows.
    const bool one_turn = machine.turns(w.blocks, w.at_once) == 1;
    const double both = one_turn ? std::max(w.arrived_us(machine), rows_of_all) : w.arrived_us(machine) + rows_of_all;
    const double us = both + w.read_us(machine) + launch_us + convert_us;
    if (us <= c.predicted_us) {
      c.path = CudaInt8LoraLinearPath::kFused;
      c.splits = 1;
      c.predicted_us = us;
    }
  }
  // A choice among outputs is made for few rows; the kernel by wgmma has no fp32 y beside another x.
  if (device.cuda.wgmma && p.in_features > 0 && !p.top_k) {
    // The branch stays with mma.sync, in halves of its steps.
    const double halves = static_cast<double>(round_up(static_cast<int64_t>(rank), 32 / size)) * (size == 4 ? 24 : 2);
    work.branch = branch_clocks(halves);
    const HopperTime wgmma = hopper_tiles(device.cuda, {kWideByWgmma, kNarrowByWgmma}, work);
    if (wgmma.us + rows_us + launch_us < c.predicted_us) {
      c.path = CudaInt8LoraLinearPath::kTiled;
      c.large_tiles = true;
      c.wgmma_columns = wgmma.columns;
      c.splits = 1;
      c.predicted_us = wgmma.us + rows_us + launch_us;
    }
  }
  if (c.path != CudaInt8LoraLinearPath::kTiled) c.large_tiles = false;
  if (p.top_k) c.predicted_us += machine.memory_us(M * N * 4) + 2 * launch_us;
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
  if (p.rows != q.rows || p.in_features != q.in_features || p.out_features != q.out_features || p.dtype != q.dtype)
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
  if (c.wgmma_columns)
    text << " wgmma tile=128x" << c.wgmma_columns;
  else if (c.path == CudaInt8LoraLinearPath::kTiled)
    text << " tile=" << (c.large_tiles ? "128x128" : "64x64");
  text << " splits=" << c.splits << (c.staged_bytes ? " staged" : "") << (c.early_start ? " early_start" : "")
       << (c.convert_a ? " convert_a" : "");
  char predicted[32];
  std::snprintf(predicted, sizeof predicted, " predicted=%.1fus", c.predicted_us);
  text << predicted;
  return text.str();
}

}  // namespace lora_kernels
