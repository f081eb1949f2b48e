#include "lora_kernels/kv_pack.h"

#include <sstream>

#include "core/select.h"
#include "core/validate.h"
#include "cpu/kv_pack.h"
#include "cuda/kv_pack.h"
#include "lora_kernels/kv_packing.h"

namespace lora_kernels {
namespace {

// Its launch can fail, so it returns a Status and is called below; a CPU's cannot.
const KvPackImplementation kKvPackCuda = {"cuda", kIsaCuda, cuda::configure, nullptr};

const Table<KvPackImplementation> kTable = {
    "kv_pack",
#if defined(__x86_64__)
    4,
    {&kKvPackCuda, &kKvPackAvx512, &kKvPackAvx2, &kKvPackGeneric},
#else
    2,
    {&kKvPackCuda, &kKvPackGeneric},
#endif
};

Status validate(const KvPackProblem& p) {
  Check check("kv_pack");
  if (p.cache_rows < 0 || p.positions < 0 || p.heads < 0) check.fail("k, v: sizes must not be negative");
  if (!is_floating(p.dtype)) check.fail("k, v: expected float32, float16 or bfloat16, got int8");
  if (p.head_size < 1 || p.head_size > kKvMostHeadSize)
    check.fail("heads: expected heads of 1 to " + std::to_string(kKvMostHeadSize) + " channels" + got(p.head_size));
  if (p.positions > kKvMostPositions)
    check.fail("k, v: expected at most " + std::to_string(kKvMostPositions) + " positions" + got(p.positions) +
               "; more would overflow the integer sums, keep them in floating point");
  return check.status();
}

// What a valid problem must have besides on a CUDA device.
Status validate(const KvPackProblem& p, const DeviceInfo& device) {
  const Status valid = validate(p);
  return valid.ok() && device.cuda.arch ? cuda::supported(p, device.cuda) : valid;
}

}  // namespace

void report_kv_pack(const DeviceInfo& device, std::vector<ImplementationReport>* out) { report(kTable, device, out); }

Status plan(const KvPackProblem& problem, const DeviceInfo& device, KvPackPlan* plan) {
  return make_plan(kTable, validate(problem, device), problem, device, &KvPackImplementation::configure, plan);
}

int64_t workspace_bytes(const KvPackPlan& plan) { return plan.workspace; }

Status run(const KvPackPlan& plan, const KvPackArgs& args, const Executor& executor) {
  const KvPackProblem& p = plan.problem;
  if (p.cache_rows == 0 || p.heads == 0) return {};
  if (plan.implementation == &kKvPackCuda) {
    kTable.count_run(plan.implementation);
    return cuda::launch(plan, args, executor);
  }
  if (executor.leads) kTable.count_run(plan.implementation);
  plan.implementation->run(plan, args, executor);
  return {};
}

std::string to_string(const KvPackProblem& p) {
  std::ostringstream text;
  text << "kv_pack cache_rows=" << p.cache_rows << " positions=" << p.positions << " heads=" << p.heads
       << " head_size=" << p.head_size << " " << name_of(p.dtype);
  return text.str();
}

std::string to_string(const KvPackPlan& plan) {
  std::ostringstream text;
  text << to_string(plan.problem) << " -> ";
  if (plan.implementation == &kKvPackCuda)
    text << to_string(plan.cuda);
  else
    text << plan.implementation->name << " tasks=" << plan.tasks;
  text << " workspace=" << plan.workspace;
  return text.str();
}

}  // namespace lora_kernels
