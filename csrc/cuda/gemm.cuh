// Tiled matrix products on tensor cores: forward, input gradient, and sums over rows. Result = a b, with
//
//   kForward         y  = act(x Wt + bias + t B) + residual   a = x [M, K], b = W [N, K]; t = s x At, made before
//   kInTile          the same, and t is made here             from the x that passes through anyway
//   kInputGradient   dx = dy W + u A                          a = dy [M, N], b = W [N, K] by depth; u = s dy Bt
//   kMaskedGradient  dx = dy W + mask (u A)                   with dropout: apart, the mask takes registers
//   kRowSums         dA = ut drop(x), dB = tt dy, dW = dyt x  a [M, i], b [M, j], depth across both
//
// FLOPs 2 M N K for the base, 2 M r N more for the branch, which is only more steps over depth on the same sums: t
// beside x and B beside W. A block of 256 threads makes 128 x 128 of the result (128 threads, 64 x 64), in steps of 64
// bytes of depth, with three (four) steps of shared memory filled by asynchronous copies; 48 (32) KB, so that two
// blocks share a multiprocessor from sm_75 to sm_120. A step reads (BM + BN) 64 bytes for 2 BM BN 32 FLOPs (16 bits):
// 64 FLOPs per byte at 128 x 128, all of it from L2 but the first time; blocks in groups of eight rows of tiles share W
// there. Bound by arithmetic at many rows.
//
// kInTile costs max_rank / BN of the base's products again (rank 16: 12.5 %), kForward another kernel that reads x:
// lora_linear_plan.cpp weighs the two.
//
// Not measured: no GPU has run this. On Hopper mma.sync reaches about 60 % of what wgmma does, by which
// gemm_wgmma.cuh makes the first, third and fourth of these. Not tried: stores of 16 bytes (results leave as pairs,
// half of a sector at a time).
#pragma once

#include "cuda/gemm_shapes.h"
#include "cuda/primitives/launch.h"

namespace lora_kernels::cuda {

template <class T, class Shape, Product kProduct>
class Gemm {
  using Layout = GemmLayout<T, Shape, kProduct>;
  using A = typename Layout::A;
  using B = typename Layout::B;
  static constexpr int kThreads = Shape::kThreads, kStages = Shape::kStages;
  static constexpr int kRowTiles = Shape::kWarpRows / 16, kColumnTiles = Shape::kWarpColumns / 8;
  static constexpr int kWarpsAcross = Shape::kColumns / Shape::kWarpColumns;
  // The mask of dx is on the branch alone: it comes first, is masked, and the base is added to it.
  static constexpr bool kLoraFirst = Layout::kMasked;
  static_assert(Shape::kRows / Shape::kWarpRows * kWarpsAcross * 32 == kThreads, "a warp for each part of the tile");
  static_assert(!Layout::kInTile || kThreads / 32 * 16 == Shape::kRows, "every warp makes t of sixteen rows");

 public:
  // Tile (m, n) of the result. kRowSums: of the rows [first, last) of a and b, those that use `adapter` (-1: all).
  __device__ Gemm(const GemmParams& p, int m, int n, int adapter, int first, int last)
      : p_(p), dropout_(p.dropout.with_seed()), m_(m), n_(n), adapter_(adapter), first_(first), last_(last) {
    a_ = shared_.template take<char>(kStages * A::kBytes);
    b_ = shared_.template take<char>(kStages * B::kBytes);
    if constexpr (Layout::kInTile) {
      down_ = shared_.template take<char>(kStages * Layout::Down::kBytes);
      t_ = shared_.template take<char>(Layout::kTSteps * A::kBytes);
    }
    const int warp = static_cast<int>(threadIdx.x) / 32;
    warp_row_ = warp / kWarpsAcross * Shape::kWarpRows;
    warp_column_ = warp % kWarpsAcross * Shape::kWarpColumns;
  }

