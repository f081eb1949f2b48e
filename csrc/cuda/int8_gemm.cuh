// int8_lora_linear for many rows: INT8 products on tensor cores, and the LoRA branch on the same sums.
//   y[m, n] = act((sum over k of q[m, k] w[n, k]) (s_x[m] s_w[n]) + bias[n] + t[m] B[:, n]) + residual[m, n]
//   q [M, K64] int8, s_x [M] and t [M, r] of int8_rows.cuh; w packed, s_w beside it (int8_operands.h)
// Integer operations 2 M N K, exact; FLOPs of the branch 2 M r N; bytes M K + N K + M N * size, bound by arithmetic at
// many rows. A block of 256 threads makes 128 x 128 of y (128 threads, 64 x 64) in steps of 64 k: 16 (8) KB, three
// (four) of them in flight. The branch is r / 32 steps more (r / 16 in fp32) in the same ring, fetched while the last
// integers are multiplied: t beside B, onto the sums, which by then are fp32. It costs about 2 r / K of the integer
// products, at half of their rate: 5 % at rank 16 and K 1280.
//
// The tile of w keeps its packed steps of 256 bytes, whose chunks are exclusive-or'ed with twice the step: the four
// steps by two chunks that eight lanes read together lie in different banks.
//
// One kernel for all: mma.sync, which every architecture from sm_75 on has (there as products of 8 x 8 x 16, and
// without asynchronous copies). It is all that sm_120 has. On sm_90, where it is taken to reach 60 % of wgmma,
// int8_wgmma.cuh takes its place for many rows. tcgen05 of sm_100 is left until a GPU can say what it would bring;
// sm_103 has next to no INT8 at all.
//
// Not measured: no GPU has run this.
#pragma once

#include <type_traits>

#include "cuda/gemm.cuh"
#include "cuda/int8_operands.h"
#include "cuda/int8_rows.cuh"

namespace lora_kernels::cuda {

struct Int8GemmParams {
  const int8_t* q = nullptr;
  int64_t q_stride = 0;
  const float* scales = nullptr;
  PackedWeight w;
  int rows = 0;
  Matrix t;
  UpFactor up;
  Routing routing;
  Int8Epilogue epilogue;
  bool precise = true;
};

template <class T, class Shape>
struct Int8GemmLayout {
  using A = Tile<int8_t, Shape::kRows, kInt8Step>;
  using TileT = Tile<T, Shape::kRows, kStep<T>>;
  using TileB = Tile<T, Shape::kColumns, kStep<T>>;
  using Adapters = TileAdapters<Shape::kRows, Shape::kThreads>;
  static constexpr int kWeightBytes = Shape::kColumns * kInt8Step;
  static_assert(A::kBytes == TileT::kBytes && kWeightBytes == TileB::kBytes, "steps of the branch in the same ring");
  static constexpr int kStageBytes = A::kBytes + kWeightBytes;
  static constexpr size_t kSharedBytes =
      static_cast<size_t>(Shape::kStages) * kStageBytes + (Adapters::kWords * 4 + 15) / 16 * 16;
};

template <class T, class Shape>
class Int8Gemm {
  using Layout = Int8GemmLayout<T, Shape>;
  using A = typename Layout::A;
  using TileT = typename Layout::TileT;
  using TileB = typename Layout::TileB;
  using Adapters = typename Layout::Adapters;
  static constexpr int kThreads = Shape::kThreads, kStages = Shape::kStages;
  static constexpr int kRowTiles = Shape::kWarpRows / 16, kColumnTiles = 4;
  static constexpr int kWarpsAcross = Shape::kColumns / Shape::kWarpColumns;
  static_assert(Shape::kWarpColumns == 32, "sixteen bytes of w are a column of each of a warp's four products");

