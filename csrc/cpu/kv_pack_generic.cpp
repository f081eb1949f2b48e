#include "cpu/kv_pack.h"
#include "cpu/target.h"

namespace lora_kernels {
namespace {

// clang-format off: each file uses what the ones before it define
#include "cpu/simd/generic.h"
#include "cpu/simd/int8_generic.h"
#include "cpu/simd/math.inl"

#include "cpu/gemm.inl"
#include "cpu/kv_pack.inl"
// clang-format on

}  // namespace

const KvPackImplementation kKvPackGeneric = {
    "generic",
    0,
    configure,
    run_pack,
};

}  // namespace lora_kernels
