// Storage types on the device: conversions, products on tensor cores at the precision asked for, dropout.
#pragma once

#include <type_traits>

#include "cuda/activation.h"
#include "cuda/primitives/copy.h"
#include "cuda/primitives/matrix.h"
#include "lora_kernels/philox.h"
#include "lora_kernels/types.h"

namespace lora_kernels::cuda {

// Elements of one access of 16 bytes, and of one step over depth: the 64 bytes that two (16 bits) or two (tf32)
// tensor-core products consume. The bytes are the same for every type, so one code addresses all of them.
template <class T>
constexpr int kPerChunk = 16 / static_cast<int>(sizeof(T));
constexpr int kStepBytes = 64;
template <class T>
constexpr int kStep = kStepBytes / static_cast<int>(sizeof(T));

// sm_75 multiplies fp16 alone on its tensor cores: kernels of other types are empty there, and never launched.
template <class T>
constexpr bool kCompiled = kArch >= 80 || std::is_same_v<T, __half>;

template <class T>
__device__ inline float to_float(T x) {
  if constexpr (std::is_same_v<T, float>)
    return x;
  else if constexpr (std::is_same_v<T, __half>)
    return __half2float(x);
  else
    return __bfloat162float(x);
}

template <class T>
__device__ inline T from_float(float x) {
  if constexpr (std::is_same_v<T, float>)
    return x;
  else if constexpr (std::is_same_v<T, __half>)
    return __float2half(x);
  else
    return __float2bfloat16(x);
}

template <class T>
__device__ inline uint32_t bits_of(T x) {
  if constexpr (sizeof(T) == 4) {
    return __float_as_uint(x);
  } else {
    uint16_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
  }
}

template <class T>
__device__ inline T from_bits(uint32_t bits) {
  T x;
  if constexpr (sizeof(T) == 4) {
    x = __uint_as_float(bits);
  } else {
    const uint16_t low = static_cast<uint16_t>(bits);
    memcpy(static_cast<void*>(&x), &low, sizeof x);
  }
  return x;
}

__device__ inline float negative_infinity() { return __uint_as_float(0xFF800000u); }
__device__ inline float not_a_number() { return __uint_as_float(0x7FFFFFFFu); }

template <class T>
constexpr DType kDTypeOf = std::is_same_v<T, float>    ? DType::kFloat32
                           : std::is_same_v<T, __half> ? DType::kFloat16
                                                       : DType::kBFloat16;

// Element `at` of an array whose type is known at run time only: factors and biases.
__device__ inline float load_as_float(const void* p, int64_t at, DType type) {
  if (type == DType::kFloat32) return static_cast<const float*>(p)[at];
  if (type == DType::kFloat16) return to_float(static_cast<const __half*>(p)[at]);
  return to_float(static_cast<const __nv_bfloat16*>(p)[at]);
}

// How many of `left` elements, which may be fewer than none, a chunk of sixteen bytes has.
template <class T>
__device__ inline int of_chunk(int left) {
  return left < 0 ? 0 : left > kPerChunk<T> ? kPerChunk<T> : left;
}

// Sixteen bytes of elements: the first `count` are element(0), element(1), ..., the rest zero.
template <class T, class Element>
__device__ inline Vector gather16(int count, const Element& element) {
  Vector v = {{0, 0, 0, 0}};
#pragma unroll
  for (int j = 0; j < kPerChunk<T>; ++j) {
    if (j >= count) continue;
    const uint32_t bits = bits_of<T>(element(j));
    if constexpr (sizeof(T) == 4)
      v.v[j] = bits;
    else
      v.v[j / 2] |= bits << 16 * (j % 2);
  }
  return v;
}

// c += a b in one tensor-core step. With `precise`, fp32 is split into two tf32 parts, and the three products that
// matter are added, small ones first: about 2^-22 of each product is lost instead of 2^-11. An infinity becomes NaN on
// the way (its smaller part is infinity minus itself), as in every such scheme.
template <class T>
__device__ inline void product(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                               [[maybe_unused]] bool precise) {
  if constexpr (std::is_same_v<T, float>) {
    uint32_t a_large[4], b_large[2];
    const uint32_t b[2] = {b0, b1};
#pragma unroll
    for (int i = 0; i < 4; ++i) a_large[i] = round_to_tf32(__uint_as_float(a[i]));
#pragma unroll
    for (int i = 0; i < 2; ++i) b_large[i] = round_to_tf32(__uint_as_float(b[i]));
    if (precise) {
      uint32_t a_small[4], b_small[2];
#pragma unroll
      for (int i = 0; i < 4; ++i) a_small[i] = round_to_tf32(__uint_as_float(a[i]) - __uint_as_float(a_large[i]));
#pragma unroll
      for (int i = 0; i < 2; ++i) b_small[i] = round_to_tf32(__uint_as_float(b[i]) - __uint_as_float(b_large[i]));
      mma_step(T(), c, a_small, b_large[0], b_large[1]);
      mma_step(T(), c, a_large, b_small[0], b_small[1]);
    }
    mma_step(T(), c, a_large, b_large[0], b_large[1]);
  } else {
    mma_step(T(), c, a, b0, b1);
  }
}

// Which elements dropout keeps: the mask of philox.h, the CPU's bit for bit. Elements come in order of their index, so
// the numbers of a counter are drawn once for up to four of them.
struct Dropout {
  uint64_t seed = 0;
  const int64_t* seed_on_device = nullptr;  // in its place: a captured graph then draws anew when its value changes
  uint32_t threshold = 0;
  bool on = false;