 public:
  __device__ Int8Gemm(const Int8GemmParams& p, int m, int n)
      : p_(p),
        m_(m),
        n_(n),
        memory_(shared_.template take<char>(kStages * Layout::kStageBytes)),
        adapters_(p.routing, shared_.template take<int>(Adapters::kWords), m, p.rows) {
    const int warp = static_cast<int>(threadIdx.x) / 32;
    warp_row_ = warp / kWarpsAcross * Shape::kWarpRows;
    warp_column_ = warp % kWarpsAcross * Shape::kWarpColumns;
    base_steps_ = (p.w.steps * 4 + kInt8Step - 1) / kInt8Step;
    steps_ = base_steps_;
    for (int i = 0; i < adapters_.count(); ++i)
      steps_ += (p.routing.rank(adapters_.adapter(i)) + kStep<T> - 1) / kStep<T>;
  }

  __device__ void run() {
    wait_for_kernel_before();  // which makes q and t
    for (int k = 0; k < kStages - 1; ++k) fetch(k);
    int32_t sums[kRowTiles][kColumnTiles][4] = {};
    for (int k = 0; k < base_steps_; ++k) multiply(advance(k), sums);
    float c[kRowTiles][kColumnTiles][4];
    scale(sums, c);
    for (int k = base_steps_; k < steps_; ++k) add_branch(advance(k), c);
    wait_copies<0>();
    store(c);
  }

 private:
  // Step k has landed for all, and all are done with the step whose place is filled next.
  __device__ const char* advance(int k) {
    wait_copies<kStages - 2>();
    __syncthreads();
    fetch(k + kStages - 1);
    return memory_ + k % kStages * Layout::kStageBytes;
  }

  __device__ void fetch(int k) {
    char* a = memory_ + k % kStages * Layout::kStageBytes;
    if (k < base_steps_)
      fetch_base(a, a + A::kBytes, k);
    else if (k < steps_)
      fetch_branch(a, a + A::kBytes);
    commit_copies();
  }

  __device__ void fetch_base(char* a, char* w, int k) {
#pragma unroll
    for (int i = static_cast<int>(threadIdx.x); i < Shape::kRows * 4; i += kThreads) {
      const int row = i / 4, chunk = i % 4;
      const bool there = m_ + row < p_.rows;
      copy16_async(a + A::offset(row, chunk),
                   p_.q + (there ? (m_ + row) * p_.q_stride + k * kInt8Step + chunk * 16 : 0), there ? 16 : 0);
    }
#pragma unroll
    for (int i = static_cast<int>(threadIdx.x); i < Shape::kColumns * 4; i += kThreads) {
      const int block = i / 256, step = i / 16 % 16, chunk = i % 16, channel = n_ + block * 64 + chunk * 4;
      const bool there = k * 16 + step < p_.w.steps && channel / 64 < p_.w.blocks();
      copy16_async(w + weight_offset(block, step, chunk), there ? p_.w.at(channel, k * 16 + step) : p_.w.data,
                   there ? 16 : 0);
    }
  }

  __device__ static int weight_offset(int block, int step, int chunk) {
    return ((block * 16 + step) * 16 + (chunk ^ ((step & 3) * 2))) * 16;
  }

  // The next step of the branch: steps come in order, so what has been fetched says where to go on. Row 8 j + i of each
  // 32 rows of the tile of B is channel 4 i + j, as in the products of w.
  __device__ void fetch_branch(char* a, char* b) {
    const int adapter = adapters_.adapter(slot_), begin = p_.routing.begin(adapter), rank = p_.routing.rank(adapter);
    Matrix t = p_.t;
    t.columns = rank;
    load_tile<TileT, kThreads>(a, t, m_, chunk_, [&](int row) { return adapters_.uses(row, adapter); });
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < Shape::kColumns * 4; i += kThreads) {
      const int place = i % Shape::kColumns, part = i / Shape::kColumns, r = chunk_ + part * kPerChunk<T>;
      const int n = n_ + place / 32 * 32 + place % 8 * 4 + place % 32 / 8;
      const int count = of_chunk<T>(n < p_.w.columns ? rank - r : 0);
      // By element: UpFactor::chunk would want a register more than sm_86 and sm_89 have.
      store16(b + TileB::offset(place, part),
              gather16<T>(count, [&](int j) { return from_float<T>(p_.up.at(begin + r + j, n)); }));
    }
    chunk_ += kStep<T>;
    if (chunk_ >= rank) {
      chunk_ = 0;
      ++slot_;
    }
  }

