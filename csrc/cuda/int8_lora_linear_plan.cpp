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

// What one multiprocessor gets of L2: 64 bytes per clock at best. A row waits for its maximum before it is quantized,
// and for the launch of the passes between: what that takes besides bytes.
constexpr double kBytesOfOne = 50e9, kPassesUs = 1.5;

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
  const double block_us = kPassesUs + own_bytes / kBytesOfOne * 1e6;
  const double rows_us = std::max(machine.memory_us(M * K * (element + 1) + total * K * element),
                                  machine.turns((M + 15) / 16, 2) * block_us) +
                         machine.next_launch_us() + convert_us;
  // The branch's products have half of the rate, or in fp32 three products at an eighth, in steps of 64 bytes.
  const double branch = static_cast<double>(round_up(static_cast<int64_t>(rank), 64 / size)) * (size == 4 ? 24 : 2);
  HopperWork work{p.rows, p.out_features, base_bytes, std::ceil(K / 128),
                  kEndInstructions + activation_instructions(p.activation)};
  const auto branch_clocks = [&](double depth) { return 2 * 128 * depth / operations_per_clock(device.cuda.arch); };
  work.branch = branch_clocks(branch);
  const TiledTime tiles = by_mma_on_hopper(
      device.cuda, tiled(machine, p.rows, p.out_features, base_bytes, [&](int) { return K + branch; }), 1, work);
  c.large_tiles = tiles.large;
  c.predicted_us = tiles.us + rows_us;

  if (p.rows <= kMostFewRows && p.in_features > 0) {
    double us = 0;
    const int splits = few_rows_splits(machine, (p.out_features + 31) / 32, p.in_features, base_bytes, &us);
    us += kLaunchUs + rows_us;
    if (us <= c.predicted_us) {
      c.path = CudaInt8LoraLinearPath::kFewRows;
      c.splits = splits;
      c.predicted_us = us;
    }
  }
  const int64_t fused_bytes = int8_fused_bytes(p.in_features, t_stride(p.lora), size);
  if (p.rows <= kInt8Rows && p.in_features > 0 && fused_bytes <= shared_bytes) {
    const double blocks = (N + 31) / 32, together = fused_bytes <= shared_bytes / 2 ? 2 : 1;
    const double us = std::max(machine.memory_us(base_bytes), machine.memory_us(blocks * own_bytes) / kL2) +
                      machine.turns(blocks, together) * block_us + kLaunchUs + convert_us;
    if (us <= c.predicted_us) {
      c.path = CudaInt8LoraLinearPath::kFused;
      c.splits = 1;
      c.predicted_us = us;
      c.early_start = false;
    }
  }
  // A choice among outputs is made for few rows; the kernel by wgmma has no fp32 y beside another x.
  if (device.cuda.wgmma && p.in_features > 0 && !p.top_k) {
    // The branch stays with mma.sync, in halves of its steps.
    const double halves = static_cast<double>(round_up(static_cast<int64_t>(rank), 32 / size)) * (size == 4 ? 24 : 2);
    work.branch = branch_clocks(halves);
    const HopperTime wgmma = hopper_tiles(device.cuda, {kWideByWgmma, kNarrowByWgmma}, work);
    if (wgmma.us + rows_us < c.predicted_us) {
      c.path = CudaInt8LoraLinearPath::kTiled;
      c.large_tiles = true;
      c.wgmma_columns = wgmma.columns;
      c.splits = 1;
      c.early_start = machine.early;
      c.predicted_us = wgmma.us + rows_us;
    }
  }
  if (c.path != CudaInt8LoraLinearPath::kTiled) c.large_tiles = false;
  if (p.top_k) c.predicted_us += machine.memory_us(M * N * 4) + 2 * kLaunchUs;
  Workspace w;
  const Int8Workspace parts(w, *plan);
  plan->workspace = w.used;
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
