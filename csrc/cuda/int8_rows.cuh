// Rows of x as int8_lora_linear multiplies them: INT8 with a scale per row, and t = s x At for the LoRA branch.
//   most = max |x|; inverse = 127 / most; q = clamp(round_half_even(x * inverse), -127, 127); scale = most / 127, or by
//   a calibrated scale (1 / x_scale and x_scale). All in fp32 by the CPU's expressions: the same q, bit for bit. With
//   has_norm x first goes through LayerNorm in fp32, whose sums are in another order than a CPU's: q may then differ by
//   one where a value lies between two integers.
//
//   x [M, K] in any floating type -> q [M, K64] int8, zeros from K on (K64 = K rounded up to 64); scales [M];
//   t [M, t_stride] in the type of x, by the ranks of each row's own adapter
//
// A block takes up to sixteen rows: what one tensor-core product of t has. FLOPs 2 M r K; bytes M K (size + 1), A from
// L2 for every block: bound by memory, and at few rows by what has to wait for what. x is read from there once: where
// sixteen rows fit they wait in shared memory between the passes (maximum, or mean and variance before it; t; q),
// elsewhere in L2. What nothing here computes is asked for beforehand: a norm's weight and bias, who the adapters are
// and where they lie, A as soon as that is known. Few rows share the warps: all eight work on one row. A device
// function, so that few_rows (int8_skinny.cuh) can do the same inside its own blocks. It may start before the kernel
// before it has finished, and waits for it before it loads anything.
//
// Not measured: no GPU has run this.
#pragma once

#include "cuda/int8_source.cuh"
#include "cuda/primitives/launch.h"
#include "cuda/skinny.cuh"

namespace lora_kernels::cuda {

// Up to sixteen rows from `first` on. kTiles: ranks of one pass over depth, in eights.
template <class T, int kTiles>
class Int8Rows {
  using Adapters = TileAdapters<kInt8Rows, kInt8Threads>;
  static_assert(kInt8Threads == kSkinnyThreads && kInt8Rows == kSkinnyRows, "parts are added as few_rows adds them");
  static_assert((Adapters::kWords * 4 + 15) / 16 * 16 == 144, "int8_rows_bytes counts them");
  static constexpr int kElements = kPerChunk<T>;

 public:
  // Takes int8_rows_bytes(kTiles) and what is staged. Of q and of t's sums over depth the part from `from` to `to`
  // is made, multiples of kInt8Step. All that is not made in between is asked for at once.
  __device__ Int8Rows(const Int8RowsParams& p, Shared& shared, int first, int from, int to)
      : p_(p),
        source_(p, first),
        routing_(p.routing),
        first_(first),
        from_(from),
        to_(to < p.x.columns ? to : p.x.columns),
        warp_(static_cast<int>(threadIdx.x) / 32),
        lane_(lane_of_warp()) {
    moments_ = shared.template take<float>(3 * kInt8Warps);
    most_ = shared.template take<int>(kInt8Warps);
    norms_ = shared.template take<Int8Norm>(kInt8Rows);
    parts_ = shared.template take<float>(kSkinnyWarps * kSkinnyRows * 8 * kTiles);
    words_ = shared.template take<int>(Adapters::kWords);
    offsets_ = shared.template take<int>(kInt8MostOffsets + 1);
    present_ = p.x.rows - first < p.rows_of_block ? p.x.rows - first : p.rows_of_block;
    if (p.staged_bytes) source_.stage(shared, present_);
    commit_copies();
    if (p.staged_a_bytes) factor_ = shared.template take<char>(8 * kTiles * p.staged_a_bytes);
    // By other warps than that which looks up the adapters of rows, so that neither waits for the other.
    const int at = static_cast<int>(threadIdx.x) - 32;
    if (routing_.adapters && routing_.ids && routing_.offsets && routing_.adapters <= kInt8MostOffsets) {
      if (at >= 0 && at <= routing_.adapters) offsets_[at] = routing_.offsets[at];
      routing_.offsets = offsets_;
    }
  }

