// What a kv_relative_step needs of a CUDA device, and what it is predicted to take: nothing has measured it.
#include <algorithm>
#include <climits>
#include <cstdio>

#include "cuda/kv_relative_step.h"
#include "cuda/kv_shapes.h"
#include "cuda/machine.h"
#include "cuda/refusals.h"

namespace lora_kernels::cuda {
namespace {

// A block begins by finding its row and queries, and ends by adding up its warps: microseconds besides its bytes.
constexpr double kEdgesUs = 2.0;
// Blocks that share a multiprocessor, by their registers.
constexpr double kResident = 2;
// Of what a warp's registers hold of K, V and P, the part that is on its way at any time.
constexpr double kOnItsWay = 0.5;

double bytes_of(DType type) { return static_cast<double>(size_of(type)); }

}  // namespace

Status supported(const KvRelativeStepProblem& p, const CudaDevice& device) {
  Refusals refusals;
  refusals.expect_tensor_cores(device, "q", p.dtype);
  if (p.cache_dtype != p.dtype && p.dtype != DType::kFloat32)
    refusals.add(std::string("k_cache, v_cache: expected ") + name_of(p.dtype) + ", as q is, got " +
                 name_of(p.cache_dtype));
  refusals.expect_at_most("head size", kKvMostHeadSize, p.head_size);
  refusals.expect_at_most("capacity", INT_MAX / 4, p.capacity);
  refusals.expect_at_most("left", INT_MAX / 4, p.left);
  refusals.expect_attention_sizes(p.rows, p.tokens, p.heads, p.cache_rows);
  if (refusals.none())
    refusals.expect_at_most("rows of q times tokens times heads", INT_MAX / 4, p.rows * p.tokens * p.heads);
  return refusals.status(
      "kv_relative_step",
      "Convert the operands to what is supported, or move them to the CPU, whose kernels take any of it.");
}

void configure(const DeviceInfo& device, KvRelativeStepPlan* plan) {
  const KvRelativeStepProblem& p = plan->problem;
  const Machine machine(device.cuda, 1024);
  CudaKvRelativeStepPlan& c = plan->cuda;
  c = {};
  c.arch = device.cuda.arch;
  c.groups = p.head_size > 64 ? 2 : 1;
  c.chunks = static_cast<int>(std::clamp<int64_t>((p.tokens + kKvQueries - 1) / kKvQueries, 1, 65535));

  const double rows = static_cast<double>(p.rows), T = static_cast<double>(p.tokens), H = static_cast<double>(p.heads);
  const double width = H * static_cast<double>(p.head_size), frames = static_cast<double>(p.left) + T;
  const double cached = bytes_of(p.cache_dtype), element = bytes_of(p.dtype);
  // From memory: the past, q, k, v and out, the appended frames, the positions once. What every block reads again of
  // the positions comes from L2, twice: a tile of frames wants as many rows more as it has queries.
  const double bytes = rows * width * (2 * static_cast<double>(p.left) * cached + 2 * T * cached + 4 * T * element) +
                       width * (frames + T - 1) * element;
  const double again = rows * c.chunks * width * 2 * frames * element;
  // A block waits for its own loads, and so do those that come in turns after it; together they wait for memory.
  const double trips = frames / (kOnItsWay * kKvWarps * kKvTile);
  const double waiting_us = machine.turns(rows * H * c.chunks, kResident) * trips * kLatencySeconds * 1e6;
  const double moving_us = machine.memory_us(bytes) + machine.memory_us(again) / kL2;
  c.predicted_us = std::max(waiting_us, moving_us) + kEdgesUs + kLaunchUs;
  plan->workspace = 0;
}

}  // namespace lora_kernels::cuda

namespace lora_kernels {

std::string to_string(const CudaKvRelativeStepPlan& c) {
  char text[96];
  std::snprintf(text, sizeof text, "cuda sm_%d channels=%d chunks=%d predicted=%.1fus", c.arch, 64 * c.groups, c.chunks,
                c.predicted_us);
  return text;
}

}  // namespace lora_kernels
