#include "lora_kernels/kv_relative_step.h"

#include <sstream>

#include "core/select.h"
#include "core/validate.h"
#include "cpu/kv_relative_step.h"
#include "cuda/kv_relative_step.h"

namespace lora_kernels {
namespace {

// Its launch can fail, so it returns a Status and is called below; a CPU's cannot.
const KvRelativeStepImplementation kKvRelativeStepCuda = {"cuda", kIsaCuda, cuda::configure, nullptr};

const Table<KvRelativeStepImplementation> kTable = {
    "kv_relative_step",
#if defined(__x86_64__)
    4,
    {&kKvRelativeStepCuda, &kKvRelativeStepAvx512, &kKvRelativeStepAvx2, &kKvRelativeStepGeneric},
#else
    2,
    {&kKvRelativeStepCuda, &kKvRelativeStepGeneric},
#endif
};

template <class... Pieces>
Status fault(const Pieces&... pieces) {
  return invalid_of("kv_relative_step", pieces...);
}

Status validate(const KvRelativeStepProblem& p) {
  if (p.rows < 0 || p.heads < 0 || p.cache_rows < 0 || p.capacity < 0)
    return fault("q, k_cache: sizes must not be negative");
  if (p.head_size < 1) return fault("q: expected a head size of at least 1, got ", p.head_size);
  if (p.tokens < 1) return fault("q: expected chunks of at least 1 frame, got ", p.tokens, "; skip the call");
  if (!is_floating(p.dtype)) return fault("q: expected float32, float16 or bfloat16, got int8");
  if (!is_floating(p.cache_dtype))
    return fault("k_cache, v_cache: expected float32, float16 or bfloat16, got int8; keep rings in floating point");
  if (p.left < 0) return fault("left: expected at least 0 frames before the chunk, got ", p.left);
  // So written that no size overflows.
  if (p.tokens > p.capacity || p.left > p.capacity - p.tokens)
    return fault("k_cache, v_cache: expected a capacity of at least left + T, ", p.left, " + ", p.tokens, ", got ",
                 p.capacity, "; a chunk must not overwrite frames that it attends to: give rings of more frames");
  if (p.rows > p.cache_rows)  // whatever slots say: two rows must not share a ring
    return fault("k_cache, v_cache: expected a ring for each of the ", p.rows, " rows of q, got ", p.cache_rows,
                 "; give caches of more rings or fewer rows");
  return {};
}

// What a valid problem must have besides on a CUDA device.
Status validate(const KvRelativeStepProblem& p, const DeviceInfo& device) {
  const Status valid = validate(p);
  return valid.ok() && device.cuda.arch ? cuda::supported(p, device.cuda) : valid;
}

Status check_pointers(const KvRelativeStepProblem& p, const KvRelativeStepArgs& args) {
  const struct {
    const char* name;
    const void* pointer;
    bool needed;
  } operands[] = {
      {"q", args.q, true},
      {"k", args.k, true},
      {"v", args.v, true},
      {"k_cache", args.k_cache, true},
      {"v_cache", args.v_cache, true},
      {"positions", args.positions, true},
      {"bias_u", args.bias_u, true},
      {"bias_v", args.bias_v, true},
      {"lengths", args.lengths, true},
      {"counts", args.counts, p.counts},
      {"slots", args.slots, p.slots},
      {"out", args.out, true},
  };
  for (const auto& operand : operands) {
    if (operand.needed && !operand.pointer)
      return fault(operand.name, ": expected an address, got null; this problem needs it");
    if (!operand.needed && operand.pointer)
      return fault(operand.name, ": expected null, as the problem was planned without, got an address; set ",
                   operand.name, " in the problem");
  }
  if (args.k_cache == args.v_cache)
    return fault("k_cache, v_cache: expected memory of their own, got one address for both; V would overwrite K");
  return {};
}

// What a CPU can read beforehand; CUDA kernels answer bad values with NaN.
Status check_values(const KvRelativeStepProblem& p, const KvRelativeStepArgs& args) {
  for (int64_t i = 0; i < p.rows; ++i)
    if (args.lengths[i] < 0)
      return fault("lengths: entry ", i, " is ", args.lengths[i],
                   ", expected the frames heard before this chunk, at least 0");
  for (int64_t i = 0; p.counts && i < p.rows; ++i)
    if (args.counts[i] < 0 || args.counts[i] > p.tokens)
      return fault("counts: entry ", i, " is ", args.counts[i], ", expected 0 to ", p.tokens, ", the frames of q");
  if (!p.slots) return {};
  for (int64_t i = 0; i < p.rows; ++i) {
    if (args.slots[i] < 0 || args.slots[i] >= p.cache_rows)
      return fault("slots: entry ", i, " is ", args.slots[i], ", expected a ring of k_cache, 0 to ", p.cache_rows - 1);
    for (int64_t j = 0; j < i; ++j)
      if (args.slots[j] == args.slots[i])
        return fault("slots: rows ", j, " and ", i, " are both in ring ", args.slots[i],
                     "; expected a ring of its own for each row");
  }
  return {};
}

}  // namespace

void report_kv_relative_step(const DeviceInfo& device, std::vector<ImplementationReport>* out) {
  report(kTable, device, out);
}

Status plan(const KvRelativeStepProblem& problem, const DeviceInfo& device, KvRelativeStepPlan* plan) {
  return make_plan(kTable, validate(problem, device), problem, device, &KvRelativeStepImplementation::configure, plan);
}

int64_t workspace_bytes(const KvRelativeStepPlan& plan) { return plan.workspace; }

Status run(const KvRelativeStepPlan& plan, const KvRelativeStepArgs& args, const Executor& executor) {
  const KvRelativeStepProblem& p = plan.problem;
  if (p.rows == 0 || p.heads == 0) return {};
  if (Status status = check_pointers(p, args); !status.ok()) return status;
  if (plan.implementation == &kKvRelativeStepCuda) {
    kTable.count_run(plan.implementation);
    return cuda::launch(plan, args, executor);
  }
  if (Status status = check_values(p, args); !status.ok()) return status;
  if (executor.leads) kTable.count_run(plan.implementation);
  plan.implementation->run(plan, args, executor);
  return {};
}

std::string to_string(const KvRelativeStepProblem& p) {
  std::ostringstream text;
  text << "kv_relative_step rows=" << p.rows << " tokens=" << p.tokens << " heads=" << p.heads
       << " head_size=" << p.head_size << " cache_rows=" << p.cache_rows << " capacity=" << p.capacity
       << " left=" << p.left << " " << name_of(p.dtype) << " cache=" << name_of(p.cache_dtype);
  if (p.counts) text << " counts";
  if (p.slots) text << " slots";
  return text.str();
}

std::string to_string(const KvRelativeStepPlan& plan) {
  std::ostringstream text;
  text << to_string(plan.problem) << " -> ";
  if (plan.implementation == &kKvRelativeStepCuda)
    text << to_string(plan.cuda);
  else
    text << plan.implementation->name << " tasks=" << plan.tasks;
  text << " workspace=" << plan.workspace;
  return text.str();
}

}  // namespace lora_kernels