  // q and scales, then put(row, rank, sum, scale) of every element of t, which is sum times scale, but for parts of
  // depth. q, scales and `row` begin with row `first`. Ends with a barrier, behind which copies have landed that all
  // threads asked for since the constructor.
  template <class Put>
  __device__ void run(int8_t* q, float* scales, const Put& put) {
    if (routing_.adapters == 0) {
      commit_copies();
      quantize_all(q, scales);
      return;
    }
    const Adapters adapters(routing_, words_, first_, first_ + present_);
    const bool staged = p_.staged_a_bytes && adapters.count() > 0;
    if (staged) stage_factor(adapters.adapter(0));
    commit_copies();
    quantize_all(q, scales);
    for (int slot = 0; slot < adapters.count(); ++slot)
      down(adapters, adapters.adapter(slot), staged && slot == 0, put);
  }

  // That of the rows, all in shared memory where it fits, behind run().
  __device__ Routing routing() const {
    Routing of_rows = routing_;
    if (routing_.ids) of_rows.ids = words_, of_rows.rows_per_group = 1;
    return of_rows;
  }

 private:
  // Of some values: how many, their mean, and the sum of the squares around it.
  struct Moments {
    float count, mean, squares;
  };
  // Of both (Chan, Golub and LeVeque, 1979): squares stay around a mean that is near, and nothing cancels.
  __device__ static Moments merged(const Moments& a, const Moments& b) {
    const float count = a.count + b.count, part = count > 0 ? b.count / count : 0.0f, apart = b.mean - a.mean;
    return {count, a.mean + apart * part, a.squares + b.squares + apart * apart * a.count * part};
  }

  // The first 8 kTiles ranks of A of an adapter, as many as it has, and zeros.
  __device__ void stage_factor(int adapter) {
    const int begin = routing_.begin(adapter), rank = routing_.rank(adapter);
    const int bytes = (to_ - from_) * static_cast<int>(sizeof(T)), chunks = (bytes + 15) / 16;
    for (int i = static_cast<int>(threadIdx.x); i < 8 * kTiles * chunks; i += kInt8Threads) {
      const int r = i / chunks, at = i % chunks * 16, left = r < rank ? bytes - at : 0;
      const T* from = static_cast<const T*>(p_.a.data) + (r < rank ? (begin + r) * p_.a.stride + from_ : 0);
      copy16_async(factor_ + r * p_.staged_a_bytes + at, reinterpret_cast<const char*>(from) + (left > 0 ? at : 0),
                   left < 16 ? left : 16);
    }
  }

  __device__ void quantize_all(int8_t* q, float* scales) {
    int team = kInt8Warps;  // warps that share a row: all of them, or one
    while (team > 1 && team * present_ > kInt8Warps) team /= 2;
    const int at_once = kInt8Warps / team;
    wait_copies<1>();  // all but A, and what a caller asked for
    __syncthreads();
    for (int m = 0; m < present_; m += at_once) quantize(m + warp_ / team, team, q, scales);
    wait_copies<0>();
    __syncthreads();
  }

  // The team's values in one, the same for all its lanes: over lanes, then over its warps in order. All warps call, and
  // only once with the same memory: a team of several has one row.
  template <class V, class Op>
  __device__ V reduce(V v, V* memory, int team, const Op& op) const {
#pragma unroll
    for (int by = 16; by > 0; by /= 2) v = op(v, __shfl_xor_sync(~0u, v, by));
    if (team == 1) return v;
    if (lane_ == 0) memory[warp_] = v;
    __syncthreads();
    const int begin = warp_ / team * team;
    v = memory[begin];
    for (int w = 1; w < team; ++w) v = op(v, memory[begin + w]);
    return v;
  }

  // body(k) for this lane's chunks of row m.
  template <class Body>
  __device__ void each(int m, int team, const Body& body) const {
    if (m >= present_) return;
#pragma unroll 1
    for (int k = (warp_ % team * 32 + lane_) * kElements; k < p_.x.columns; k += team * 32 * kElements) body(k);
  }

