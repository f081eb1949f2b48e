#include "cpu/lora_linear.h"
#include "cpu/target.h"

LORA_KERNELS_TARGET_BEGIN(LORA_KERNELS_TARGET_AVX512)
namespace lora_kernels {
namespace {

// clang-format off: each file uses what the ones before it define
#include "cpu/simd/avx512.h"
#include "cpu/simd/amx.h"
#include "cpu/simd/math.inl"

#include "cpu/gemm.inl"
#include "cpu/lora.inl"
#include "cpu/epilogue.inl"
#include "cpu/lora_linear.inl"
#include "cpu/lora_linear_backward.inl"
#include "cpu/lora_tiles.inl"
#include "cpu/lora_linear_tiles.inl"
// clang-format on

}  // namespace

const LoraLinearImplementation kLoraLinearAmx = {
    "amx",        kIsaAvx2 | kIsaAvx512 | kIsaAvx512Bf16 | kIsaAmxBf16, configure_tiles, run_tiles, configure_backward,
    run_backward,
};

}  // namespace lora_kernels

LORA_KERNELS_TARGET_END
