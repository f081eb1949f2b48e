#include "lora_kernels/kv_attention_step.h"

#include <cmath>
#include <sstream>

#include "core/select.h"
#include "core/validate.h"
#include "cpu/kv_attention_step.h"
#include "cuda/kv_attention_step.h"
#include "lora_kernels/kv_packing.h"

namespace lora_kernels {
namespace {

// Its launches can fail, so they return a Status and are called below; a CPU's cannot.
const KvAttentionStepImplementation kKvAttentionStepCuda = {"cuda", kIsaCuda, cuda::configure, nullptr};

const Table<KvAttentionStepImplementation> kTable = {
    "kv_attention_step",
#if defined(__x86_64__)
    6,
    {&kKvAttentionStepCuda, &kKvAttentionStepAmx, &kKvAttentionStepAvx512, &kKvAttentionStepAvx2Vnni,
     &kKvAttentionStepAvx2, &kKvAttentionStepGeneric},
#else
    2,
    {&kKvAttentionStepCuda, &kKvAttentionStepGeneric},
#endif
};

template <class... Pieces>
Status fault(const Pieces&... pieces) {
  return invalid_of("kv_attention_step", pieces...);
}

Status validate_blocked(const KvAttentionStepProblem& p) {
  if (p.cache_dtype != DType::kInt8)
    return fault("k_cache, v_cache: expected int8 in the blocked layout, got ", name_of(p.cache_dtype),
                 "; make them with kv_pack");
  if (p.append)
    return fault("k, v: expected None with blocked caches, which are fixed, got tensors; append to caches [",
                 p.cache_rows, ", ", p.heads, ", C, ", p.head_size, "]");
  if (p.scales != KvScales::kPerChannel)
    return fault("k_scales, v_scales: expected one scale per channel with blocked caches, [", p.cache_rows, ", ",
                 p.heads, ", 1, ", p.head_size, "], as kv_pack returns them");
  if (p.capacity > kKvMostPositions || p.head_size > kKvMostHeadSize)
    return fault("k_cache: expected at most ", kKvMostPositions, " positions of at most ", kKvMostHeadSize,
                 " channels in the blocked layout, got ", p.capacity, " of ", p.head_size,
                 "; more would overflow the integer sums");
  return {};
}

Status validate(const KvAttentionStepProblem& p) {
  if (p.rows < 0 || p.tokens < 0 || p.heads < 0 || p.cache_rows < 0 || p.capacity < 0)
    return fault("q, k_cache: sizes must not be negative");
  if (p.head_size < 1) return fault("q: expected a head size of at least 1, got ", p.head_size);
  if (!is_floating(p.dtype))
    return fault("q: expected float32, float16 or bfloat16, got int8; only the caches may be int8");
  if (p.layout == KvLayout::kBlocked)
    if (Status status = validate_blocked(p); !status.ok()) return status;
  if (p.cache_dtype == DType::kInt8 && p.scales == KvScales::kNone)
    return fault("k_scales, v_scales: expected float32 scales for int8 caches, got None; give [", p.cache_rows, ", ",
                 p.heads, ", ", p.capacity, ", 1] (one per position) or [", p.cache_rows, ", ", p.heads, ", 1, ",
                 p.head_size, "] (one per channel)");
  if (p.cache_dtype != DType::kInt8 && p.scales != KvScales::kNone)
    return fault("k_scales, v_scales: expected None for ", name_of(p.cache_dtype),
                 " caches, got tensors; only int8 caches have scales");
  if (p.append && p.scales == KvScales::kPerChannel)
    return fault("k_scales, v_scales: expected one scale per position, [", p.cache_rows, ", ", p.heads, ", ",
                 p.capacity,
                 ", 1], to append k and v to an int8 cache, got one per channel; scales per channel are "
                 "for caches that are quantized beforehand");
  if (p.slots == KvSlots::kPerPosition && p.scales == KvScales::kPerChannel)
    return fault("slots: expected one cache row per row of q, [", p.rows, "], with scales per channel, got [", p.rows,
                 ", ", p.capacity, "]; a table per position needs one scale per position");
  if (p.slots == KvSlots::kIdentity && p.rows > p.cache_rows)
    return fault("slots: expected the cache row of each of the ", p.rows, " rows of q, as there are ", p.cache_rows,
                 " in k_cache, got None; give int32 [", p.rows, "]");
  if (p.weight_heads < 0) return fault("heads: expected a list of heads, got a negative number of them");
  return {};
}

// What a valid problem must have besides on a CUDA device, where lengths and slots cannot be read: what they can hold.
Status validate(const KvAttentionStepProblem& p, const DeviceInfo& device) {
  Status status = validate(p);
  if (!status.ok() || !device.cuda.arch) return status;
  if (p.append && p.tokens > p.capacity)
    return fault("k, v: expected at most as many new tokens as the cache has positions, ", p.capacity, ", got ",
                 p.tokens, "; give a cache with a greater capacity or fewer tokens");
  if (p.rows > 0 && p.cache_rows == 0)
    return fault("slots: expected rows of k_cache for the ", p.rows, " rows of q, got a cache without any");
  return cuda::supported(p, device.cuda);
}

// The cache row in which position `position` of row `row` lives.
int64_t cache_row(const KvAttentionStepProblem& p, const KvAttentionStepArgs& args, int64_t row, int64_t position) {
  switch (p.slots) {
    case KvSlots::kIdentity: return row;
    case KvSlots::kPerRow: return args.slots[row];
    case KvSlots::kPerPosition: return args.slots[row * p.capacity + position];
  }
  return 0;
}

Status check_lengths(const KvAttentionStepProblem& p, const KvAttentionStepArgs& args) {
  const int64_t added = p.append ? p.tokens : 0;
  for (int64_t i = 0; i < p.rows; ++i) {
    const int64_t length = args.lengths[i];
    if (length >= 0 && length + added <= p.capacity) continue;
    if (length < 0) return fault("lengths: entry ", i, " is ", length, ", expected 0 to ", p.capacity - added);
    if (added == 0)
      return fault("lengths: entry ", i, " is ", length, ", but the cache has ", p.capacity,
                   " positions; expected at most that");
    return fault("lengths: entry ", i, " is ", length, ", and ", added, " new token", added == 1 ? "" : "s",
                 " would end at position ", length + added, " of a cache of ", p.capacity,
                 "; give a cache with a greater capacity or fewer tokens");
  }
  return {};
}

Status check_slots(const KvAttentionStepProblem& p, const KvAttentionStepArgs& args) {
  if (p.slots == KvSlots::kIdentity) return {};
  const uint32_t most = static_cast<uint32_t>(p.cache_rows);  // a negative slot is a great unsigned number
  for (int64_t i = 0; i < p.rows; ++i) {
    const bool table = p.slots == KvSlots::kPerPosition;
    // Entries of positions that nobody reads may hold anything.
    const int64_t count = table ? args.lengths[i] + (p.append ? p.tokens : 0) : 1;
    const int32_t* slots = args.slots + i * (table ? p.capacity : 1);
    bool bad = false;
    for (int64_t j = 0; j < count; ++j) bad |= static_cast<uint32_t>(slots[j]) >= most;
    for (int64_t j = 0; bad && j < count; ++j) {
      if (static_cast<uint32_t>(slots[j]) < most) continue;
      std::ostringstream where;
      where << i;
      if (table) where << ", " << j;
      return fault("slots: entry [", where.str(), "] is ", slots[j], ", expected a row of k_cache, 0 to ",
                   p.cache_rows - 1);
    }
  }
  return {};
}

// Two new tokens in one place: one would be lost, and which one would be chance.
Status check_appends(const KvAttentionStepProblem& p, const KvAttentionStepArgs& args) {
  if (!p.append || p.slots == KvSlots::kIdentity) return {};
  for (int64_t i = 1; i < p.rows; ++i) {
    const int64_t begin = args.lengths[i], end = begin + p.tokens;
    for (int64_t j = 0; j < i; ++j) {
      const int64_t other = args.lengths[j];
      const int64_t first = begin > other ? begin : other;
      const int64_t last = end < other + p.tokens ? end : other + p.tokens;
      for (int64_t position = first; position < last; ++position)
        if (cache_row(p, args, i, position) == cache_row(p, args, j, position))
          return fault("slots: rows ", j, " and ", i, " would both write position ", position, " of cache row ",
                       cache_row(p, args, i, position), "; expected a cache row of its own for each row's new tokens");
    }
  }
  return {};
}

// Scales per channel are inputs, of the cache rows that are read. Zero is what a buffer holds that nobody has filled;
// those that kv_pack made come as they are, NaN for a channel that was not finite.
Status check_channel_scales(const KvAttentionStepProblem& p, const KvAttentionStepArgs& args) {
  if (p.scales != KvScales::kPerChannel || p.layout == KvLayout::kBlocked) return {};
  const int64_t channels = p.heads * p.head_size;
  const auto usable = [](float scale) { return scale > 0 && scale <= 3.4028235e38f; };
  int64_t checked = -1;
  for (int64_t i = 0; i < p.rows; ++i) {
    const int64_t row = cache_row(p, args, i, 0);
    if (row == checked) continue;
    checked = row;
    for (const float* scales : {args.k_scales, args.v_scales}) {
      const float* s = scales + row * channels;
      bool good = true;
      for (int64_t c = 0; c < channels; ++c) good &= usable(s[c]);
      for (int64_t c = 0; !good && c < channels; ++c)
        if (!usable(s[c]))
          return fault(scales == args.k_scales ? "k_scales" : "v_scales", ": entry [", row, ", ", c / p.head_size,
                       ", 0, ", c % p.head_size, "] is ", s[c],
                       ", expected a finite number above 0 (largest magnitude of the channel / 127; 1 where the "
                       "channel is all zero)");
    }
  }
  return {};
}

Status check_heads(const KvAttentionStepProblem& p, const KvAttentionStepArgs& args) {
  for (int64_t i = 0; i < p.weight_heads; ++i)
    if (args.weight_heads[i] < 0 || args.weight_heads[i] >= p.heads)
      return fault("heads: entry ", i, " is ", args.weight_heads[i], ", expected a head, 0 to ", p.heads - 1);
  return {};
}

Status check_args(const KvAttentionStepProblem& p, const KvAttentionStepArgs& args) {
  Status status = check_lengths(p, args);
  if (status.ok()) status = check_slots(p, args);
  if (status.ok()) status = check_appends(p, args);
  if (status.ok()) status = check_channel_scales(p, args);
  return status.ok() ? check_heads(p, args) : status;
}

// Of what is in a CUDA device's memory addresses are known alone; kernels answer bad values with NaN.
Status check_cuda_args(const KvAttentionStepProblem& p, const KvAttentionStepArgs& args) {
  if (p.layout == KvLayout::kBlocked)
    for (const void* cache : {args.k_cache, args.v_cache})
      if (const auto beyond = reinterpret_cast<uintptr_t>(cache) % 16)
        return fault(cache == args.k_cache ? "k_cache" : "v_cache",
                     ": expected an address that is a multiple of 16, got one of ", beyond, " beyond; call .clone()");
  return check_heads(p, args);
}

}  // namespace

void report_kv_attention_step(const DeviceInfo& device, std::vector<ImplementationReport>* out) {
  report(kTable, device, out);
}

Status plan(const KvAttentionStepProblem& problem, const DeviceInfo& device, KvAttentionStepPlan* plan) {
  return make_plan(kTable, validate(problem, device), problem, device, &KvAttentionStepImplementation::configure, plan);
}

int64_t workspace_bytes(const KvAttentionStepPlan& plan) { return plan.workspace; }

Status run(const KvAttentionStepPlan& plan, const KvAttentionStepArgs& args, const Executor& executor) {
  const KvAttentionStepProblem& p = plan.problem;
  const bool cuda = plan.implementation == &kKvAttentionStepCuda;
  if (Status status = cuda ? check_cuda_args(p, args) : check_args(p, args); !status.ok()) return status;
  if (p.rows == 0 || p.tokens == 0 || p.heads == 0) return {};
  if (cuda) {
    kTable.count_run(plan.implementation);
    return cuda::launch(plan, args, executor);
  }
  if (executor.leads) kTable.count_run(plan.implementation);
  plan.implementation->run(plan, args, executor);
  return {};
}

std::string to_string(const KvAttentionStepProblem& p) {
  std::ostringstream text;
  text << "kv_attention_step rows=" << p.rows << " tokens=" << p.tokens << " heads=" << p.heads
       << " head_size=" << p.head_size << " cache_rows=" << p.cache_rows << " capacity=" << p.capacity << " "
       << name_of(p.dtype) << " cache=" << name_of(p.cache_dtype);
  if (p.scales != KvScales::kNone)
    text << (p.scales == KvScales::kPerPosition ? " scales per position" : " scales per channel");
  if (p.slots != KvSlots::kIdentity) text << (p.slots == KvSlots::kPerRow ? " slots per row" : " slots per position");
  if (p.layout == KvLayout::kBlocked) text << " blocked";
  if (p.append) text << " append";
  if (p.weight_heads > 0) text << " weight_heads=" << p.weight_heads;
  return text.str();
}

std::string to_string(const KvAttentionStepPlan& plan) {
  std::ostringstream text;
  text << to_string(plan.problem) << " -> ";
  if (plan.implementation == &kKvAttentionStepCuda)
    text << to_string(plan.cuda);
  else
    text << plan.implementation->name << " tasks=" << plan.tasks;
  text << " workspace=" << plan.workspace;
  return text.str();
}

}  // namespace lora_kernels
