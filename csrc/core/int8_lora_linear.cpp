#include "lora_kernels/int8_lora_linear.h"

#include <algorithm>
#include <sstream>

#include "core/select.h"
#include "core/validate.h"
#include "cpu/int8_lora_linear.h"
#include "cuda/int8_lora_linear.h"
#include "cuda/int8_shapes.h"

namespace lora_kernels {
namespace {

// Its launches can fail, so they return a Status and are called below; a CPU's cannot.
const Int8LoraLinearImplementation kInt8LoraLinearCuda = {"cuda", kIsaCuda, cuda::configure, nullptr};
// Not taken unless it is forced: to compare it, or should wgmma be at fault.
const Int8LoraLinearImplementation kInt8LoraLinearCudaMma = {"cuda_mma", kIsaCuda, cuda::configure_mma, nullptr};

bool on_cuda(const Int8LoraLinearImplementation* row) {
  return row == &kInt8LoraLinearCuda || row == &kInt8LoraLinearCudaMma;
}

const Table<Int8LoraLinearImplementation> kTable = {
    "int8_lora_linear",
#if defined(__x86_64__)
    7,
    {&kInt8LoraLinearCuda, &kInt8LoraLinearCudaMma, &kInt8LoraLinearAmx, &kInt8LoraLinearAvx512,
     &kInt8LoraLinearAvx2Vnni, &kInt8LoraLinearAvx2, &kInt8LoraLinearGeneric},
#else
    3,
    {&kInt8LoraLinearCuda, &kInt8LoraLinearCudaMma, &kInt8LoraLinearGeneric},
#endif
};

// 127 * 127 * K and the compensation 128 * 127 * K must fit an int32 (partial sums may wrap around, the last one does
// not).
constexpr int64_t kMostInFeatures = 131072;
// Lists of the largest outputs are kept sorted by insertion.
constexpr int64_t kMostTopK = 256;

Status validate(const Int8LoraLinearProblem& p) {
  Check check("int8_lora_linear");
  if (!(p.rows >= 0 && p.in_features >= 0 && p.out_features >= 0))
    check.fail("x, out_features: sizes must not be negative");
  if (p.in_features > kMostInFeatures)
    check.fail("x: expected at most " + std::to_string(kMostInFeatures) +
               " columns, so that integer sums cannot overflow" + got(p.in_features) + "; split the layer");
  if (!is_floating(p.dtype))
    check.fail("x: expected float32, float16 or bfloat16, got int8; x is quantized by the operator");
  if (p.top_k && (p.activation != Activation::kNone || p.has_residual))
    check.fail("top_k: expected neither an activation nor a residual with it; leave them out, or take y");
  const int64_t most = p.out_features < kMostTopK ? p.out_features : kMostTopK;
  if (p.top_k && !(p.top_k >= 1 && p.top_k <= most))
    check.fail("top_k: expected 1 to " + std::to_string(most) + got(p.top_k));
  if (p.has_screen && !p.top_k)
    check.fail("screen: expected top_k with it, as it finds the largest outputs only; leave it out, or take no y");
  if (p.has_norm && !(p.norm_eps >= 0 && std::isfinite(p.norm_eps)))
    check.fail("norm_eps: expected a finite number of at least 0, got " + std::to_string(p.norm_eps));
  check_lora_shape(&check, p.lora, p.rows);
  return check.status();
}

// What a valid problem must have besides on a CUDA device.
Status validate(const Int8LoraLinearProblem& p, const DeviceInfo& device) {
  const Status valid = validate(p);
  return valid.ok() && device.cuda.arch ? cuda::supported(p, device.cuda) : valid;
}

void check_x_scale(Check* check, float scale) {
  if (!(scale > 0 && std::isfinite(scale) && std::isfinite(1.0f / scale)))
    check->fail("x_scale: expected a positive finite scale, got " + std::to_string(scale) +
                "; calibrate again, or pass None to quantize every row by its own maximum");
}

// Operands are not in the CPU's memory: what is there kernels clamp.
Status check_on_cuda(const Int8LoraLinearPlan& plan, const Int8LoraLinearArgs& args) {
  Check check("int8_lora_linear");
  if (plan.problem.static_scale && !args.x_scale) check_x_scale(&check, args.host_x_scale);
  if (reinterpret_cast<uintptr_t>(args.packed_weight) % 16)
    check.fail("packed_weight: expected an address that is a multiple of 16, got one of " +
               std::to_string(reinterpret_cast<uintptr_t>(args.packed_weight) % 16) + " beyond; call .clone()");
  return check.status();
}

}  // namespace

void report_int8_lora_linear(const DeviceInfo& device, std::vector<ImplementationReport>* out) {
  report(kTable, device, out);
}

Status plan(const Int8LoraLinearProblem& problem, const DeviceInfo& device, Int8LoraLinearPlan* plan) {
  plan->tiles = false;  // as plans may be made again in the same place
  return make_plan(kTable, validate(problem, device), problem, device, &Int8LoraLinearImplementation::configure, plan);
}

int64_t workspace_bytes(const Int8LoraLinearPlan& plan) { return plan.workspace; }

Status run(const Int8LoraLinearPlan& plan, const Int8LoraLinearArgs& args, const Executor& executor) {
  const Int8LoraLinearProblem& p = plan.problem;
  if (p.rows == 0 || p.out_features == 0) return {};
  if (on_cuda(plan.implementation)) {
    const Status status = check_on_cuda(plan, args);
    if (!status.ok()) return status;
    kTable.count_run(plan.implementation);
    return cuda::launch(plan, args, executor);
  }
  Check check("int8_lora_linear");
  check_lora_bank(&check, p.lora, args.lora);
  if (p.has_screen && !args.screen)
    check.fail("screen: expected what int8_pack_screen makes of the weight, got null; leave has_screen false without");
  if (p.static_scale) check_x_scale(&check, *args.x_scale);
  if (!check.status().ok()) return check.status();
  if (executor.leads) kTable.count_run(plan.implementation);
  plan.implementation->run(plan, args, executor);
  return {};
}

int together(const Int8LoraLinearPlan* const* plans, const Int8LoraLinearArgs* const* args, int count) {
  const auto fits = [&](int next) {
    for (int i = 0; i < next; ++i)
      if (!cuda::together(*plans[i], *args[i], *plans[next], *args[next])) return false;
    return true;
  };
  int found = 1;
  const bool some = plans[0]->problem.rows > 0 && plans[0]->problem.out_features > 0;
  if (some && on_cuda(plans[0]->implementation))
    while (found < std::min(count, cuda::kInt8MostTogether) && fits(found)) ++found;
  return found;
}

Status run(const Int8LoraLinearPlan* const* plans, const Int8LoraLinearArgs* const* args, int count,
           const Executor& executor) {
  if (count == 1) return run(*plans[0], *args[0], executor);
  for (int i = 0; i < count; ++i) {
    const Status status = check_on_cuda(*plans[i], *args[i]);
    if (!status.ok()) return status;
    kTable.count_run(plans[i]->implementation);
  }
  return cuda::launch_together(plans, args, count, executor);
}

std::string to_string(const Int8LoraLinearProblem& p) {
  std::ostringstream text;
  text << "int8_lora_linear rows=" << p.rows << " in=" << p.in_features << " out=" << p.out_features << " "
       << name_of(p.dtype) << (p.has_norm ? " norm" : "") << (p.static_scale ? " static" : " dynamic")
       << (p.has_bias ? " bias" : "") << " activation=" << name_of(p.activation) << (p.has_residual ? " residual" : "")
       << (p.top_k ? " top_k=" + std::to_string(p.top_k) : "") << (p.log_sum ? " log_sum" : "")
       << (p.has_screen ? " screen" : "");
  if (p.lora.present())
    text << " adapters=" << p.lora.adapters << " rank=" << p.lora.total_rank << " (largest " << p.lora.max_rank << ") "
         << name_of(p.lora.dtype);
  return text.str();
}

std::string to_string(const Int8LoraLinearPlan& plan) {
  std::ostringstream text;
  if (on_cuda(plan.implementation)) {
    text << to_string(plan.problem) << " -> " << to_string(plan.cuda) << " workspace=" << plan.workspace;
    return text.str();
  }
  text << to_string(plan.problem) << " -> " << plan.implementation->name << (plan.tiles ? " tiles" : "")
       << (plan.bf16_dot ? " bf16 products" : "") << " tasks=" << plan.tasks << " workspace=" << plan.workspace;
  return text.str();
}

}  // namespace lora_kernels
