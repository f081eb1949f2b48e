#include "cpu/kv_attention_step.h"
#include "cpu/target.h"

LORA_KERNELS_TARGET_BEGIN(LORA_KERNELS_TARGET_AVX512)
namespace lora_kernels {
namespace {

// clang-format off: each file uses what the ones before it define
#include "cpu/simd/avx512.h"
#include "cpu/simd/int8_avx512.h"
#include "cpu/simd/amx.h"
#include "cpu/simd/math.inl"

#include "cpu/gemm.inl"
#include "cpu/attention.inl"
#include "cpu/kv_queries.inl"
#include "cpu/kv_blocked.inl"
#include "cpu/kv_attention_step.inl"
#include "cpu/kv_tiles.inl"
// clang-format on

}  // namespace

const KvAttentionStepImplementation kKvAttentionStepAmx = {
    "amx",
    kIsaAvx2 | kIsaAvx512 | kIsaAvx512Vnni | kIsaAmxInt8,
    configure_tiles,
    run_tiles,
};

}  // namespace lora_kernels

LORA_KERNELS_TARGET_END