  // LayerNorm's mean and factor of row m, the same for all lanes of the team.
  __device__ Int8Norm normalize(int m, int team) {
    const auto each_value = [&](const auto& body) {
      each(m, team, [&](int k) {
        const Vector x = source_.chunk(m, k);
#pragma unroll
        for (int j = 0; j < kElements; ++j)
          if (k + j < p_.x.columns) body(to_float(element_of<T>(x, j)));
      });
    };
    Moments all = {0, 0, 0};
    each_value([&](float x) { all.count += 1, all.mean += x; });
    if (all.count > 0) all.mean /= all.count;
    each_value([&](float x) { all.squares += (x - all.mean) * (x - all.mean); });
    // The two lanes of a pair do not round alike: what lane 0 has counts.
#pragma unroll
    for (int by = 1; by < 32; by *= 2)
      all = merged(all, {__shfl_xor_sync(~0u, all.count, by), __shfl_xor_sync(~0u, all.mean, by),
                         __shfl_xor_sync(~0u, all.squares, by)});
    float *counts = moments_, *means = moments_ + kInt8Warps, *squares = moments_ + 2 * kInt8Warps;
    if (lane_ == 0) counts[warp_] = all.count, means[warp_] = all.mean, squares[warp_] = all.squares;
    if (team == 1)
      __syncwarp();
    else
      __syncthreads();
    const int begin = warp_ / team * team;
    all = {counts[begin], means[begin], squares[begin]};
    for (int w = begin + 1; w < begin + team; ++w) all = merged(all, {counts[w], means[w], squares[w]});
    if (team == 1) __syncwarp();  // read, before the next row's are written
    const float variance = all.squares / static_cast<float>(p_.x.columns);
    const Int8Norm norm = {all.mean, 1.0f / sqrtf((variance > 0 ? variance : 0.0f) + p_.norm_eps)};
    if (m < present_ && lane_ == 0 && warp_ % team == 0) norms_[m] = norm;
    return norm;
  }

