// Eight neighbouring channels of a vector of K, V or q, as tensor-core products take them.
//
// A product's sum does not care for the order of depth, nor its result for the order of columns, so lanes read eight
// channels that lie together: as K and q, eight channels of depth, four lanes a line of 32; as V, eight columns, eight
// lanes a line of 64. No element goes through shared memory.
#pragma once

#include "cuda/numbers.h"

namespace lora_kernels::cuda {

// What products are made in: the type of q if the cache has it too or is INT8 (whose integers every type holds), else
// tf32 in three products.
template <class Q, class S>
using KvProduct = std::conditional_t<std::is_same_v<Q, S> || std::is_same_v<S, int8_t>, Q, float>;

// As they lie in memory.
template <class S>
struct KvRaw {
  static constexpr int kWords = 2 * static_cast<int>(sizeof(S));
  uint32_t w[kWords];

  __device__ float at(int i) const {
    if constexpr (std::is_same_v<S, int8_t>)
      // 2^23 + 128 + x as the bits of a float, which is exact and takes two cheap operations; a conversion takes a slow
      // one.
      return __uint_as_float(0x4B000000u | ((w[i / 4] ^ 0x80808080u) >> 8 * (i % 4) & 255)) - 8388736.0f;
    else if constexpr (sizeof(S) == 2)
      return to_float(from_bits<S>(w[i / 2] >> 16 * (i % 2)));
    else
      return __uint_as_float(w[i]);
  }
};

struct alignas(8) HalfVector {
  uint32_t v[2];
};

// Channels `channel` on of a vector of `size`; those behind it are zero. `aligned`: all vectors begin on 16 bytes (8 of
// INT8), and have whole eights.
template <class S>
__device__ inline KvRaw<S> load_eight(const void* vector, int channel, int size, bool aligned) {
  KvRaw<S> raw = {};
  if (channel >= size) return raw;
  const S* from = static_cast<const S*>(vector) + channel;
  if (aligned) {
    if constexpr (sizeof(S) == 1) {
      const HalfVector v = *reinterpret_cast<const HalfVector*>(from);
      raw.w[0] = v.v[0], raw.w[1] = v.v[1];
    } else {
#pragma unroll
      for (int part = 0; part < KvRaw<S>::kWords / 4; ++part) {
        const Vector v = load16(from + part * kPerChunk<S>);
#pragma unroll
        for (int i = 0; i < 4; ++i) raw.w[part * 4 + i] = v.v[i];
      }
    }
    return raw;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (channel + i >= size) continue;
    constexpr int kPerWord = 4 / static_cast<int>(sizeof(S));
    const uint32_t bits = sizeof(S) == 1 ? static_cast<uint8_t>(from[i]) : bits_of<S>(from[i]);
    raw.w[i / kPerWord] |= bits << 32 / kPerWord * (i % kPerWord);
  }
  return raw;
}

// In the type of the products: word 2 s and the next one are what a lane brings to step s over depth.
template <class T>
struct KvEight {
  static constexpr int kWords = 2 * static_cast<int>(sizeof(T));
  static constexpr int kSteps = kWords / 2;
  uint32_t w[kWords];
};

template <class T, class Value>
__device__ inline KvEight<T> eight_of(const Value& value) {
  KvEight<T> e;
#pragma unroll
  for (int i = 0; i < KvEight<T>::kWords; ++i) {
    if constexpr (sizeof(T) == 4)
      e.w[i] = __float_as_uint(value(i));
    else
      e.w[i] = bits_of<T>(from_float<T>(value(2 * i))) | bits_of<T>(from_float<T>(value(2 * i + 1))) << 16;
  }
  return e;
}

// `factor`: of INT8 alone.
template <class T, class S>
__device__ inline KvEight<T> eight_of(const KvRaw<S>& raw, [[maybe_unused]] float factor = 1.0f) {
  if constexpr (std::is_same_v<T, S>) {
    KvEight<T> e;
#pragma unroll
    for (int i = 0; i < KvEight<T>::kWords; ++i) e.w[i] = raw.w[i];
    return e;
  } else if constexpr (std::is_same_v<S, int8_t>) {
    return eight_of<T>([&](int i) { return raw.at(i) * factor; });
  } else {
    return eight_of<T>([&](int i) { return raw.at(i); });
  }
}

// Channel j of V at two positions, as one word of 16-bit depth.
__device__ inline uint32_t pair_of(uint32_t first, uint32_t second, int half) {
  return half ? first >> 16 | (second & 0xFFFF0000u) : (first & 0xFFFFu) | second << 16;
}

}  // namespace lora_kernels::cuda
