// The blocked layout of fixed INT8 keys and values (KvLayout::kBlocked): that of int8_packing.h, with positions in the
// place of output channels for K and in the place of depth for V. Per cache row and head, C positions of D channels:
//   K  int8 [C64 / 64][D4 / 4][64 positions][4 channels]   C64 = C rounded up to 64, D4 = D to 4
//   V  int8 [C4 / 4][D16][4 positions]                     C4 = C to 4, D16 = D to 16, one register of AVX-512
// in [-127, 127], the padding zero; scales fp32 [D] per channel. Four channels of q (weights of four positions) are
// broadcast against consecutive bytes of K (V): no horizontal sums, and each is read as one stream. K needs 64
// positions together to be that; a vector of a block that holds no visible position is not read.
//
// q and the softmax weights are integers of 14 bits, 128 * high + low with halves of 7, so what 8 bits lose is lost in
// K and V alone. A half takes one integer product: high is in [-127, 127], low in [0, 127]. Calls of many queries
// (kKvManyQueries: an encoder, bound by its products) round q to 8 bits, as K is: high alone.
#pragma once

#include "lora_kernels/types.h"

namespace lora_kernels {

constexpr int64_t kKvBlockPositions = 64;
constexpr int64_t kKvStep = 4;  // channels of K, positions of V in an int32 lane
constexpr int64_t kKvValueChannels = 16;
constexpr int32_t kKvMost = 127 * 128;  // of 14 bits
constexpr int64_t kKvManyQueries = 64;  // tokens of a row in one call
// Sums of products stay below 2^31: 127 * 127 per position, and 255 * 127 per channel with unsigned halves of q.
constexpr int64_t kKvMostPositions = 131072, kKvMostHeadSize = 65536;

constexpr int64_t kv_key_blocks(int64_t positions) {
  return round_up(positions, kKvBlockPositions) / kKvBlockPositions;
}
constexpr int64_t kv_key_steps(int64_t head_size) { return round_up(head_size, kKvStep) / kKvStep; }
constexpr int64_t kv_value_steps(int64_t positions) { return round_up(positions, kKvStep) / kKvStep; }
constexpr int64_t kv_value_channels(int64_t head_size) { return round_up(head_size, kKvValueChannels); }

// Of one cache row and head.
constexpr int64_t kv_key_bytes(int64_t positions, int64_t head_size) {
  return kv_key_blocks(positions) * kKvBlockPositions * kv_key_steps(head_size) * kKvStep;
}
constexpr int64_t kv_value_bytes(int64_t positions, int64_t head_size) {
  return kv_value_steps(positions) * kKvStep * kv_value_channels(head_size);
}

}  // namespace lora_kernels
