// Everything that a CPU implementation's translation unit may include, before its target region begins: inline
// functions of these headers are compiled for the baseline and never leak a wider instruction set into it.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/storage.h"
#include "lora_kernels/int8_packing.h"
#include "lora_kernels/kv_packing.h"
#include "lora_kernels/philox.h"

// clang spells target regions differently; whatever stands between BEGIN and END is compiled for the named sets.
#define LORA_KERNELS_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define LORA_KERNELS_TARGET_BEGIN(sets) \
  LORA_KERNELS_PRAGMA(clang attribute push(__attribute__((target(sets))), apply_to = function))
#define LORA_KERNELS_TARGET_END LORA_KERNELS_PRAGMA(clang attribute pop)
#else
#define LORA_KERNELS_TARGET_BEGIN(sets) LORA_KERNELS_PRAGMA(GCC push_options) LORA_KERNELS_PRAGMA(GCC target(sets))
#define LORA_KERNELS_TARGET_END LORA_KERNELS_PRAGMA(GCC pop_options)
#endif

#define LORA_KERNELS_TARGET_AVX2 "avx2,fma,f16c"
#define LORA_KERNELS_TARGET_AVX512 "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"

// Before an inner loop's function: not inlined. g++ fully unrolls loops over registers only to a nesting of 8, and
// inlined into a task's loops the sums would live on the stack.
#define LORA_KERNELS_APART __attribute__((noinline))
