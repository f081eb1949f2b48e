// A composite: operators that run one after the other in one call, a whole decoder step say. It adds no kernel; it
// saves what lies around them. Plans are made once, and on several threads the pool is entered once for all stages:
// between them the threads share out the next one's tasks where a fork and join would cost several microseconds.
//
// Stages read and write buffers that their Args name; a later stage sees all that an earlier one has written. They
// share one workspace. What changes from run to run (token, lengths, adapters) changes in those buffers. On a device,
// products that need nothing of each other may be one launch of int8_lora_linear.
#pragma once

#include <string>
#include <variant>
#include <vector>

#include "lora_kernels/int8_lora_linear.h"
#include "lora_kernels/kv_attention_step.h"
#include "lora_kernels/kv_pack.h"

namespace lora_kernels {

using StageProblem = std::variant<Int8LoraLinearProblem, KvAttentionStepProblem, KvPackProblem>;
using StageArgs = std::variant<Int8LoraLinearArgs, KvAttentionStepArgs, KvPackArgs>;
using StagePlan = std::variant<Int8LoraLinearPlan, KvAttentionStepPlan, KvPackPlan>;

struct CompositeProblem {
  std::vector<StageProblem> stages;
};

struct CompositeArgs {
  std::vector<StageArgs> stages;  // of the problem's kinds, in its order; their workspace is set by run()
  void* workspace = nullptr;      // workspace_bytes(plan), aligned to 64 bytes
};

struct CompositePlan {
  std::vector<StagePlan> stages;
  int threads = 1;
  int64_t workspace = 0;
};

Status plan(const CompositeProblem& problem, const DeviceInfo& device, CompositePlan* plan);
int64_t workspace_bytes(const CompositePlan& plan);
// Stops at the first stage that fails and returns its status; what earlier stages wrote stays written.
Status run(const CompositePlan& plan, const CompositeArgs& args, const Executor& executor);

std::string to_string(const CompositeProblem& problem);
std::string to_string(const CompositePlan& plan);

}  // namespace lora_kernels
