// What follows the sums of a result: bias, activation, residual, storage type.
#pragma once

#include "cuda/numbers.h"

namespace lora_kernels::cuda {

// B by rank row, with any strides and of any floating type: element (r, n) at r * stride_rank + n * stride_out.
struct Factor {
  const void* data = nullptr;
  int64_t stride_rank = 0, stride_out = 0;
  DType type = DType::kFloat32;

  __device__ float at(int64_t r, int64_t n) const {
    return load_as_float(data, r * stride_rank + n * stride_out, type);
  }
};

struct Epilogue {
  const void* bias = nullptr;  // [columns], or null
  DType bias_type = DType::kFloat32;
  Activation activation = Activation::kNone;
  const void* residual = nullptr;  // [rows, columns] contiguous, of the result's type, or null
  void* y = nullptr;               // [rows, columns] contiguous
  int columns = 0;
  bool pairs = false;  // two neighbours of y (and residual) can be stored at once

  __device__ float bias_at(int column) const { return load_as_float(bias, column, bias_type); }

  // What is stored for a sum at this place.
  template <class T>
  __device__ float finish(float sum, int64_t row, int column) const {
    float v = sum;
    if (bias) v += bias_at(column);
    return with_residual<T>(activate<T>(v, activation), row, column);
  }
  template <class T>
  __device__ float with_residual(float v, int64_t row, int column) const {
    return residual ? v + to_float(static_cast<const T*>(residual)[row * columns + column]) : v;
  }

  template <class T>
  __device__ void store(float sum, int64_t row, int column) const {
    static_cast<T*>(y)[row * columns + column] = from_float<T>(finish<T>(sum, row, column));
  }

  // The sums at `column` and the one behind it, of which the second may lie outside.
  template <class T>
  __device__ void store_two(float first, float second, int64_t row, int column) const {
    if (!pairs || column + 1 >= columns) {
      store<T>(first, row, column);
      if (column + 1 < columns) store<T>(second, row, column + 1);
      return;
    }
    const float v0 = finish<T>(first, row, column), v1 = finish<T>(second, row, column + 1);
    T* to = static_cast<T*>(y) + row * columns + column;
    if constexpr (sizeof(T) == 4)
      *reinterpret_cast<float2*>(to) = make_float2(v0, v1);
    else
      *reinterpret_cast<uint32_t*>(to) = bits_of<T>(from_float<T>(v0)) | bits_of<T>(from_float<T>(v1)) << 16;
  }
};

}  // namespace lora_kernels::cuda