  __device__ void run() {
    if constexpr (Layout::kRouted) {
      typename Layout::Adapters adapters(p_.routing, shared_.template take<int>(Layout::Adapters::kWords), m_, p_.rows);
      multiply_all(adapters);
    } else if constexpr (kProduct == Product::kRowSums) {
      sum_rows();
    } else {
      multiply_all(0);
    }
  }

  __device__ void store() const {
    wait_for_kernel_before();
    each_pair([&](int row, int column, float first, float second) {
      if (row < p_.rows && column < p_.columns) p_.epilogue.store_two<T>(first, second, row, column);
    });
  }

  // kRowSums: row i of the tile goes to row out_row + i of `sums`, if i < rows.
  __device__ void store_sums(float* sums, int out_row, int rows) const {
    each_pair([&](int row, int column, float first, float second) {
      if (row >= rows) return;
      float* to = sums + static_cast<int64_t>(out_row + row) * p_.columns + column;
      if (column < p_.columns) to[0] = first;
      if (column + 1 < p_.columns) to[1] = second;
    });
  }

 private:
  template <class Body>
  __device__ void each_pair(const Body& body) const {
    const int g = lane_of_warp() / 4, t = lane_of_warp() % 4;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j)
#pragma unroll
        for (int h = 0; h < 2; ++h)
          body(m_ + warp_row_ + i * 16 + g + h * 8, n_ + warp_column_ + j * 8 + t * 2, c_[i][j][2 * h],
               c_[i][j][2 * h + 1]);
  }

  template <class Adapters>
  __device__ void multiply_all(const Adapters& adapters) {
    base_steps_ = (p_.depth + kStep<T> - 1) / kStep<T>;
    if constexpr (Layout::kRouted)
      for (int i = 0; i < adapters.count(); ++i)
        lora_steps_ += (p_.routing.rank(adapters.adapter(i)) + kStep<T> - 1) / kStep<T>;
    if constexpr (Layout::kInTile) lora_steps_ = (p_.routing.rank(0) + kStep<T> - 1) / kStep<T>;
    multiply_steps(base_steps_ + lora_steps_, adapters);
  }

  // kRowSums: all rows, or those steps of rows that have one of this adapter. Looked over a segment at a time, so that
  // with rows in runs (utterances) all adapters together read a and b about once.
  __device__ void sum_rows() {
    uint32_t* marks = shared_.template take<uint32_t>(Layout::kWords);
    if (adapter_ < 0) {
      base_steps_ = (last_ - first_ + kStep<T> - 1) / kStep<T>;
      return multiply_steps(base_steps_, 0);
    }
    marks_ = marks;
    for (int end = last_; first_ < end; first_ += kSegment * kStep<T>) {
      base_steps_ = mark_steps(marks, end);
      slot_ = 0;
      multiply_steps(base_steps_, 0);
    }
  }

  // Marks the steps of this segment that have rows of the adapter; returns how many. Ends with a barrier.
  __device__ int mark_steps(uint32_t* marks, int end) {
    __syncthreads();  // all are done with the marks, and with the tiles, of the segment before
    const int thread = static_cast<int>(threadIdx.x);
    if (thread < kSegment) {
      const int row = first_ + thread * kStep<T>;
      bool used = false;
      for (int m = row; !used && m < end && m < row + kStep<T>;
           m = (m / p_.routing.rows_per_group + 1) * p_.routing.rows_per_group)
        used = p_.routing.adapter_of(m) == adapter_;
      const uint32_t vote = __ballot_sync(~0u, used);
      if (thread % 32 == 0) marks[thread / 32] = vote;
    }
    __syncthreads();
    int count = 0;
    for (int i = 0; i < kSegment / 32; ++i) count += __popc(marks[i]);
    return count;
  }

  // The first row of the next marked step; slot_ counts steps that are behind.
  __device__ int next_marked() {
    uint32_t left = marks_[slot_ / 32] >> slot_ % 32;
    while (left == 0) {
      slot_ = (slot_ / 32 + 1) * 32;
      left = marks_[slot_ / 32];
    }
    slot_ += __ffs(static_cast<int>(left));
    return first_ + (slot_ - 1) * kStep<T>;
  }

