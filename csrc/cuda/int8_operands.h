// The packed weight, the LoRA factor B and the end of the sums, as the kernels of int8_lora_linear share them.
//
// The weight is the CPU's layout (int8_packing.h), as it is. Its words of four k are what a lane hands to the tensor
// cores, and neighbours in memory are neighbouring channels: sixteen bytes are the words of channels 4 g ... 4 g + 3,
// one for each of four products of eight columns, if column g of product j is taken to be channel 4 g + j. So lanes
// read whole sixteen bytes, eight lanes a line of 128, and each ends with eight channels of y that lie together. One
// layout serves every device: packed_weight moves with .to("cuda"), and sums are comparable bit for bit.
#pragma once

#include "cuda/epilogue.h"
#include "cuda/routing.h"
#include "cuda/tile.h"
#include "lora_kernels/int8_packing.h"

namespace lora_kernels::cuda {

constexpr int kInt8StepBytes = static_cast<int>(kInt8BlockChannels * kInt8StepDepth);

struct PackedWeight {
  const uint8_t* data = nullptr;
  int64_t block_bytes = 0;
  int steps = 0;    // of four k
  int columns = 0;  // N

  __device__ int blocks() const { return (columns + 63) / 64; }
  // Sixteen bytes of channels `channel` on, a multiple of 4, at one step; both must be there.
  __device__ const uint8_t* at(int channel, int step) const {
    return data + channel / 64 * block_bytes + step * kInt8StepBytes + channel % 64 * 4;
  }
  __device__ float scale(int channel) const {
    return reinterpret_cast<const float*>(data + channel / 64 * block_bytes + steps * kInt8StepBytes)[channel % 64];
  }
};

// B: element (r, n) of any floating type, by rank row with any strides or in blocks of 64 columns.
struct UpFactor {
  const void* data = nullptr;
  int64_t stride_rank = 0, stride_out = 0, stride_block = 0;  // stride_block: from one 64 columns to the next
  DType type = DType::kFloat32;

  __device__ int64_t offset(int64_t r, int n) const {
    return r * stride_rank + n / 64 * stride_block + n % 64 * stride_out;
  }
  __device__ float at(int64_t r, int n) const { return load_as_float(data, offset(r, n), type); }
  // Elements (r, n) and behind it in depth, so many, as T: without a look at the type for each of them where it is T.
  template <class T>
  __device__ Vector chunk(int64_t r, int n, int count) const {
    if (type != kDTypeOf<T>) return gather16<T>(count, [&](int j) { return from_float<T>(at(r + j, n)); });
    const T* from = static_cast<const T*>(data) + offset(r, n);
    return gather16<T>(count, [&](int j) { return from[j * stride_rank]; });
  }
};

struct Int8Epilogue {
  Epilogue e;
  bool wide = false;    // y is fp32, whatever the type of x: what the choice among outputs reads
  bool eights = false;  // eight neighbours of y (and residual) can be stored and loaded at once

  template <class T>
  __device__ void store(float sum, int64_t row, int column) const {
    if (wide)
      e.store<float>(sum, row, column);
    else
      e.store<T>(sum, row, column);
  }

  // The values at `column`, a multiple of kCount (2 or 4), and those behind it, of which some may lie outside, but for
  // the residual; `whole`: `eights`, known beforehand. Not for a wide y.
  template <class T, int kCount>
  __device__ void store_run(const float (&values)[kCount], int64_t row, int column, bool whole) const {
    constexpr int kWords = kCount * static_cast<int>(sizeof(T)) / 4;
    T* to = static_cast<T*>(e.y) + row * e.columns + column;
    if (!whole) {
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        if (column + i < e.columns) to[i] = from_float<T>(e.with_residual<T>(values[i], row, column + i));
      return;
    }
    if (column >= e.columns) return;
    uint32_t words[kWords] = {};
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      words[i * kWords / kCount] |= bits_of<T>(from_float<T>(e.with_residual<T>(values[i], row, column + i)))
                                    << (sizeof(T) == 2 ? i % 2 * 16 : 0);
    if constexpr (kWords == 4)
      store16(to, {{words[0], words[1], words[2], words[3]}});
    else if constexpr (kWords == 2)
      *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[1]);
    else
      *reinterpret_cast<uint32_t*>(to) = words[0];
  }

  // The sums at `column`, a multiple of 8, and the seven behind it, of which some may lie outside.
  template <class T>
  __device__ void store_eight(const float (&sums)[8], int64_t row, int column) const {
    if (wide)
      store_eight_as<float>(sums, row, column);
    else
      store_eight_as<T>(sums, row, column);
  }

 private:
  template <class Y>
  __device__ void store_eight_as(const float (&sums)[8], int64_t row, int column) const {
    if (!eights || column + 8 > e.columns) {
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (column + i < e.columns) e.store<Y>(sums[i], row, column + i);
      return;
    }
#pragma unroll
    for (int part = 0; part < 8; part += kPerChunk<Y>)
      store16(static_cast<Y*>(e.y) + row * e.columns + column + part, gather16<Y>(kPerChunk<Y>, [&](int j) {
                return from_float<Y>(e.finish<Y>(sums[part + j], row, column + part + j));
              }));
  }
};

}  // namespace lora_kernels::cuda
