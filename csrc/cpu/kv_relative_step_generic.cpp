#include "cpu/kv_relative_step.h"
#include "cpu/target.h"

namespace lora_kernels {
namespace {

// clang-format off: each file uses what the ones before it define
#include "cpu/simd/generic.h"
#include "cpu/simd/math.inl"

#include "cpu/gemm.inl"
#include "cpu/attention.inl"
#include "cpu/kv_relative_step.inl"
// clang-format on

}  // namespace

const KvRelativeStepImplementation kKvRelativeStepGeneric = {
    "generic",
    0,
    configure,
    run_relative,
};

}  // namespace lora_kernels
