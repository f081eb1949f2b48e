// Rows of x as int8_lora_linear multiplies them: INT8 with a scale per row, and t = s x At for the LoRA branch.
//   most = max |x|; inverse = 127 / most; q = clamp(round_half_even(x * inverse), -127, 127); scale = most / 127, or by
//   a calibrated scale (1 / x_scale and x_scale). All in fp32 by the CPU's expressions: the same q, bit for bit. With
//   has_norm x first goes through LayerNorm in fp32, whose sums are in another order than a CPU's: q may then differ by
//   one where a value lies between two integers.
//
//   x [M, K] in any floating type -> q [M, K64] int8, zeros from K on (K64 = K rounded up to 64); scales [M];
//   t [M, t_stride] in the type of x, by the ranks of each row's own adapter
//
// A block takes sixteen rows: what one tensor-core product of t has. FLOPs 2 M r K; bytes M K (size + 1), A from L2 for
// every block: bound by memory. x is read from there once: where sixteen rows fit they wait in shared memory between
// the passes (maximum, or mean and variance before it; t; q), elsewhere in L2. Few rows share the warps: all eight work
// on one row. A device function, so that few_rows (int8_skinny.cuh) can do the same inside its own blocks.
// It may start before the kernel before it has finished, and waits for it before it loads anything.
//
// Not measured: no GPU has run this.
#pragma once

#include "cuda/int8_shapes.h"
#include "cuda/primitives/launch.h"
#include "cuda/skinny.cuh"

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
  bool precise = true;   // fp32 in three tf32 products
  int staged_bytes = 0;  // of shared memory for a row of x between the passes; 0: it is read again from L2
};

template <class T>
__device__ inline T element_of(const Vector& v, int j) {
  if constexpr (sizeof(T) == 4)
    return from_bits<T>(v.v[j]);
  else
    return from_bits<T>(v.v[j / 2] >> 16 * (j % 2));
}

// Sixteen rows from `first` on. kTiles: ranks of one pass over depth, in eights.
template <class T, int kTiles>
class Int8Rows {
  using Adapters = TileAdapters<kInt8Rows, kInt8Threads>;
  static_assert(kInt8Threads == kSkinnyThreads && kInt8Rows == kSkinnyRows, "parts are added as few_rows adds them");
  static_assert((Adapters::kWords * 4 + 15) / 16 * 16 == 144, "int8_rows_bytes counts them");

 public:
  // Takes int8_rows_bytes(kTiles) and the staged rows.
  __device__ Int8Rows(const Int8RowsParams& p, Shared& shared, int first)
      : p_(p), first_(first), warp_(static_cast<int>(threadIdx.x) / 32), lane_(lane_of_warp()) {
    sums_ = shared.template take<float>(kInt8Warps);
    most_ = shared.template take<int>(kInt8Warps);
    mean_ = shared.template take<float>(kInt8Rows);
    factor_ = shared.template take<float>(kInt8Rows);
    parts_ = shared.template take<float>(kSkinnyWarps * kSkinnyRows * 8 * kTiles);
    words_ = shared.template take<int>(Adapters::kWords);
    rows_ = static_cast<const char*>(p.x.data) + int64_t{first} * p.x.stride * sizeof(T);
    stride_ = p.x.stride * static_cast<int64_t>(sizeof(T));
    present_ = p.x.rows - first < kInt8Rows ? p.x.rows - first : kInt8Rows;
    aligned_ = p.x.aligned;
    if (p.staged_bytes) stage(shared.template take<char>(kInt8Rows * p.staged_bytes));
  }

  // q and scales, then t if there are adapters. `q`, `scales` and `t` begin with row `first`. Ends with a barrier.
  __device__ void run(int8_t* q, float* scales, T* t) {
    int team = kInt8Warps;  // warps that share a row
    while (team > 1 && team * present_ > kInt8Warps) team /= 2;
    const int at_once = kInt8Warps / team;
    for (int m = 0; m < present_; m += at_once) quantize(m + warp_ / team, team, q, scales);
    __syncthreads();
    if (p_.routing.adapters == 0) return;
    const Adapters adapters(p_.routing, words_, first_, p_.x.rows);
    for (int slot = 0; slot < adapters.count(); ++slot) down(adapters, adapters.adapter(slot), t);
  }

 private:
  __device__ const T* row(int m) const { return reinterpret_cast<const T*>(rows_ + m * stride_); }

  // Sixteen bytes of a row from element k on, k < K; zeros behind the row.
  __device__ Vector chunk(int m, int k) const {
    const int left = p_.x.columns - k;
    const T* from = row(m) + k;
    if (aligned_ && left >= kPerChunk<T>) return load16(from);
    return gather16<T>(left < kPerChunk<T> ? left : kPerChunk<T>, [&](int j) { return from[j]; });
  }

