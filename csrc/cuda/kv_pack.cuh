// kv_pack on a CUDA device: each channel's scale is amax / 127 over the positions, and clamp(rint(x * (127 / amax)))
// goes to the blocks of kv_packing.h, which are the CPU's: by its expressions, the same bits.
//   Bytes: k and v twice, the second time from L2 where one utterance's head fits there, and their INT8 once: bound by
//   memory. Once per utterance and layer.
//
// A block takes 64 channels of a head of k or v. Lanes of a warp read along channels; the bytes of 64 positions wait in
// shared memory for their words, which are written along memory: positions of K, channels of V.
//
// Not measured: no GPU has run this.
#pragma once

#include "cuda/kv_shapes.h"
#include "cuda/numbers.h"
#include "cuda/primitives/launch.h"
#include "lora_kernels/kv_packing.h"

namespace lora_kernels::cuda {

struct KvPackParams {
  const void *k = nullptr, *v = nullptr;
  int64_t k_stride = 0, v_stride = 0, k_row_stride = 0, v_row_stride = 0;  // elements between positions, utterances
  int8_t *packed_k = nullptr, *packed_v = nullptr;
  int64_t key_bytes = 0, value_bytes = 0;  // of a head
  float *k_scales = nullptr, *v_scales = nullptr;
  int positions = 0, heads = 0, head_size = 0;
};

// Grid (utterances * H, ceil(D / 64), k or v).
template <class Q>
__global__ void __launch_bounds__(kKvPackThreads) kv_pack_kernel(const KvPackParams p) {
  constexpr int kRows = kKvPackThreads / kKvPackChannels, kTileRow = kKvPackChannels + 4;
  wait_for_kernel_before();
  Shared shared;
  uint32_t* largest = shared.take<uint32_t>(kKvPackThreads);
  float* inverses = shared.take<float>(kKvPackChannels);
  int8_t* tile = shared.take<int8_t>(kKvPackPositions * kTileRow);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kKvPackChannels, group = thread / kKvPackChannels;
  const int64_t at = blockIdx.x, utterance = at / p.heads, head = at % p.heads;
  const int first = static_cast<int>(blockIdx.y) * kKvPackChannels, channel = first + lane;
  const bool keys = blockIdx.z == 0, there = channel < p.head_size;
  const int64_t stride = keys ? p.k_stride : p.v_stride;
  const Q* from = static_cast<const Q*>(keys ? p.k : p.v) + utterance * (keys ? p.k_row_stride : p.v_row_stride) +
                  head * p.head_size + channel;

  uint32_t bits = 0;  // as bits, infinities and NaNs are the largest
  if (there)
#pragma unroll 8
    for (int i = group; i < p.positions; i += kRows)
      bits = max(bits, __float_as_uint(to_float(from[i * stride])) & 0x7FFFFFFFu);
  largest[thread] = bits;
  __syncthreads();
  if (group == 0) {
    for (int i = 1; i < kRows; ++i) bits = max(bits, largest[i * kKvPackChannels + lane]);
    const float most = __uint_as_float(bits), inverse = 127.0f / most;
    const bool finite = bits < 0x7F800000u, fits = finite && inverse <= 3.4028235e38f;
    inverses[lane] = fits ? inverse : 0.0f;
    if (there)
      (keys ? p.k_scales : p.v_scales)[at * p.head_size + channel] = fits     ? most / 127.0f
                                                                     : finite ? 0.0f
                                                                              : not_a_number();
  }
  __syncthreads();
  const float inverse = inverses[lane];
  constexpr int kWordBytes = static_cast<int>(kKvStep), kBlock = static_cast<int>(kKvBlockPositions);
  const int value_channels = static_cast<int>(kv_value_channels(p.head_size));
  const int key_steps = static_cast<int>(kv_key_steps(p.head_size));
  for (int base = 0; base < p.positions; base += kKvPackPositions) {
#pragma unroll 4
    for (int i = group; i < kKvPackPositions; i += kRows) {
      // A channel without a finite inverse is zero, whatever it holds.
      float x = 0;
      if (there && inverse > 0 && base + i < p.positions) x = to_float(from[(base + i) * stride]) * inverse;
      tile[i * kTileRow + lane] = static_cast<int8_t>(fminf(fmaxf(rintf(x), -127.0f), 127.0f));
    }
    __syncthreads();
    for (int i = thread; i < kKvPackPositions * kKvPackChannels / kWordBytes; i += kKvPackThreads) {
      uint32_t word = 0;
      if (keys) {
        const int position = i % kKvPackPositions, step = i / kKvPackPositions;
#pragma unroll
        for (int e = 0; e < kWordBytes; ++e)
          word |= static_cast<uint32_t>(static_cast<uint8_t>(tile[position * kTileRow + step * kWordBytes + e]))
                  << 8 * e;
        if (first / kWordBytes + step < key_steps)
          reinterpret_cast<uint32_t*>(
              p.packed_k +
              at * p.key_bytes)[(static_cast<int64_t>(base / kBlock) * key_steps + first / kWordBytes + step) * kBlock +
                                position] = word;
      } else {
        const int column = i % kKvPackChannels, step = i / kKvPackChannels;
#pragma unroll
        for (int e = 0; e < kWordBytes; ++e)
          word |= static_cast<uint32_t>(static_cast<uint8_t>(tile[(step * kWordBytes + e) * kTileRow + column]))
                  << 8 * e;
        if (first + column < value_channels && base + step * kWordBytes < p.positions)
          reinterpret_cast<uint32_t*>(
              p.packed_v +
              at * p.value_bytes)[(static_cast<int64_t>(base / kWordBytes) + step) * value_channels + first + column] =
              word;
      }
    }
    __syncthreads();
  }
}

}  // namespace lora_kernels::cuda
