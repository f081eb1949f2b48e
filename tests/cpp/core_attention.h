// core_test's calls of the attention steps, each compared with sums in fp64.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "check.h"
#include "lora_kernels/kv_attention_step.h"
#include "lora_kernels/kv_pack.h"
#include "lora_kernels/kv_packing.h"
#include "lora_kernels/kv_relative_step.h"

namespace lora_kernels {

inline void run_attention(const DeviceInfo& device, int64_t rows, int64_t heads, int64_t size, int64_t capacity) {
  const int64_t per_row = heads * size;
  Buffer<float> q(rows * per_row), k(rows * per_row), v(rows * per_row), out(rows * per_row);
  Buffer<float> k_cache(rows * per_row * capacity), v_cache(rows * per_row * capacity);
  Buffer<int32_t> lengths(rows);
  for (Buffer<float>* b : {&q, &k, &v, &k_cache, &v_cache})
    for (int64_t i = 0; i < b->size(); ++i) (*b)[i] = normal();
  for (int64_t i = 0; i < rows; ++i) lengths[i] = static_cast<int32_t>(i % capacity);
  KvAttentionStepProblem p;
  p.rows = p.cache_rows = rows;
  p.heads = heads;
  p.head_size = size;
  p.capacity = capacity;
  p.append = true;
  KvAttentionStepPlan chosen;
  const Status planned = plan(p, device, &chosen);
  check(planned.ok(), planned.text);
  Buffer<char> workspace = Buffer<char>::aligned(workspace_bytes(chosen));
  KvAttentionStepArgs args;
  args.q = q.get();
  args.k = k.get();
  args.v = v.get();
  args.k_cache = k_cache.get();
  args.v_cache = v_cache.get();
  args.lengths = lengths.get();
  args.scale = 0.5f;
  args.out = out.get();
  args.workspace = workspace.get();
  const Status status = run(chosen, args, serial_executor());
  check(status.ok(), status.text);
  double worst = 0;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t h = 0; h < heads; ++h) {
      std::vector<double> score(lengths[i] + 1);
      double top = -1e300, sum = 0;
      for (int64_t at = 0; at <= lengths[i]; ++at) {
        for (int64_t d = 0; d < size; ++d)
          score[at] += 0.5 * q[(i * heads + h) * size + d] * k_cache[((i * heads + h) * capacity + at) * size + d];
        top = std::fmax(top, score[at]);
      }
      for (double& s : score) sum += s = std::exp(s - top);
      for (int64_t d = 0; d < size; ++d) {
        double y = 0;
        for (int64_t at = 0; at <= lengths[i]; ++at)
          y += score[at] / sum * v_cache[((i * heads + h) * capacity + at) * size + d];
        worst = std::fmax(worst, std::fabs(y - out[(i * heads + h) * size + d]));
      }
    }
  check(worst < 1e-5, to_string(chosen) + ": error " + std::to_string(worst));
  lengths[0] = static_cast<int32_t>(capacity);
  check(contains(run(chosen, args, serial_executor()).text, "lengths"), "a length beyond the cache is refused");
}

// Keys and values packed, and attended to by three rows that share one utterance of two.
inline void run_blocked_attention(const DeviceInfo& device, int64_t positions, int64_t heads, int64_t size) {
  const int64_t rows = 3, columns = heads * size;
  KvPackProblem pack;
  pack.cache_rows = 2;
  pack.positions = positions;
  pack.heads = heads;
  pack.head_size = size;
  KvPackPlan packing;
  check(plan(pack, device, &packing).ok(), "a plan for " + to_string(pack));
  Buffer<float> k(2 * positions * columns), v(2 * positions * columns), k_scales(2 * columns), v_scales(2 * columns);
  Buffer<int8_t> packed_k(2 * heads * kv_key_bytes(positions, size));
  Buffer<int8_t> packed_v(2 * heads * kv_value_bytes(positions, size));
  for (int64_t i = 0; i < 2 * positions * columns; ++i) k[i] = normal(), v[i] = normal();
  Buffer<char> pack_workspace = Buffer<char>::aligned(workspace_bytes(packing));
  KvPackArgs to;
  to.k = k.get();
  to.v = v.get();
  to.k_stride = to.v_stride = columns;
  to.k_row_stride = to.v_row_stride = positions * columns;
  to.packed_k = packed_k.get();
  to.packed_v = packed_v.get();
  to.k_scales = k_scales.get();
  to.v_scales = v_scales.get();
  to.workspace = pack_workspace.get();
  check(run(packing, to, serial_executor()).ok(), "packing");

  KvAttentionStepProblem p;
  p.rows = rows;
  p.heads = heads;
  p.head_size = size;
  p.cache_rows = 2;
  p.capacity = positions;
  p.cache_dtype = DType::kInt8;
  p.scales = KvScales::kPerChannel;
  p.slots = KvSlots::kPerRow;
  p.layout = KvLayout::kBlocked;
  KvAttentionStepPlan chosen;
  const Status planned = plan(p, device, &chosen);
  check(planned.ok(), planned.text);
  Buffer<float> q(rows * columns), out(rows * columns);
  Buffer<int32_t> lengths(rows), slots(rows);
  for (int64_t i = 0; i < rows * columns; ++i) q[i] = 0;
  for (int64_t i = 0; i < rows; ++i) slots[i] = 1, lengths[i] = static_cast<int32_t>(positions - i % positions);
  Buffer<char> workspace = Buffer<char>::aligned(workspace_bytes(chosen));
  KvAttentionStepArgs args;
  args.q = q.get();
  args.k_cache = packed_k.get();
  args.v_cache = packed_v.get();
  args.k_scales = k_scales.get();
  args.v_scales = v_scales.get();
  args.lengths = lengths.get();
  args.slots = slots.get();
  args.out = out.get();
  args.workspace = workspace.get();
  const Status status = run(chosen, args, serial_executor());
  check(status.ok(), status.text);
  double worst = 0;  // q is 0, so out is the mean of V, each element of which is half a unit off at most
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < columns; ++c) {
      double mean = 0;
      for (int64_t at = 0; at < lengths[i]; ++at) mean += v[(positions + at) * columns + c] / lengths[i];
      worst = std::fmax(worst, std::fabs(mean - out[i * columns + c]) / v_scales[columns + c]);
    }
  check(worst < 0.5001, to_string(chosen) + ": error of " + std::to_string(worst) + " units");
  p.append = true;
  check(contains(plan(p, device, &chosen).text, "k, v: expected None"), "blocked caches are fixed");
}

