// The packed layout of INT8 weights on the CPU: one layout for every implementation and every number of rows.
//
// Blocks of 64 output channels. A block is
//   weights       int8  [K4 / 4][64][4]   in [-127, 127]; K4 = K rounded up to 4, the rest zero
//   scales        fp32  [64]
//   compensation  int32 [64]              -128 * (sum over k of the channel's weights)
// so a step over four k reads 256 consecutive bytes and broadcasts four activations: no horizontal sums, and the
// accumulator of 16 channels is one AVX-512 register (two AVX2 ones; an AMX tile of 16 channels has row stride 256).
// Activations as u8 = q + 128 against s8 weights (vpdpbusd) start from the compensation; s8 activations ignore it.
// Scales and compensation follow their weights, so that a product over few rows reads memory in one stream.
#pragma once

#include <cstddef>
#include <cstdint>

#include "lora_kernels/types.h"

namespace lora_kernels {

constexpr int64_t kInt8BlockChannels = 64;
constexpr int64_t kInt8StepDepth = 4;

constexpr int64_t int8_padded_depth(int64_t in_features) { return round_up(in_features, kInt8StepDepth); }
constexpr int64_t int8_block_bytes(int64_t in_features) {
  return kInt8BlockChannels * (int8_padded_depth(in_features) + 4 + 4);
}
constexpr int64_t int8_packed_bytes(int64_t out_features, int64_t in_features) {
  return round_up(out_features, kInt8BlockChannels) / kInt8BlockChannels * int8_block_bytes(in_features);
}

// Byte offset of weight (channel, k) within its block.
constexpr int64_t int8_weight_offset(int64_t channel_in_block, int64_t k) {
  return k / kInt8StepDepth * (kInt8BlockChannels * kInt8StepDepth) + channel_in_block * kInt8StepDepth +
         k % kInt8StepDepth;
}

// weight [N, K] int8 row-major in [-127, 127], scales [N] -> packed. Plain loops: done once per model.
void int8_pack(const int8_t* weight, const float* scales, int64_t out_features, int64_t in_features, uint8_t* packed);
// The exact inverse.
void int8_unpack(const uint8_t* packed, int64_t out_features, int64_t in_features, int8_t* weight, float* scales);

}  // namespace lora_kernels
