#include "cpu/lora_linear.h"
#include "cpu/target.h"

namespace lora_kernels {
namespace {

// clang-format off: each file uses what the ones before it define
#include "cpu/simd/generic.h"
#include "cpu/simd/math.inl"

#include "cpu/gemm.inl"
#include "cpu/lora.inl"
#include "cpu/epilogue.inl"
#include "cpu/lora_linear.inl"
#include "cpu/lora_linear_backward.inl"
// clang-format on

}  // namespace

const LoraLinearImplementation kLoraLinearGeneric = {
    "generic", 0, configure, run_forward, configure_backward, run_backward,
};

}  // namespace lora_kernels