// Two streams, one of which has wrapped around its ring and brings one frame less than a chunk has.
inline void run_relative(const DeviceInfo& device, int64_t tokens, int64_t heads, int64_t size, int64_t left) {
  const int64_t rows = 2, capacity = left + tokens, chunk = rows * tokens * heads * size;
  Buffer<float> q(chunk), k(chunk), v(chunk), out(chunk);
  Buffer<float> k_cache(rows * heads * capacity * size), v_cache(rows * heads * capacity * size);
  Buffer<float> positions((left + 2 * tokens - 1) * heads * size), bias_u(heads * size), bias_v(heads * size);
  Buffer<int32_t> lengths(rows), counts(rows), slots(rows);
  for (Buffer<float>* b : {&q, &k, &v, &k_cache, &v_cache, &positions, &bias_u, &bias_v})
    for (int64_t i = 0; i < b->size(); ++i) (*b)[i] = normal();
  lengths[0] = 0, lengths[1] = static_cast<int32_t>(3 * capacity - 1);
  counts[0] = static_cast<int32_t>(tokens), counts[1] = static_cast<int32_t>(tokens - 1);
  slots[0] = 1, slots[1] = 0;
  KvRelativeStepProblem p;
  p.rows = p.cache_rows = rows;
  p.tokens = tokens;
  p.heads = heads;
  p.head_size = size;
  p.capacity = capacity;
  p.left = left;
  p.counts = p.slots = true;
  KvRelativeStepPlan chosen;
  const Status planned = plan(p, device, &chosen);
  check(planned.ok(), planned.text);
  Buffer<char> workspace = Buffer<char>::aligned(workspace_bytes(chosen));
  KvRelativeStepArgs args;
  args.q = q.get();
  args.k = k.get();
  args.v = v.get();
  args.k_cache = k_cache.get();
  args.v_cache = v_cache.get();
  args.positions = positions.get();
  args.bias_u = bias_u.get();
  args.bias_v = bias_v.get();
  args.lengths = lengths.get();
  args.counts = counts.get();
  args.slots = slots.get();
  args.scale = 0.3f;
  args.out = out.get();
  args.workspace = workspace.get();
  const Status status = run(chosen, args, serial_executor());
  check(status.ok(), status.text);
  double worst = 0;
  for (int64_t n = 0; n < rows * tokens * heads; ++n) {
    const int64_t h = n % heads, i = n / heads % tokens, row = n / heads / tokens;
    const int64_t first = std::max<int64_t>(0, lengths[row] - left);
    const int64_t frames = i < counts[row] ? lengths[row] + counts[row] - first : 0;
    const auto cached = [&](int64_t f) {
      return ((slots[row] * heads + h) * capacity + (first + f) % capacity) * size;
    };
    std::vector<double> score(frames);
    double sum = 0;
    for (int64_t f = 0; f < frames; ++f) {
      const int64_t distance = lengths[row] + i - first - f;
      for (int64_t d = 0; d < size; ++d)
        score[f] += 0.3 * (q[n * size + d] + bias_u[h * size + d]) * k_cache[cached(f) + d] +
                    0.3 * (q[n * size + d] + bias_v[h * size + d]) *
                        positions[((left + tokens - 1 - distance) * heads + h) * size + d];
      sum += std::exp(score[f]);
    }
    for (int64_t d = 0; d < size; ++d) {
      double y = 0;
      for (int64_t f = 0; f < frames; ++f) y += std::exp(score[f]) / sum * v_cache[cached(f) + d];
      worst = std::fmax(worst, std::fabs(y - out[n * size + d]));
    }
  }
  check(worst < 1e-5, to_string(chosen) + ": error " + std::to_string(worst));
  slots[1] = 1;
  check(contains(run(chosen, args, serial_executor()).text, "rows 0 and 1 are both in ring 1"), "a ring has one row");
  args.positions = nullptr;
  check(contains(run(chosen, args, serial_executor()).text, "positions: expected an address"), "a null is refused");
  --p.capacity;
  check(contains(plan(p, device, &chosen).text, "capacity of at least left + T"), "a ring holds what is attended to");
}

}  // namespace lora_kernels