  template <class Adapters>
  __device__ void multiply_steps(int steps, const Adapters& adapters) {
    for (int k = 0; k < kStages - 1; ++k) fetch(k, steps, adapters);
    for (int k = 0; k < steps; ++k) {
      wait_copies<kStages - 2>();
      __syncthreads();  // step k has landed for all, and all are done with the step whose place is filled next
      fetch(k + kStages - 1, steps, adapters);
      const char* a = a_ + k % kStages * A::kBytes;
      if constexpr (Layout::kInTile)
        if (k >= base_steps_) a = t_ + (k - base_steps_) * A::kBytes;
      multiply(a, b_ + k % kStages * B::kBytes);
      if constexpr (Layout::kInTile) {
        if (k < base_steps_) multiply_down(a, down_ + k % kStages * Layout::Down::kBytes);
        if (k == base_steps_ - 1) keep_t();  // seen by all after the next barrier
      }
      if constexpr (kLoraFirst)
        if (k == lora_steps_ - 1) mask();
    }
  }

  template <class Adapters>
  __device__ void fetch(int k, int steps, const Adapters& adapters) {
    if (k < steps) {
      char *a = a_ + k % kStages * A::kBytes, *b = b_ + k % kStages * B::kBytes;
      const bool lora = kLoraFirst ? k < lora_steps_ : k >= base_steps_;
      if (lora)
        fetch_lora(a, b, k, adapters);
      else
        fetch_base(a, b, k, (kLoraFirst ? k - lora_steps_ : k) * kStep<T>);
    }
    commit_copies();
  }

  __device__ void fetch_base(char* a, char* b, [[maybe_unused]] int k, int depth) {
    if constexpr (kProduct == Product::kRowSums) {
      Matrix rows_a = p_.a, rows_b = p_.b;
      rows_a.rows = rows_b.rows = last_;
      const int row = adapter_ < 0 ? first_ + depth : next_marked();
      if (adapter_ >= 0) rows_a.columns = p_.routing.rank(adapter_);  // beyond, other adapters' rows have theirs
      if (adapter_ < 0)
        load_tile<A, kThreads>(a, rows_a, row, m_);
      else
        load_tile<A, kThreads>(a, rows_a, row, m_, [&](int r) { return p_.routing.adapter_of(row + r) == adapter_; });
      load_tile<B, kThreads>(b, rows_b, row, n_, KeepAll(), dropout_);
    } else {
      load_tile<A, kThreads>(a, p_.a, m_, depth);
      if constexpr (Layout::kBAcross)
        load_tile<B, kThreads>(b, p_.b, depth, n_);
      else
        load_tile<B, kThreads>(b, p_.b, n_, depth);
      if constexpr (Layout::kInTile)
        load_tile<typename Layout::Down, kThreads>(down_ + k % kStages * Layout::Down::kBytes, p_.down, 0, depth);
    }
  }

  // The next step of the branch: steps come in order, so what has been fetched says where to go on.
  template <class Adapters>
  __device__ void fetch_lora([[maybe_unused]] char* a, char* b, [[maybe_unused]] int k, const Adapters& adapters) {
    if constexpr (Layout::kInTile) {
      load_up<B, kThreads>(b, p_.up, n_, p_.columns, 0, (k - base_steps_) * kStep<T>, p_.routing.rank(0));
    } else if constexpr (Layout::kRouted) {
      wait_for_kernel_before();  // which makes t
      const int adapter = adapters.adapter(slot_), begin = p_.routing.begin(adapter), rank = p_.routing.rank(adapter);
      Matrix t = p_.t;
      t.columns = rank;
      load_tile<A, kThreads>(a, t, m_, chunk_, [&](int row) { return adapters.uses(row, adapter); });
      if constexpr (kProduct == Product::kForward) {
        load_up<B, kThreads>(b, p_.up, n_, p_.columns, begin, chunk_, rank);
      } else {
        Matrix up = p_.up_rows;
        up.rows = begin + rank;
        load_tile<B, kThreads>(b, up, begin + chunk_, n_);
      }
      chunk_ += kStep<T>;
      if (chunk_ >= rank) {
        chunk_ = 0;
        ++slot_;
      }
    }
  }

