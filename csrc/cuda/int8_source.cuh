// What int8_lora_linear quantizes, where it lies: rows of x and a norm in global memory, or where they have been copied
// to in shared memory.
//
// Not measured: no GPU has run this.
#pragma once

#include "cuda/int8_shapes.h"
#include "cuda/routing.h"
#include "cuda/tile.h"

namespace lora_kernels::cuda {

struct Int8RowsParams {
  Matrix x;                           // [M, K]
  const void* norm_weight = nullptr;  // [K], or null: no LayerNorm
  const void* norm_bias = nullptr;    // [K]
  DType norm_type = DType::kFloat32;
  float norm_eps = 0;
  // Static scale: [1] on the device, where one that is no positive finite number gives NaN rows, or a value over 0.
  const float* x_scale = nullptr;
  float host_x_scale = 0;
  int8_t* q = nullptr;      // [M, q_stride]
  int64_t q_stride = 0;     // a multiple of 16, at least K64
  float* scales = nullptr;  // [M]
  Matrix a;                 // [R, K]
  Routing routing;
  void* t = nullptr;  // [M, t_stride]
  int64_t t_stride = 0;
  bool precise = true;            // fp32 in three tf32 products
  int rows_of_block = kInt8Rows;  // at most; fewer where that busies more multiprocessors
  // Of shared memory, for a row of x and for one of A of the part of depth; 0: they are read from L2 where they are
  // wanted, x in every pass. With x the norm's weight and bias come there too.
  int staged_bytes = 0, staged_a_bytes = 0;
};

template <class T>
__device__ inline T element_of(const Vector& v, int j) {
  if constexpr (sizeof(T) == 4)
    return from_bits<T>(v.v[j]);
  else
    return from_bits<T>(v.v[j / 2] >> 16 * (j % 2));
}

// LayerNorm of a row.
struct Int8Norm {
  float mean, factor;
};

// The rows from `first` on.
template <class T>
class Int8Source {
  static constexpr int kElements = kPerChunk<T>;

 public:
  __device__ Int8Source(const Int8RowsParams& p, int first)
      : p_(p),
        rows_(static_cast<const char*>(p.x.data) + int64_t{first} * p.x.stride * sizeof(T)),
        norm_weight_(static_cast<const char*>(p.norm_weight)),
        norm_bias_(static_cast<const char*>(p.norm_bias)),
        stride_(p.x.stride * static_cast<int64_t>(sizeof(T))),
        aligned_(p.x.aligned),
        norm_aligned_((reinterpret_cast<uintptr_t>(norm_weight_) | reinterpret_cast<uintptr_t>(norm_bias_)) % 16 == 0) {
  }

  // To shared memory, `count` rows and the norm; copies of one group that the caller commits and waits for.
  __device__ void stage(Shared& shared, int count) {
    const int bytes = p_.x.columns * static_cast<int>(sizeof(T)), chunks = (bytes + 15) / 16;
    char* memory =
        shared.template take<char>((p_.x.rows < p_.rows_of_block ? p_.x.rows : p_.rows_of_block) * p_.staged_bytes);
    for (int i = static_cast<int>(threadIdx.x); i < count * chunks; i += kInt8Threads) {
      const int m = i / chunks, at = i % chunks * 16;
      char* to = memory + m * p_.staged_bytes + at;
      if (aligned_)
        copy16_async(to, rows_ + m * stride_ + at, bytes - at < 16 ? bytes - at : 16);
      else
        store16(to, chunk(m, at / static_cast<int>(sizeof(T))));
    }
    rows_ = memory;
    stride_ = p_.staged_bytes;
    aligned_ = true;
    if (!p_.norm_weight || !norm_aligned_) return;
    const int norm_bytes = p_.x.columns * (p_.norm_type == DType::kFloat32 ? 4 : 2);
    const int norm_row = (norm_bytes + 15) / 16 * 16;
    char* norm = shared.template take<char>(2 * norm_row);
    const int half = static_cast<int>(threadIdx.x) / (kInt8Threads / 2);
    copy(norm + half * norm_row, half ? norm_bias_ : norm_weight_, norm_bytes,
         static_cast<int>(threadIdx.x) % (kInt8Threads / 2), kInt8Threads / 2);
    norm_weight_ = norm;
    norm_bias_ = norm + norm_row;
  }

  // Sixteen bytes of a row from element k on, k < K; zeros behind the row.
  __device__ Vector chunk(int m, int k) const {
    const int left = p_.x.columns - k;
    const T* from = reinterpret_cast<const T*>(rows_ + m * stride_) + k;
    if (aligned_ && left >= kElements) return load16(from);
    return gather16<T>(left < kElements ? left : kElements, [&](int j) { return from[j]; });
  }

  // What the operator sees as x, sixteen bytes of its storage; zeros behind the row.
  __device__ void values(float (&v)[kElements], int m, int k, const Int8Norm& norm) const {
    const Vector x = chunk(m, k);
#pragma unroll
    for (int j = 0; j < kElements; ++j) v[j] = to_float(element_of<T>(x, j));
    if (!p_.norm_weight) return;
    float weight[kElements], bias[kElements];
    norm_chunk(weight, norm_weight_, k);
    norm_chunk(bias, norm_bias_, k);
#pragma unroll
    for (int j = 0; j < kElements; ++j) v[j] = (v[j] - norm.mean) * norm.factor * weight[j] + bias[j];
  }

 private:
  // As many elements of a norm's weight or bias; zeros behind it.
  __device__ void norm_chunk(float (&out)[kElements], const char* of_norm, int k) const {
    const int left = p_.x.columns - k;
    if (norm_aligned_ && left >= kElements && p_.norm_type == DType::kFloat32) {
#pragma unroll
      for (int part = 0; part < kElements; part += 4) {
        const Vector v = load16(of_norm + (k + part) * 4);
#pragma unroll
        for (int j = 0; j < 4; ++j) out[part + j] = __uint_as_float(v.v[j]);
      }
    } else if (kElements == 8 && norm_aligned_ && left >= kElements) {
      const Vector v = load16(of_norm + k * 2);
      const bool half = p_.norm_type == DType::kFloat16;
#pragma unroll
      for (int j = 0; j < kElements; ++j)
        out[j] = half ? to_float(element_of<__half>(v, j)) : to_float(element_of<__nv_bfloat16>(v, j));
    } else {
#pragma unroll
      for (int j = 0; j < kElements; ++j) out[j] = j < left ? load_as_float(of_norm, k + j, p_.norm_type) : 0.0f;
    }
  }

  // `bytes` from `from` on (aligned to 16) by threads of which this is `thread`.
  __device__ static void copy(char* to, const char* from, int bytes, int thread, int threads) {
#pragma unroll 1
    for (int at = thread * 16; at < bytes; at += threads * 16)
      copy16_async(to + at, from + at, bytes - at < 16 ? bytes - at : 16);
  }

  const Int8RowsParams& p_;
  const char *rows_, *norm_weight_, *norm_bias_;
  int64_t stride_;
  bool aligned_, norm_aligned_;
};

}  // namespace lora_kernels::cuda
