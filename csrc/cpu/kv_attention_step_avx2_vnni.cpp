#include "cpu/kv_attention_step.h"
#include "cpu/target.h"

LORA_KERNELS_TARGET_BEGIN(LORA_KERNELS_TARGET_AVX2)
namespace lora_kernels {
namespace {

// clang-format off: each file uses what the ones before it define
#include "cpu/simd/avx2.h"
#include "cpu/simd/int8_avx2_vnni.h"
#include "cpu/simd/math.inl"

#include "cpu/gemm.inl"
#include "cpu/attention.inl"
#include "cpu/kv_queries.inl"
#include "cpu/kv_blocked.inl"
#include "cpu/kv_attention_step.inl"
// clang-format on

}  // namespace

const KvAttentionStepImplementation kKvAttentionStepAvx2Vnni = {
    "avx2_vnni",
    kIsaAvx2 | kIsaAvxVnni,
    configure,
    run_step,
};

}  // namespace lora_kernels

LORA_KERNELS_TARGET_END