  __device__ void multiply(const char* stage, int32_t (&sums)[kRowTiles][kColumnTiles][4]) {
    const int g = lane_of_warp() / 4, t = lane_of_warp() % 4;
    const char* w = stage + A::kBytes;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int chunk = warp_column_ % 64 / 4 + g;
      const Vector low = load16(w + weight_offset(warp_column_ / 64, half * 8 + t, chunk));
      const Vector high = load16(w + weight_offset(warp_column_ / 64, half * 8 + 4 + t, chunk));
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        uint32_t a[4];
        load_a<A>(a, stage, warp_row_ + i * 16, half);
#pragma unroll
        for (int j = 0; j < kColumnTiles; ++j) mma_m16n8k32_s8(sums[i][j], a, low.v[j], high.v[j]);
      }
    }
  }

  __device__ int row_of(int i, int h) const { return m_ + warp_row_ + i * 16 + lane_of_warp() / 4 + h * 8; }
  // The first of this lane's eight channels; the one of product j and element p (0 or 1) is 4 p + j behind it.
  __device__ int first_channel() const { return n_ + warp_column_ + lane_of_warp() % 4 * 8; }

  __device__ void scale(const int32_t (&sums)[kRowTiles][kColumnTiles][4], float (&c)[kRowTiles][kColumnTiles][4]) {
    float of_channel[8];
#pragma unroll
    for (int e = 0; e < 8; ++e)  // a channel beyond N within its block has the scale 0
      of_channel[e] = first_channel() / 64 < p_.w.blocks() ? p_.w.scale(first_channel() + e) : 0.0f;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float of_row = row_of(i, h) < p_.rows ? p_.scales[row_of(i, h)] : 0.0f;
#pragma unroll
        for (int e = 0; e < 8; ++e)
          c[i][e % 4][2 * h + e / 4] = static_cast<float>(sums[i][e % 4][2 * h + e / 4]) * (of_row * of_channel[e]);
      }
  }

  __device__ void add_branch(const char* stage, float (&c)[kRowTiles][kColumnTiles][4]) {
    const char* b_tile = stage + A::kBytes;
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        uint32_t a[4], b[4];
        load_a<TileT>(a, stage, warp_row_ + i * 16, half);
#pragma unroll
        for (int j = 0; j < kColumnTiles; j += 2) {
          load_b<TileB>(b, b_tile, warp_column_ + j * 8, half);
          product<T>(c[i][j], a, b[0], b[1], p_.precise);
          product<T>(c[i][j + 1], a, b[2], b[3], p_.precise);
        }
      }
  }

  __device__ void store(const float (&c)[kRowTiles][kColumnTiles][4]) const {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float eight[8];
#pragma unroll
        for (int e = 0; e < 8; ++e) eight[e] = c[i][e % 4][2 * h + e / 4];
        if (row_of(i, h) < p_.rows) p_.epilogue.template store_eight<T>(eight, row_of(i, h), first_channel());
      }
  }

  const Int8GemmParams& p_;
  int m_, n_;
  Shared shared_;
  char* memory_;
  Adapters adapters_;
  int warp_row_, warp_column_, base_steps_ = 0, steps_ = 0, slot_ = 0, chunk_ = 0;
};

// Two blocks on a multiprocessor leave 128 registers. fp32 needs more for the two parts of every operand of the branch,
// sm_75 for its copies, and the large tile but for sm_86 and sm_89 a few: it would spill.
template <class T, class Shape>
constexpr int kInt8BlocksPerMultiprocessor =
    sizeof(T) == 2 && kArch >= 80 && (kArch == 86 || kArch == 89 || std::is_same_v<Shape, SmallShape>) ? 2 : 1;

template <class T, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, kInt8BlocksPerMultiprocessor<T, Shape>)
    int8_gemm(const Int8GemmParams p) {
  if constexpr (kCompiled<T>) {
    int m = 0, n = 0;
    tile_of_block<Shape>(static_cast<int>(blockIdx.x), p.rows, p.w.columns, &m, &n);
    Int8Gemm<T, Shape>(p, m, n).run();
  }
}

}  // namespace lora_kernels::cuda