  __device__ void multiply(const char* a_tile, const char* b_tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        if constexpr (Layout::kAAcross)
          load_a_across<A>(a[i], a_tile, warp_row_ + i * 16, half);
        else
          load_a<A>(a[i], a_tile, warp_row_ + i * 16, half);
      }
#pragma unroll
      for (int j = 0; j < kColumnTiles; j += 2) {
        uint32_t b[4];
        if constexpr (Layout::kBAcross)
          load_b_across<B>(b, b_tile, warp_column_ + j * 8, half);
        else
          load_b<B>(b, b_tile, warp_column_ + j * 8, half);
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          product<T>(c_[i][j], a[i], b[0], b[1], p_.precise);
          product<T>(c_[i][j + 1], a[i], b[2], b[3], p_.precise);
        }
      }
    }
  }

  // kInTile: t of this warp's sixteen rows.
  __device__ void multiply_down(const char* a_tile, const char* down_tile) {
    const int row = static_cast<int>(threadIdx.x) / 32 * 16;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t a[4], b[4];
      load_a<A>(a, a_tile, row, half);
#pragma unroll
      for (int j = 0; j < kInTileRank / 8; j += 2) {
        if (j * 8 >= p_.routing.total_rank) continue;  // its rows of the factor are zeros
        load_b<typename Layout::Down>(b, down_tile, j * 8, half);
        product<T>(u_[j], a, b[0], b[1], p_.precise);
        product<T>(u_[j + 1], a, b[2], b[3], p_.precise);
      }
    }
  }

  // t leaves the registers as the operand of the last steps: scaled, rounded as a separate t would be, zero in rows
  // that use the base alone.
  __device__ void keep_t() {
    const int row = static_cast<int>(threadIdx.x) / 32 * 16 + lane_of_warp() / 4, column = lane_of_warp() % 4 * 2;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int m = row + h * 8;
      const bool uses = m_ + m < p_.rows && p_.routing.adapter_of(m_ + m) == 0;
      const float scale = uses ? p_.routing.scale(0) : 0.0f;
#pragma unroll
      for (int j = 0; j < kInTileRank / 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int r = j * 8 + column + e, in_step = r % kStep<T>;
          char* to = t_ + r / kStep<T> * A::kBytes + A::offset(m, in_step / kPerChunk<T>);
          const float t = uses ? u_[j][2 * h + e] * scale : 0.0f;  // not 0 * NaN
          reinterpret_cast<T*>(to)[in_step % kPerChunk<T>] = from_float<T>(t);
        }
    }
  }

  // kMaskedGradient: the mask of x, by element of dx. 1 / (1 - p) is in the scale of u. The bits of all pairs
  // are drawn in a loop, in the order in which they are then used.
  __device__ void mask() {
    const int g = lane_of_warp() / 4, t = lane_of_warp() % 4;
    constexpr int kPairs = kRowTiles * kColumnTiles * 2;
    uint64_t kept = 0;
#pragma unroll 1
    for (int pair = 0; pair < kPairs; ++pair) {
      const int i = pair / (kColumnTiles * 2), j = pair / 2 % kColumnTiles, h = pair % 2;
      const uint64_t row = static_cast<uint64_t>(m_ + warp_row_ + i * 16 + g + h * 8);
      const uint64_t column = static_cast<uint64_t>(n_ + warp_column_ + j * 8 + t * 2);
      kept |= static_cast<uint64_t>(kept_bits(dropout_, row * static_cast<uint64_t>(p_.columns) + column, 2))
              << 2 * pair;
    }
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& c = c_[pair / (kColumnTiles * 2)][pair / 2 % kColumnTiles][pair % 2 * 2 + e];
        c = kept >> (2 * pair + e) & 1 ? c : 0.0f;
      }
  }

  const GemmParams& p_;
  const Dropout dropout_;
  Shared shared_;
  char *a_, *b_, *down_ = nullptr, *t_ = nullptr;
  const uint32_t* marks_ = nullptr;
  int m_, n_, adapter_, first_, last_, warp_row_, warp_column_;
  int base_steps_ = 0, lora_steps_ = 0, slot_ = 0, chunk_ = 0;
  float c_[kRowTiles][kColumnTiles][4] = {};
  float u_[Layout::kInTile ? kInTileRank / 8 : 1][4] = {};
};

