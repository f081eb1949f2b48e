#include "cpu/kv_relative_step.h"
#include "cpu/target.h"

LORA_KERNELS_TARGET_BEGIN(LORA_KERNELS_TARGET_AVX2)
namespace lora_kernels {
namespace {

// clang-format off: each file uses what the ones before it define
#include "cpu/simd/avx2.h"
#include "cpu/simd/math.inl"

#include "cpu/gemm.inl"
#include "cpu/attention.inl"
#include "cpu/kv_relative_step.inl"
// clang-format on

}  // namespace

const KvRelativeStepImplementation kKvRelativeStepAvx2 = {
    "avx2",
    kIsaAvx2,
    configure,
    run_relative,
};

}  // namespace lora_kernels

LORA_KERNELS_TARGET_END
