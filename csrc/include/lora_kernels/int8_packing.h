// The packed layout of INT8 weights: one layout for every implementation, every number of rows, and CUDA devices.
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

#include "lora_kernels/status.h"
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
// The same in the memory of a CUDA device, on a cudaStream_t.
Status int8_unpack_cuda(const uint8_t* packed, int64_t out_features, int64_t in_features, int8_t* weight, float* scales,
                        void* stream);

// The screen of a vocabulary: half of the bytes of its packed weight, enough to tell which few columns can be among the
// largest (cpu/int8_screen.inl). The weight is w = 16 (u - 8) + l; the screen has the high nibbles u, 0 to 15, of the
// same blocks of 64 channels:
//   nibbles  uint8 [K8 / 8][64][4]  K8 = K rounded up to 8; byte j of step s: u of k = 8 s + j below, 8 s + 4 + j above
//   scales   fp32 [64]              those of the weight
//   centers  fp32 [64]              the mean of the channel's l
//   spreads  fp32 [64]              the standard deviation of the channel's l about it, or more: see int8_pack_screen
constexpr int64_t kScreenStepDepth = 2 * kInt8StepDepth;
// What is left unread is taken to be off by at most so many standard deviations.
constexpr double kScreenDeviations = 8;

constexpr int64_t int8_screen_steps(int64_t in_features) {
  return round_up(in_features, kScreenStepDepth) / kScreenStepDepth;
}
constexpr int64_t int8_screen_block_bytes(int64_t in_features) {
  return kInt8BlockChannels * (int8_screen_steps(in_features) * 4 + 3 * 4);
}
constexpr int64_t int8_screen_bytes(int64_t out_features, int64_t in_features) {
  return round_up(out_features, kInt8BlockChannels) / kInt8BlockChannels * int8_screen_block_bytes(in_features);
}

// Packed weight -> its screen. Once per model, as well. Low nibbles are noise to an x that resembles the weight only if
// they do not go with the weight. They do where weights span few multiples of 16 (beside an outlier, say): channels
// whose weights have a standard deviation below kScreenSpan, or a correlation with their low nibbles above
// kScreenRelated, get sqrt(K) / kScreenDeviations times their spread: no error is larger (Cauchy and Schwarz).
constexpr double kScreenSpan = 16, kScreenRelated = 0.2;
void int8_pack_screen(const uint8_t* packed, int64_t out_features, int64_t in_features, uint8_t* screen);

}  // namespace lora_kernels
