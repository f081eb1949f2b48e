#include "lora_kernels/int8_packing.h"

#include <cmath>
#include <cstring>

namespace lora_kernels {

void int8_pack(const int8_t* weight, const float* scales, int64_t out_features, int64_t in_features, uint8_t* packed) {
  const int64_t block_bytes = int8_block_bytes(in_features);
  const int64_t weight_bytes = kInt8BlockChannels * int8_padded_depth(in_features);
  for (int64_t n0 = 0; n0 < out_features; n0 += kInt8BlockChannels, packed += block_bytes) {
    std::memset(packed, 0, static_cast<size_t>(block_bytes));
    float block_scales[kInt8BlockChannels] = {};
    int32_t compensation[kInt8BlockChannels] = {};
    for (int64_t c = 0; c < kInt8BlockChannels && n0 + c < out_features; ++c) {
      const int8_t* row = weight + (n0 + c) * in_features;
      int32_t sum = 0;
      for (int64_t k = 0; k < in_features; ++k) {
        packed[int8_weight_offset(c, k)] = static_cast<uint8_t>(row[k]);
        sum += row[k];
      }
      block_scales[c] = scales[n0 + c];
      compensation[c] = -128 * sum;
    }
    std::memcpy(packed + weight_bytes, block_scales, sizeof block_scales);
    std::memcpy(packed + weight_bytes + sizeof block_scales, compensation, sizeof compensation);
  }
}

void int8_unpack(const uint8_t* packed, int64_t out_features, int64_t in_features, int8_t* weight, float* scales) {
  const int64_t block_bytes = int8_block_bytes(in_features);
  const int64_t weight_bytes = kInt8BlockChannels * int8_padded_depth(in_features);
  for (int64_t n = 0; n < out_features; ++n) {
    const uint8_t* block = packed + n / kInt8BlockChannels * block_bytes;
    const int64_t c = n % kInt8BlockChannels;
    for (int64_t k = 0; k < in_features; ++k)
      weight[n * in_features + k] = static_cast<int8_t>(block[int8_weight_offset(c, k)]);
    std::memcpy(scales + n, block + weight_bytes + c * sizeof(float), sizeof(float));
  }
}

void int8_pack_screen(const uint8_t* packed, int64_t out_features, int64_t in_features, uint8_t* screen) {
  const int64_t packed_bytes = int8_block_bytes(in_features), screen_bytes = int8_screen_block_bytes(in_features);
  const int64_t weight_bytes = kInt8BlockChannels * int8_padded_depth(in_features);
  const int64_t nibble_bytes = kInt8BlockChannels * int8_screen_steps(in_features) * 4;
  const double depth = in_features > 0 ? static_cast<double>(in_features) : 1.0;
  for (int64_t n0 = 0; n0 < out_features; n0 += kInt8BlockChannels, packed += packed_bytes, screen += screen_bytes) {
    std::memset(screen, 0, static_cast<size_t>(screen_bytes));
    float centers[kInt8BlockChannels] = {}, spreads[kInt8BlockChannels] = {};
    for (int64_t c = 0; c < kInt8BlockChannels && n0 + c < out_features; ++c) {
      int64_t sum = 0, squares = 0, total = 0, total_squares = 0, products = 0;
      for (int64_t k = 0; k < in_features; ++k) {
        const int w = static_cast<int8_t>(packed[int8_weight_offset(c, k)]) + 128;
        const int64_t at = (k / kScreenStepDepth * kInt8BlockChannels + c) * 4 + k % 4;
        screen[at] |= static_cast<uint8_t>(k % kScreenStepDepth < 4 ? w >> 4 : w & 0xf0);
        sum += w & 15, squares += (w & 15) * (w & 15);
        total += w, total_squares += w * w, products += w * (w & 15);
      }
      const double center = static_cast<double>(sum) / depth;
      centers[c] = static_cast<float>(center);
      const double mean = static_cast<double>(total) / depth;
      const auto positive = [](double v) { return v > 0 ? v : 0.0; };
      const double spread = std::sqrt(positive(static_cast<double>(squares) / depth - center * center));
      const double weight_spread = std::sqrt(positive(static_cast<double>(total_squares) / depth - mean * mean));
      const double shared = std::fabs(static_cast<double>(products) / depth - center * mean);
      // Weights that span few multiples of 16, an outlier's neighbours say, go with their low halves, and so does an x
      // that resembles them: such a channel gets the bound that no error exceeds (int8_screen.inl).
      const bool related = weight_spread < kScreenSpan || shared > kScreenRelated * spread * weight_spread;
      const double proven = std::sqrt(depth) / kScreenDeviations;
      spreads[c] = static_cast<float>(related && proven > 1 ? spread * proven : spread);
    }
    std::memcpy(screen + nibble_bytes, packed + weight_bytes, kInt8BlockChannels * sizeof(float));
    std::memcpy(screen + nibble_bytes + sizeof centers, centers, sizeof centers);
    std::memcpy(screen + nibble_bytes + 2 * sizeof centers, spreads, sizeof spreads);
  }
}

}  // namespace lora_kernels
