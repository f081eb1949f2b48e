// 16-bit storage types: bits only. Conversions live with each instruction set (simd/*.h).
#pragma once

#include <cstdint>

namespace lora_kernels {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

}  // namespace lora_kernels