// Blocks in order take tiles in groups of eight rows of tiles, so that those that run together share rows of W in L2.
// Those of a cluster take tiles one below the other, of which the last may be beyond the rows.
template <class Shape, int kCluster = 1>
__device__ inline void tile_of_block(int block, int rows, int columns, int* m, int* n) {
  constexpr int kGroup = 8 / kCluster, kRows = kCluster * Shape::kRows;
  const int tiles_m = (rows + kRows - 1) / kRows;
  const int tiles_n = (columns + Shape::kColumns - 1) / Shape::kColumns;
  const int cluster = block / kCluster, group = cluster / (kGroup * tiles_n), first = group * kGroup;
  const int height = tiles_m - first < kGroup ? tiles_m - first : kGroup, within = cluster % (kGroup * tiles_n);
  *m = (first + within % height) * kRows + block % kCluster * Shape::kRows;
  *n = within / height * Shape::kColumns;
}

// Two blocks on a multiprocessor leave 128 registers (of large tiles). fp32 needs more for the two parts of every
// operand, kInTile for t, kMaskedGradient for the mask, kRowSums for two transposed operands, and sm_75 for its copies.
template <class T, Product kProduct>
constexpr int kBlocksPerMultiprocessor =
    kArch >= 80 && sizeof(T) == 2 && (kProduct == Product::kForward || kProduct == Product::kInputGradient) ? 2 : 1;

template <class T, class Shape, Product kProduct>
__global__ void __launch_bounds__(Shape::kThreads, kBlocksPerMultiprocessor<T, kProduct>) gemm(const GemmParams p) {
  if constexpr (kCompiled<T>) {
    let_next_kernel_start();
    if constexpr (kProduct == Product::kRowSums) {
      wait_for_kernel_before();
      const int split = static_cast<int>(blockIdx.z) % p.splits, adapter = static_cast<int>(blockIdx.z) / p.splits;
      const bool routed = p.routing.adapters > 0;
      const int rows = routed ? p.routing.rank(adapter) : p.rows, m = static_cast<int>(blockIdx.y) * Shape::kRows;
      if (m >= rows) return;
      const int64_t steps = (p.depth + kStep<T> - 1) / kStep<T>;
      const int first = static_cast<int>(steps * split / p.splits) * kStep<T>;
      int last = static_cast<int>(steps * (split + 1) / p.splits) * kStep<T>;
      if (last > p.depth) last = p.depth;
      Gemm<T, Shape, kProduct> tile(p, m, static_cast<int>(blockIdx.x) * Shape::kColumns, routed ? adapter : -1, first,
                                    last);
      tile.run();
      tile.store_sums(p.sums + split * p.split_stride, routed ? p.routing.begin(adapter) : 0, rows);
    } else {
      int m = 0, n = 0;
      tile_of_block<Shape>(static_cast<int>(blockIdx.x), p.rows, p.columns, &m, &n);
      Gemm<T, Shape, kProduct> tile(p, m, n, -1, 0, 0);
      tile.run();
      tile.store();
    }
  }
}

}  // namespace lora_kernels::cuda