  // What the operator sees as x.
  __device__ float value(float x, int m, int k) const {
    if (!p_.norm_weight || k >= p_.x.columns) return x;
    return (x - mean_[m]) * factor_[m] * load_as_float(p_.norm_weight, k, p_.norm_type) +
           load_as_float(p_.norm_bias, k, p_.norm_type);
  }

  __device__ void stage(char* memory) {
    const int chunks = (p_.x.columns + kPerChunk<T> - 1) / kPerChunk<T>;
    for (int i = static_cast<int>(threadIdx.x); i < present_ * chunks; i += kInt8Threads)
      store16(memory + i / chunks * p_.staged_bytes + i % chunks * 16, chunk(i / chunks, i % chunks * kPerChunk<T>));
    rows_ = memory;
    stride_ = p_.staged_bytes;
    aligned_ = true;
    __syncthreads();
  }

  // The team's values in one, the same for all its lanes: over lanes, then over its warps in order. All warps call.
  template <class V, class Op>
  __device__ V reduce(V v, V* memory, int team, const Op& op) const {
#pragma unroll
    for (int by = 16; by > 0; by /= 2) v = op(v, __shfl_xor_sync(~0u, v, by));
    if (team == 1) return v;
    __syncthreads();  // what was there has been read
    if (lane_ == 0) memory[warp_] = v;
    __syncthreads();
    const int begin = warp_ / team * team;
    v = memory[begin];
    for (int w = 1; w < team; ++w) v = op(v, memory[begin + w]);
    return v;
  }

  // body(element, k) for this lane's elements of row m.
  template <class Body>
  __device__ void each(int m, int team, const Body& body) const {
    if (m >= present_) return;
    for (int k = (warp_ % team * 32 + lane_) * kPerChunk<T>; k < p_.x.columns; k += team * 32 * kPerChunk<T>) {
      const Vector v = chunk(m, k);
#pragma unroll
      for (int j = 0; j < kPerChunk<T>; ++j)
        if (k + j < p_.x.columns) body(to_float(element_of<T>(v, j)), k + j);
    }
  }

  // LayerNorm's mean and factor of row m. The squares are of centred values, so that nothing cancels.
  __device__ void normalize(int m, int team) {
    const auto add = [](float a, float b) { return a + b; };
    const float count = static_cast<float>(p_.x.columns);
    float sum = 0, squares = 0, left = 0;
    each(m, team, [&](float x, int) { sum += x; });
    const float mean = reduce(sum, sums_, team, add) / count;
    each(m, team, [&](float x, int) {
      left += x - mean;
      squares += (x - mean) * (x - mean);
    });
    const float error = reduce(left, sums_, team, add) / count;  // what rounding has left in the mean
    const float variance = reduce(squares, sums_, team, add) / count - error * error;
    if (m >= present_ || lane_ != 0 || warp_ % team != 0) return;
    mean_[m] = mean + error;
    factor_[m] = 1.0f / sqrtf((variance > 0 ? variance : 0.0f) + p_.norm_eps);
  }

  // Row m by a team of warps; all warps call, also those whose row is not there.
  __device__ void quantize(int m, int team, int8_t* q, float* scales) {
    if (p_.norm_weight) {
      normalize(m, team);
      __syncthreads();
    }
    // Among the bits of magnitudes, infinities and NaNs are the largest, so they always win.
    int bits = 0;
    each(m, team, [&](float x, int k) {
      const int b = __float_as_int(value(x, m, k)) & 0x7FFFFFFF;
      bits = b > bits ? b : bits;
    });
    bits = reduce(bits, most_, team, [](int a, int b) { return a > b ? a : b; });
    if (m >= present_) return;
    const float most = __int_as_float(bits), nan = __int_as_float(0x7FC00000);
    const bool fixed = p_.x_scale || p_.host_x_scale > 0, finite = bits < 0x7F800000;
    float scale = p_.x_scale ? *p_.x_scale : fixed ? p_.host_x_scale : most / 127.0f;
    float inverse = fixed ? 1.0f / scale : 127.0f / most;
    const bool usable = fabsf(inverse) < __int_as_float(0x7F800000) && (!fixed || (scale > 0 && inverse > 0));
    if (!usable) scale = fixed ? nan : 0.0f;  // zeros, or too small for 127 / most to be a float
    if (!finite) scale = nan;
    if (!usable || !finite) inverse = 0;
    if (lane_ == 0 && warp_ % team == 0) scales[m] = scale;
    int8_t* to = q + m * p_.q_stride;
    for (int k = (warp_ % team * 32 + lane_) * 16; k < (p_.x.columns + kInt8Step - 1) / kInt8Step * kInt8Step;
         k += team * 32 * 16) {
      Vector bytes = {{0, 0, 0, 0}};
#pragma unroll
      for (int part = 0; part < 16 / kPerChunk<T>; ++part) {
        const int begin = k + part * kPerChunk<T>;
        if (begin >= p_.x.columns) continue;
        const Vector v = chunk(m, begin);
#pragma unroll
        for (int j = 0; j < kPerChunk<T>; ++j) {
          const float product = value(to_float(element_of<T>(v, j)), m, begin + j) * inverse;
          const int rounded = inverse == 0 || begin + j >= p_.x.columns
                                  ? 0
                                  : static_cast<int>(rintf(fminf(fmaxf(product, -127.0f), 127.0f)));
          const int at = part * kPerChunk<T> + j;
          bytes.v[at / 4] |= static_cast<uint32_t>(rounded & 0xFF) << at % 4 * 8;
        }
      }
      store16(to + k, bytes);
    }
  }