  // Row m by a team of warps; all warps call, also those whose row is not there.
  __device__ void quantize(int m, int team, int8_t* q, float* scales) {
    const Int8Norm norm = p_.norm_weight ? normalize(m, team) : Int8Norm{0, 1};
    // Among the bits of magnitudes, infinities and NaNs are the largest, so they always win.
    int bits = 0;
    each(m, team, [&](int k) {
      float v[kElements];
      source_.values(v, m, k, norm);
#pragma unroll
      for (int j = 0; j < kElements; ++j) {
        const int b = __float_as_int(v[j]) & 0x7FFFFFFF;
        bits = b > bits ? b : bits;
      }
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
    const int end = (to_ + kInt8Step - 1) / kInt8Step * kInt8Step;
#pragma unroll 1
    for (int k = from_ + (warp_ % team * 32 + lane_) * kElements; k < end; k += team * 32 * kElements) {
      uint32_t bytes[kElements / 4] = {};
      float v[kElements] = {};
      if (k < p_.x.columns) source_.values(v, m, k, norm);
#pragma unroll
      for (int j = 0; j < kElements; ++j) {
        const float product = v[j] * inverse;
        const int rounded = inverse == 0 ? 0 : static_cast<int>(rintf(fminf(fmaxf(product, -127.0f), 127.0f)));
        bytes[j / 4] |= static_cast<uint32_t>(rounded & 0xFF) << j % 4 * 8;
      }
      if constexpr (kElements == 8)
        *reinterpret_cast<uint2*>(to + k) = make_uint2(bytes[0], bytes[1]);
      else
        *reinterpret_cast<uint32_t*>(to + k) = bytes[0];
    }
  }

  // What the LoRA branch sees of row m: x as it lies, or normalized and rounded to its type.
  __device__ Vector left_operand(int m, int k) const {
    if (m >= present_ || k >= p_.x.columns) return {{0, 0, 0, 0}};
    if (!p_.norm_weight) return source_.chunk(m, k);
    float v[kElements];
    source_.values(v, m, k, norms_[m]);
    return gather16<T>(kElements, [&](int j) { return from_float<T>(v[j]); });
  }

  // t of the rows that use `adapter`: the warps take eight parts of depth, added in order. `staged`: its first ranks
  // are in shared memory.
  template <class Put>
  __device__ void down(const Adapters& adapters, int adapter, bool staged, const Put& put) {
    const int begin = routing_.begin(adapter), rank = routing_.rank(adapter), lane = lane_;
    const int steps = (to_ - from_ + kStep<T> - 1) / kStep<T>;
    const int first = steps * warp_ / kInt8Warps, last = steps * (warp_ + 1) / kInt8Warps;
    const float scale = routing_.scale(adapter);
#pragma unroll 1
    for (int r = 0; r < rank; r += 8 * kTiles) {
      const bool here = staged && r == 0;
      const auto load_factor = [&](Vector(&b)[kTiles], int step) {
        const int at = step * kStep<T> + lane % 4 * kElements;
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          const int i = j * 8 + lane / 4;
          if (step >= last || from_ + at >= to_)
            b[j] = {{0, 0, 0, 0}};
          else if (here)
            b[j] = load16(factor_ + i * p_.staged_a_bytes + at * static_cast<int>(sizeof(T)));
          else
            b[j] = row_chunk<T, true>(p_.a, begin + r + i, r + i < rank, from_ + at);
        }
      };
      constexpr bool kAhead = kTiles <= 2;  // more ranks leave no registers for another step's
      Vector next[kTiles] = {};
      if (kAhead) load_factor(next, first);
      float c[kTiles][4] = {};
#pragma unroll 1
      for (int step = first; step < last; ++step) {
        const int k = from_ + step * kStep<T> + lane % 4 * kElements;
        Vector b[kTiles];
#pragma unroll
        for (int j = 0; j < kTiles; ++j) b[j] = next[j];
        load_factor(kAhead ? next : b, kAhead ? step + 1 : step);
        const Vector low = left_operand(lane / 4, k), high = left_operand(lane / 4 + 8, k);
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
          put(m, r + j, sum_of_parts<kTiles>(parts_, m, j), scale);
      }
      __syncthreads();  // the parts are free again, and t can be read
    }
  }

  const Int8RowsParams& p_;
  Int8Source<T> source_;
  Routing routing_;
  const int first_, from_, to_, warp_, lane_;
  float *moments_, *parts_;
  int *most_, *words_, *offsets_;
  Int8Norm* norms_;
  char* factor_ = nullptr;
  int present_;
};

// A of the only adapter to L2, by the threads of a block that is one of `blocks`; of several, which are wanted is not
// known before the kernel before has finished.
template <class T>
__device__ inline void prefetch_factor(const Int8RowsParams& p, int block, int blocks) {
  if (p.routing.adapters != 1 || p.a.stride != p.a.columns) return;
  const int64_t bytes = int64_t{p.a.rows} * p.a.columns * static_cast<int64_t>(sizeof(T));
  prefetch(p.a.data, bytes, block * kInt8Threads + static_cast<int>(threadIdx.x), blocks * kInt8Threads);
}

// Grid (rows / rows_of_block). Two blocks on a multiprocessor leave 128 registers, a few too few for fp32 and many
// ranks.
template <class T, int kTiles>
__global__ void __launch_bounds__(kInt8Threads, sizeof(T) == 4 && kTiles > 2 ? 1 : 2)
    int8_rows(const Int8RowsParams p) {
  if constexpr (kCompiled<T>) {
    let_next_kernel_start();
    prefetch_factor<T>(p, static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x));
    wait_for_kernel_before();
    Shared shared;
    const int first = static_cast<int>(blockIdx.x) * p.rows_of_block;
    Int8Rows<T, kTiles> rows(p, shared, first, 0, p.x.columns);
    T* t = static_cast<T*>(p.t) + first * p.t_stride;
    rows.run(p.q + first * p.q_stride, p.scales + first,
             [&](int m, int r, float sum, float scale) { t[m * p.t_stride + r] = from_float<T>(sum * scale); });
  }
}

}  // namespace lora_kernels::cuda
