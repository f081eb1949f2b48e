// The tiled forward product on the tensor cores of sm_90a: y = act(x Wt + bias + t B) + residual, fp16 and bf16, for
// many rows. What gemm.cuh does by mma.sync, of which Hopper does about 60 % as many as of wgmma.
//
// Two warpgroups make 128 x 256 of y (or 128 x 128), 64 rows each, in steps of 64 of depth. Operands come into tiles in
// the 128-byte swizzle that wgmma reads, four (six) steps of 48 (32) KB: two (four) steps are in flight from memory while
// one is multiplied and one is being finished. x and W come by TMA, one thread asking for two boxes; where their
// alignment allows no tensor map, by cp.async, of which 256 threads issue twelve (eight) each in the 1,024 (512) clocks
// that a step multiplies. t beside x and B beside W are more steps on the same sums, of which only as many ranks as there
// are, in sixteens, are multiplied; they come by cp.async, since which rows of t count their adapters say. Sums leave
// through shared memory.
//
// FLOPs 2 M N (K + r); a step reads 48 KB for 2 * 128 * 256 * 64 FLOPs: 85 to a byte of L2. Bound by arithmetic. Not
// measured: no GPU has run this. Not tried: a warpgroup that asks for boxes alone, stores beside the next tile's
// products, clusters that share boxes of W.
#pragma once

#include "cuda/gemm.cuh"
#include "cuda/primitives/tma.h"
#include "cuda/primitives/wgmma.h"

namespace lora_kernels::cuda {

template <int kColumns_>
struct WgmmaShape {
  static constexpr int kRows = 128, kColumns = kColumns_, kThreads = 256, kDepth = 64;
  static constexpr int kStages = kColumns == 256 ? 4 : 6;
};

template <class T, class Shape>
struct WgmmaLayout {
  using A = Tile<T, Shape::kRows, Shape::kDepth>;
  using B = Tile<T, Shape::kColumns, Shape::kDepth>;
  using Adapters = TileAdapters<Shape::kRows, Shape::kThreads>;
  static constexpr int kStageBytes = A::kBytes + B::kBytes;
  // Sums on their way out: eight words more than a row has, so that the eight rows of a store lie in different banks.
  static constexpr int kSumsStride = Shape::kColumns + 8;
  static constexpr int kTileBytes = Shape::kStages * kStageBytes;
  static_assert(Shape::kRows * kSumsStride * 4 <= kTileBytes, "sums take the place of the tiles");
  static constexpr size_t kSharedBytes =
      static_cast<size_t>(kTileBytes) + (Shape::kStages * 8 + 15) / 16 * 16 + (Adapters::kWords * 4 + 15) / 16 * 16;
};

struct WgmmaParams {
  TensorMap a, b;      // of x and W, boxes of a tile's rows
  bool boxes = false;  // there are such maps
  GemmParams gemm;
};

template <class T, class Shape>
class WgmmaTile {
  using Layout = WgmmaLayout<T, Shape>;
  using A = typename Layout::A;
  using B = typename Layout::B;
  using Adapters = typename Layout::Adapters;
  static constexpr int kThreads = Shape::kThreads, kStages = Shape::kStages, kAhead = kStages - 2;
  static_assert(A::kBytes % kWgmmaAlignment == 0 && B::kBytes % kWgmmaAlignment == 0, "tiles follow one another");

 public:
  __device__ WgmmaTile(const WgmmaParams& p, int m, int n) : all_(p), p_(p.gemm), m_(m), n_(n) {
    tiles_ = shared_.template take<char>(Layout::kTileBytes);  // first: from a multiple of 1024 on
    landed_ = shared_.template take<uint64_t>(kStages);
  }

  __device__ void run() {
    base_steps_ = (p_.depth + Shape::kDepth - 1) / Shape::kDepth;
    if (all_.boxes && threadIdx.x == 0) {
      for (int i = 0; i < kStages; ++i) init_arrivals(landed_ + i);
      fence_arrivals();
      for (int k = 0; k < kAhead && k < base_steps_; ++k) fetch_boxes(k);
    }
    // Its barrier shows all threads the barriers above.
    const Adapters adapters(p_.routing, shared_.template take<int>(Adapters::kWords), m_, p_.rows);
    int steps = base_steps_;
    for (int i = 0; i < adapters.count(); ++i)
      steps += (p_.routing.rank(adapters.adapter(i)) + Shape::kDepth - 1) / Shape::kDepth;
    for (int k = 0; k < kAhead; ++k) fetch(k, steps, adapters, all_.boxes);
    Place multiplied;
    for (int k = 0; k < steps; ++k) {
      wait_copies<kAhead - 1>();
      if (all_.boxes && k < base_steps_) wait_for_bytes(landed_ + k % kStages, k / kStages & 1);
      fence_proxy();
      __syncthreads();  // step k has landed for all, and all are done with step k - 2, whose place is filled next
      const char* a = tiles_ + k % kStages * Layout::kStageBytes;
      if (k < base_steps_)
        multiply<Shape::kDepth / 16>(a);
      else
        multiply_ranks(a, multiplied.next(p_.routing, adapters));
      fetch(k + kAhead, steps, adapters, false);
      wait_products<1>();  // step k - 1
    }
    wait_products<0>();
  }

