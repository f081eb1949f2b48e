#include "lora_kernels/lora_linear.h"

#include <sstream>

#include "core/select.h"
#include "core/validate.h"
#include "cpu/lora_linear.h"
#include "cuda/lora_linear.h"

namespace lora_kernels {
namespace {

// Its launches can fail, so they return a Status and are called below; a CPU's cannot.
const LoraLinearImplementation kLoraLinearCuda = {
    "cuda", kIsaCuda, cuda::configure, nullptr, cuda::configure_backward, nullptr,
};

// Not taken unless it is forced: to compare it, or should wgmma be at fault.
const LoraLinearImplementation kLoraLinearCudaMma = {
    "cuda_mma", kIsaCuda, cuda::configure_mma, nullptr, cuda::configure_backward_mma, nullptr,
};

bool on_cuda(const LoraLinearImplementation* row) { return row == &kLoraLinearCuda || row == &kLoraLinearCudaMma; }

const Table<LoraLinearImplementation> kTable = {
    "lora_linear",
#if defined(__x86_64__)
    6,
    {&kLoraLinearCuda, &kLoraLinearCudaMma, &kLoraLinearAmx, &kLoraLinearAvx512, &kLoraLinearAvx2, &kLoraLinearGeneric},
#else
    3,
    {&kLoraLinearCuda, &kLoraLinearCudaMma, &kLoraLinearGeneric},
#endif
};

Status validate(const LoraLinearProblem& p) {
  Check check("lora_linear");
  if (!(p.rows >= 0 && p.in_features >= 0 && p.out_features >= 0)) check.fail("x, weight: sizes must not be negative");
  if (!is_floating(p.dtype))
    check.fail("x: expected float32, float16 or bfloat16, got int8; INT8 weights are for int8_lora_linear");
  if (!(p.dropout_p >= 0 && p.dropout_p < 1))
    check.fail("dropout_p: expected a probability in [0, 1), got " + std::to_string(p.dropout_p));
  check_lora_shape(&check, p.lora, p.rows);
  return check.status();
}

// What a valid problem must have besides on a CUDA device.
Status validate(const LoraLinearProblem& p, const DeviceInfo& device) {
  const Status valid = validate(p);
  return valid.ok() && device.cuda.arch ? cuda::supported(p, device.cuda) : valid;
}

Status refuse_blocks(const char* op, const char* where) {
  return Status::invalid(std::string(op) + ": lora_b: expected [rank, out_features] " + where +
                         ", got blocks; pass it by rank row");
}

// A CPU takes it by value; to leave it unread would drop other inputs than were meant.
void check_seed(Check* check, const int64_t* on_device) {
  if (on_device)
    check->fail("dropout_seed_on_device: expected null on a CPU, got an address; give dropout_seed, the number itself");
}

Status refuse_null_t(const char* op) {
  return Status::invalid(std::string(op) +
                         ": t: expected the address of [rows, kept_t_columns] with keeps_t or has_t, "
                         "got null; give one, or plan without");
}

}  // namespace

void report_lora_linear(const DeviceInfo& device, std::vector<ImplementationReport>* out) {
  report(kTable, device, out);
}

Status plan(const LoraLinearProblem& problem, const DeviceInfo& device, LoraLinearPlan* plan) {
  return make_plan(kTable, validate(problem, device), problem, device, &LoraLinearImplementation::configure, plan);
}

int64_t workspace_bytes(const LoraLinearPlan& plan) { return plan.workspace; }

Status run(const LoraLinearPlan& plan, const LoraLinearArgs& args, const Executor& executor) {
  const LoraLinearProblem& p = plan.problem;
  if (p.rows == 0 || p.out_features == 0) return {};
  if (p.keeps_t && p.lora.present() && !args.t) return refuse_null_t("lora_linear");
  if (on_cuda(plan.implementation) && args.lora.b_stride_block) return refuse_blocks("lora_linear", "on CUDA");
  if (on_cuda(plan.implementation)) {  // whose bank is not in the CPU's memory: kernels clamp what they read
    kTable.count_run(plan.implementation);
    return cuda::launch(plan, args, executor);
  }
  Check check("lora_linear");
  check_lora_bank(&check, p.lora, args.lora);
  check_seed(&check, args.dropout_seed_on_device);
  if (!check.status().ok()) return check.status();
  if (executor.leads) kTable.count_run(plan.implementation);
  plan.implementation->run(plan, args, executor);
  return {};
}

Status plan(const LoraLinearBackwardProblem& problem, const DeviceInfo& device, LoraLinearBackwardPlan* plan) {
  return make_plan(kTable, validate(problem.forward, device), problem, device,
                   &LoraLinearImplementation::configure_backward, plan);
}

int64_t workspace_bytes(const LoraLinearBackwardPlan& plan) { return plan.workspace; }

Status run(const LoraLinearBackwardPlan& plan, const LoraLinearBackwardArgs& args, const Executor& executor) {
  const LoraLinearProblem& p = plan.problem.forward;
  if (args.lora.b_stride_block) return refuse_blocks("lora_linear_backward", "where gradients are needed");
  if (plan.problem.has_t && p.lora.present() && p.rows > 0 && !args.t) return refuse_null_t("lora_linear_backward");
  if (on_cuda(plan.implementation)) {
    kTable.count_run(plan.implementation);
    return cuda::launch_backward(plan, args, executor);
  }
  Check check("lora_linear_backward");
  check_lora_bank(&check, p.lora, args.lora);
  check_seed(&check, args.dropout_seed_on_device);
  if (!check.status().ok()) return check.status();
  if (executor.leads) kTable.count_run(plan.implementation);
  plan.implementation->run_backward(plan, args, executor);
  return {};
}

std::string to_string(const LoraLinearProblem& p) {
  std::ostringstream text;
  text << "lora_linear rows=" << p.rows << " in=" << p.in_features << " out=" << p.out_features << " "
       << name_of(p.dtype) << (p.has_bias ? " bias" : "") << " activation=" << name_of(p.activation)
       << (p.has_residual ? " residual" : "");
  if (p.lora.present())
    text << " adapters=" << p.lora.adapters << " rank=" << p.lora.total_rank << " (largest " << p.lora.max_rank << ") "
         << name_of(p.lora.dtype);
  if (p.dropout_p > 0) text << " dropout=" << p.dropout_p;
  if (p.keeps_t) text << " keeps_t";
  return text.str();
}

std::string to_string(const LoraLinearPlan& plan) {
  std::ostringstream text;
  if (on_cuda(plan.implementation)) {
    text << to_string(plan.problem) << " -> " << to_string(plan.cuda) << " workspace=" << plan.workspace;
    return text.str();
  }
  text << to_string(plan.problem) << " -> " << plan.implementation->name << " "
       << (plan.path == LoraLinearPath::kDot ? "dot" : "panel") << (plan.bf16_dot ? " bf16 products" : "")
       << " tasks=" << plan.tasks << " workspace=" << plan.workspace;
  return text.str();
}

std::string to_string(const LoraLinearBackwardPlan& plan) {
  std::ostringstream text;
  const LoraLinearBackwardProblem& p = plan.problem;
  text << "gradients (" << (p.needs_dx ? "dx " : "") << (p.needs_dweight ? "dweight " : "")
       << (p.needs_dbias ? "dbias " : "") << (p.needs_dlora ? "dlora " : "") << ")" << (p.has_t ? " from t" : "")
       << " of " << to_string(p.forward) << " -> " << plan.implementation->name;
  if (on_cuda(plan.implementation))
    text << " " << to_string(plan.cuda);
  else
    text << " tasks=" << plan.tasks;
  text << " workspace=" << plan.workspace;
  return text.str();
}

}  // namespace lora_kernels
