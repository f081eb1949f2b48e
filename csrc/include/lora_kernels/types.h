// Storage types and activations, shared by all operators.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lora_kernels {

enum class DType : uint8_t { kFloat32, kFloat16, kBFloat16, kInt8 };

constexpr size_t size_of(DType type) { return type == DType::kFloat32 ? 4 : type == DType::kInt8 ? 1 : 2; }

constexpr const char* name_of(DType type) {
  return type == DType::kFloat32    ? "float32"
         : type == DType::kFloat16  ? "float16"
         : type == DType::kBFloat16 ? "bfloat16"
                                    : "int8";
}

constexpr bool is_floating(DType type) { return type != DType::kInt8; }

enum class Activation : uint8_t {
  kNone,
  kGelu,  // x * Phi(x) with the error function, as Whisper has it (not the tanh approximation)
  kSilu,  // x * sigmoid(x), as Conformer's feed-forward modules have it
};

constexpr const char* name_of(Activation activation) {
  return activation == Activation::kGelu ? "gelu" : activation == Activation::kSilu ? "silu" : "none";
}

constexpr int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

}  // namespace lora_kernels
