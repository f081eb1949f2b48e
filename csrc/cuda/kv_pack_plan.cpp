// What a kv_pack needs of a CUDA device, and what it is predicted to take: nothing has measured it.
#include <algorithm>
#include <climits>
#include <cstdio>

#include "cuda/kv_pack.h"
#include "cuda/kv_shapes.h"
#include "cuda/machine.h"
#include "cuda/refusals.h"
#include "lora_kernels/kv_packing.h"

namespace lora_kernels::cuda {

Status supported(const KvPackProblem& p, const CudaDevice& device) {
  Refusals refusals;
  refusals.expect_tensor_cores(device, "k, v", p.dtype);  // kv_attention_step's, which reads the blocks
  if (p.cache_rows > (1 << 20) || p.heads > (1 << 20) || p.cache_rows * p.heads > INT_MAX / 2)
    refusals.add("k, v: expected at most " + std::to_string(INT_MAX / 2) + " utterances times heads, got " +
                 std::to_string(p.cache_rows) + " and " + std::to_string(p.heads));
  return refusals.status("kv_pack", "Convert k and v, or move them to the CPU, whose kernels take any of it.");
}

void configure(const DeviceInfo& device, KvPackPlan* plan) {
  const KvPackProblem& p = plan->problem;
  const Machine machine(device.cuda, 1024);
  plan->cuda.arch = device.cuda.arch;
  const double vectors = 2 * static_cast<double>(p.cache_rows * p.heads);
  const double read = vectors * static_cast<double>(p.positions * p.head_size) * static_cast<double>(size_of(p.dtype));
  const double written =
      vectors / 2 *
      static_cast<double>(kv_key_bytes(p.positions, p.head_size) + kv_value_bytes(p.positions, p.head_size));
  // The second pass finds in L2 what the blocks at work have read, if that is no more than half of it.
  const double at_work = 4 * machine.multiprocessors * static_cast<double>(p.positions * kKvPackChannels) *
                         static_cast<double>(size_of(p.dtype));
  const double again = at_work <= static_cast<double>(device.cuda.l2_bytes) / 2 ? 1 / kL2 : 1;
  plan->cuda.predicted_us = machine.memory_us(read * (1 + again) + written) + kLaunchUs;
  plan->workspace = 0;
}

}  // namespace lora_kernels::cuda

namespace lora_kernels {

std::string to_string(const CudaKvPackPlan& c) {
  char text[64];
  std::snprintf(text, sizeof text, "cuda sm_%d predicted=%.1fus", c.arch, c.predicted_us);
  return text;
}

}  // namespace lora_kernels