  __device__ Dropout with_seed() const {
    Dropout d = *this;
    if (on && seed_on_device) d.seed = static_cast<uint64_t>(*seed_on_device);
    return d;
  }
};

class DropoutStream {
 public:
  __device__ DropoutStream(const Dropout& dropout, uint64_t index) : dropout_(dropout), index_(index) {
    if (index_ % 4) numbers_ = philox(dropout_.seed, index_ / 4);
  }
  __device__ bool keeps_next() {
    if (index_ % 4 == 0) numbers_ = philox(dropout_.seed, index_ / 4);
    const uint32_t lane = static_cast<uint32_t>(index_++ % 4);
    // chosen by comparisons: an index known at run time only would put the numbers into local memory
    const uint32_t low = lane & 1 ? numbers_.v[1] : numbers_.v[0], high = lane & 1 ? numbers_.v[3] : numbers_.v[2];
    return (lane & 2 ? high : low) >= dropout_.threshold;
  }

 private:
  const Dropout& dropout_;
  uint64_t index_;
  Philox4 numbers_ = {};
};

// Bit e says whether element index + e is kept; count <= 32. A loop, not unrolled: ten rounds of each of many counters
// in flight at the same time would not fit the registers.
__device__ inline uint32_t kept_bits(const Dropout& dropout, uint64_t index, int count) {
  DropoutStream stream(dropout, index);
  uint32_t bits = 0;
#pragma unroll 1
  for (int e = 0; e < count; ++e) bits |= static_cast<uint32_t>(stream.keeps_next()) << e;
  return bits;
}

// Sixteen bytes of elements, those whose bit is 0 set to zero.
template <class T>
__device__ inline Vector drop(const Vector& v, uint32_t kept) {
  Vector out = v;
#pragma unroll
  for (int j = 0; j < kPerChunk<T>; ++j) {
    const bool keep = kept >> j & 1;
    if constexpr (sizeof(T) == 4)
      out.v[j] = keep ? out.v[j] : 0;
    else
      out.v[j / 2] &= keep ? 0xFFFFFFFFu : (j % 2 ? 0x0000FFFFu : 0xFFFF0000u);
  }
  return out;
}

}  // namespace lora_kernels::cuda
