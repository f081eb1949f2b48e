// The packed weight (int8_packing.h) by rows again: weight [N, K] int8 and scales [N]. Once per model or, where a
// gradient needs the weight, once per backward pass: 2 N K bytes. A thread takes 32 k of a channel: words of
// neighbouring channels are read together, and whole sectors of a row are written.
#pragma once

#include "cuda/primitives/launch.h"
#include "lora_kernels/int8_packing.h"

namespace lora_kernels::cuda {

constexpr int kInt8UnpackThreads = 256;
constexpr int kInt8UnpackEach = 32;  // k of a thread
constexpr int kInt8UnpackDepth = kInt8UnpackThreads / static_cast<int>(kInt8BlockChannels) * kInt8UnpackEach;

struct Int8UnpackParams {
  const uint8_t* packed = nullptr;
  int columns = 0, depth = 0;  // N, K
  int64_t block_bytes = 0;     // of 64 channels
  int64_t weight_bytes = 0;    // of these, before the scales
  int8_t* weight = nullptr;    // [N, K]
  float* scales = nullptr;     // [N]
};

// Grid (blocks of 64 channels, depth). W is int8_t.
template <class W>
__global__ void __launch_bounds__(kInt8UnpackThreads) int8_unpack_kernel(const Int8UnpackParams p) {
  const int thread = static_cast<int>(threadIdx.x), channel = thread % 64;
  const int64_t n = int64_t{blockIdx.x} * kInt8BlockChannels + channel;
  if (n >= p.columns) return;
  const uint8_t* block = p.packed + blockIdx.x * p.block_bytes;
  if (blockIdx.y == 0 && thread < 64) p.scales[n] = reinterpret_cast<const float*>(block + p.weight_bytes)[channel];
  const int first = static_cast<int>(blockIdx.y) * kInt8UnpackDepth + thread / 64 * kInt8UnpackEach;
  W* to = static_cast<W*>(p.weight) + n * p.depth;
  for (int k = first; k < first + kInt8UnpackEach && k < p.depth; k += 4) {
    const uint32_t word = *reinterpret_cast<const uint32_t*>(block + k * kInt8BlockChannels + channel * 4);
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (k + e < p.depth) to[k + e] = static_cast<W>(word >> 8 * e);
  }
}

}  // namespace lora_kernels::cuda
