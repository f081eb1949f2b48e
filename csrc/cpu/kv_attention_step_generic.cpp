#include "cpu/kv_attention_step.h"
#include "cpu/target.h"

namespace lora_kernels {
namespace {

// clang-format off: each file uses what the ones before it define
#include "cpu/simd/generic.h"
#include "cpu/simd/int8_generic.h"
#include "cpu/simd/math.inl"

#include "cpu/gemm.inl"
#include "cpu/attention.inl"
#include "cpu/kv_queries.inl"
#include "cpu/kv_blocked.inl"
#include "cpu/kv_attention_step.inl"
// clang-format on

}  // namespace

const KvAttentionStepImplementation kKvAttentionStepGeneric = {
    "generic",
    0,
    configure,
    run_step,
};

}  // namespace lora_kernels