  __device__ void store() {
    wait_for_kernel_before();
    __syncthreads();  // all are done with the tiles
    float* sums = reinterpret_cast<float*>(tiles_);
    const int thread = static_cast<int>(threadIdx.x), g = lane_of_warp() / 4, t = lane_of_warp() % 4;
    const int row = thread / 32 * 16 + g;
#pragma unroll
    for (int j = 0; j < Shape::kColumns / 8; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        *reinterpret_cast<float2*>(sums + (row + h * 8) * Layout::kSumsStride + j * 8 + t * 2) =
            make_float2(c_[j][2 * h], c_[j][2 * h + 1]);
    __syncthreads();
    constexpr int kPairs = Shape::kColumns / 2;
#pragma unroll 2
    for (int i = thread; i < Shape::kRows * kPairs; i += kThreads) {
      const int r = i / kPairs, column = i % kPairs * 2;
      const float2 two = *reinterpret_cast<const float2*>(sums + r * Layout::kSumsStride + column);
      if (m_ + r < p_.rows && n_ + column < p_.columns) p_.epilogue.store_two<T>(two.x, two.y, m_ + r, n_ + column);
    }
  }

 private:
  // Where the branch's steps have come to: 64 ranks at a time of one adapter after another.
  struct Place {
    int slot = 0, chunk = 0;
    // Ranks of the step here, which is then behind.
    __device__ int next(const Routing& routing, const Adapters& adapters) {
      const int left = routing.rank(adapters.adapter(slot)) - chunk;
      chunk += Shape::kDepth;
      if (left <= Shape::kDepth) ++slot, chunk = 0;
      return left < Shape::kDepth ? left : Shape::kDepth;
    }
  };

  // By one thread. The tiles' place was read by products that are done, and everyone has said so at a barrier.
  __device__ void fetch_boxes(int k) {
    char* a = tiles_ + k % kStages * Layout::kStageBytes;
    uint64_t* landed = landed_ + k % kStages;
    expect_bytes(landed, Layout::kStageBytes);
    load_box(a, all_.a, m_, k * Shape::kDepth, landed);
    load_box(a + A::kBytes, all_.b, n_, k * Shape::kDepth, landed);
  }

  __device__ void fetch(int k, int steps, const Adapters& adapters, bool boxes_are_fetched) {
    if (k < steps) {
      char *a = tiles_ + k % kStages * Layout::kStageBytes, *b = a + A::kBytes;
      if (k < base_steps_ && all_.boxes) {
        if (!boxes_are_fetched && threadIdx.x == 0) fetch_boxes(k);
      } else if (k < base_steps_) {
        load_tile<A, kThreads>(a, p_.a, m_, k * Shape::kDepth);
        load_tile<B, kThreads>(b, p_.b, n_, k * Shape::kDepth);
      } else {
        wait_for_kernel_before();  // which makes t
        const int adapter = adapters.adapter(fetched_.slot), chunk = fetched_.chunk;
        const int rank = p_.routing.rank(adapter);
        Matrix t = p_.t;
        t.columns = rank;
        load_tile<A, kThreads>(a, t, m_, chunk, [&](int row) { return adapters.uses(row, adapter); });
        load_up<B, kThreads>(b, p_.up, n_, p_.columns, p_.routing.begin(adapter), chunk, rank);
        fetched_.next(p_.routing, adapters);
      }
    }
    commit_copies();
  }

  template <int kSteps>
  __device__ void multiply(const char* a_tile) {
    uint64_t a = 0, b = 0;
    operands(a_tile, &a, &b);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kSteps; ++i)
      wgmma<T, Shape::kColumns>(c_, a + static_cast<uint64_t>(i) * kWgmmaStep,
                                b + static_cast<uint64_t>(i) * kWgmmaStep);
    commit_products();
  }

  // The same for a step of the branch: beyond its ranks the tiles are zeros.
  __device__ void multiply_ranks(const char* a_tile, int ranks) {
    if (ranks <= 16)
      multiply<1>(a_tile);
    else if (ranks <= 32)
      multiply<2>(a_tile);
    else
      multiply<Shape::kDepth / 16>(a_tile);
  }

  // This warpgroup's rows of x, and W.
  __device__ static void operands(const char* a_tile, uint64_t* a, uint64_t* b) {
    *a = wgmma_operand(a_tile + static_cast<int>(threadIdx.x) / 128 * (A::kBytes / 2));
    *b = wgmma_operand(a_tile + A::kBytes);
  }

  const WgmmaParams& all_;
  const GemmParams& p_;
  Shared shared_;
  char* tiles_;
  uint64_t* landed_;  // of each place: x and W are there
  int m_, n_, base_steps_ = 0;
  Place fetched_;
  float c_[Shape::kColumns / 8][4] = {};
};

template <class T, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1) gemm_wgmma(const __grid_constant__ WgmmaParams p) {
  if constexpr (kWgmma) {
    int m = 0, n = 0;
    tile_of_block<Shape>(static_cast<int>(blockIdx.x), p.gemm.rows, p.gemm.columns, &m, &n);
    WgmmaTile<T, Shape> tile(p, m, n);
    tile.run();
    tile.store();
  } else {
#if !defined(LORA_KERNELS_EMULATION)
    __trap();  // a plan takes it only where the library has it for sm_90a (CudaDevice::wgmma)
#endif
  }
}

}  // namespace lora_kernels::cuda