  // What the LoRA branch sees of row m: x as it lies, or normalized and rounded to its type.
  __device__ Vector left_operand(int m, int k) const {
    const int count = m < present_ && k < p_.x.columns ? p_.x.columns - k : 0;
    if (count == 0) return {{0, 0, 0, 0}};
    const Vector v = chunk(m, k);
    if (!p_.norm_weight) return v;
    return gather16<T>(count < kPerChunk<T> ? count : kPerChunk<T>,
                       [&](int j) { return from_float<T>(value(to_float(element_of<T>(v, j)), m, k + j)); });
  }

  // t of the rows that use `adapter`: the warps take eight parts of depth, added in order.
  __device__ void down(const Adapters& adapters, int adapter, T* t) {
    const int begin = p_.routing.begin(adapter), rank = p_.routing.rank(adapter), lane = lane_;
    const int steps = (p_.x.columns + kStep<T> - 1) / kStep<T>;
    const int first = steps * warp_ / kInt8Warps, last = steps * (warp_ + 1) / kInt8Warps;
    const float scale = p_.routing.scale(adapter);
    [[maybe_unused]] constexpr int kUnrolled = sizeof(T) == 4 ? 1 : 2;  // of fp32's operands two parts are in registers
    for (int r = 0; r < rank; r += 8 * kTiles) {
      float c[kTiles][4] = {};
#pragma unroll kUnrolled
      for (int step = first; step < last; ++step) {
        const int k = step * kStep<T> + lane % 4 * kPerChunk<T>;
        const Vector low = left_operand(lane / 4, k), high = left_operand(lane / 4 + 8, k);
        Vector b[kTiles];
#pragma unroll
        for (int j = 0; j < kTiles; ++j)
          b[j] = row_chunk<T, true>(p_.a, begin + r + j * 8 + lane / 4, r + j * 8 + lane / 4 < rank, k);
#pragma unroll
        for (int h = 0; h < 4; h += 2) {
          const uint32_t a[4] = {low.v[h], high.v[h], low.v[h + 1], high.v[h + 1]};
#pragma unroll
          for (int j = 0; j < kTiles; ++j) product<T>(c[j], a, b[j].v[h], b[j].v[h + 1], p_.precise);
        }
      }
      share_parts<kTiles>(parts_, c);
      for (int i = static_cast<int>(threadIdx.x); i < kInt8Rows * 8 * kTiles; i += kInt8Threads) {
        const int m = i / (8 * kTiles), j = i % (8 * kTiles);
        if (m < present_ && r + j < rank && adapters.uses(m, adapter))
          t[m * p_.t_stride + r + j] = from_float<T>(sum_of_parts<kTiles>(parts_, m, j) * scale);
      }
      __syncthreads();  // the parts are free again, and t can be read
    }
  }

  const Int8RowsParams& p_;
  const int first_, warp_, lane_;
  float *sums_, *mean_, *factor_, *parts_;
  int *most_, *words_;
  const char* rows_;
  int64_t stride_;
  int present_;
  bool aligned_;
};

// A of the only adapter to L2, by the threads of a block that is one of `blocks`; of several, which are wanted is not
// known before the kernel before has finished.
template <class T>
__device__ inline void prefetch_factor(const Int8RowsParams& p, int block, int blocks) {
  if (p.routing.adapters != 1 || p.a.stride != p.a.columns) return;
  const int64_t bytes = int64_t{p.a.rows} * p.a.columns * static_cast<int64_t>(sizeof(T));
  prefetch(p.a.data, bytes, block * kInt8Threads + static_cast<int>(threadIdx.x), blocks * kInt8Threads);
}

// Grid (rows / 16). Two blocks on a multiprocessor leave 128 registers, a few too few for fp32 and many ranks.
template <class T, int kTiles>
__global__ void __launch_bounds__(kInt8Threads, sizeof(T) == 4 && kTiles > 2 ? 1 : 2)
    int8_rows(const Int8RowsParams p) {
  if constexpr (kCompiled<T>) {
    let_next_kernel_start();
    prefetch_factor<T>(p, static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x));
    wait_for_kernel_before();
    Shared shared;
    const int first = static_cast<int>(blockIdx.x) * kInt8Rows;
    Int8Rows<T, kTiles> rows(p, shared, first);
    rows.run(p.q + first * p.q_stride, p.scales + first, static_cast<T*>(p.t) + first * p.t_stride);
  }
}

}  // namespace lora_kernels::cuda
