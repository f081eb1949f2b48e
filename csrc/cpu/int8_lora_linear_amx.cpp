#include "cpu/int8_lora_linear.h"
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
#include "cpu/lora.inl"
#include "cpu/epilogue.inl"
#include "cpu/norm.inl"
#include "cpu/topk.inl"
#include "cpu/int8_rows.inl"
#include "cpu/int8_lora_linear.inl"
#include "cpu/int8_screen.inl"
#include "cpu/int8_lora_linear_run.inl"
#include "cpu/lora_tiles.inl"
#include "cpu/int8_tiles.inl"
// clang-format on

}  // namespace

const Int8LoraLinearImplementation kInt8LoraLinearAmx = {
    "amx",
    kIsaAvx2 | kIsaAvx512 | kIsaAvx512Vnni | kIsaAvx512Bf16 | kIsaAmxInt8 | kIsaAmxBf16,
    configure_tiles,
    run_tiles,
};

}  // namespace lora_kernels

LORA_KERNELS_TARGET_END
