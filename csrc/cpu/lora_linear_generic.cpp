#include "cpu/lora_linear.h"

#include "cpu/target.h"

namespace lora_kernels {
namespace {

#include "cpu/simd/generic.h"
#include "cpu/simd/math.inl"

#include "cpu/gemm.inl"
#include "cpu/lora.inl"
#include "cpu/epilogue.inl"
#include "cpu/lora_linear.inl"
#include "cpu/lora_linear_backward.inl"

}  // namespace

const LoraLinearImplementation kLoraLinearGeneric = {
    "generic", 0, configure, run_forward, configure_backward, run_backward,
};

}  // namespace lora_kernels

