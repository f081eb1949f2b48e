// Tiled products on the tensor cores of sm_90a, fp16 and bf16, for many rows: what gemm.cuh does by mma.sync, of which
// Hopper does about 60 % as many as of wgmma. Result = a b, with
//
//   kForward         y  = act(x Wt + bias + t B) + residual   a = x [M, K], b = W [N, K]; t = s x At, made before
//   kInputGradient   dx = dy W + u A                          a = dy [M, N], b = W [N, K] by depth; u = s dy Bt
//   kMaskedGradient  dx = dy W + mask (u A)                   with dropout: apart, the branch has to come first
//
// Two warpgroups make 128 x 256 of the result (or 128 x 128), 64 rows each, in steps of 64 of depth. Operands come into
// tiles in the 128-byte swizzle that wgmma reads. A tile of 128 x 256 is alone on its multiprocessor and has places for
// four steps of 48 KB: two are in flight from memory while one is multiplied and one is being finished. Of tiles of
// 128 x 128 two share a multiprocessor, so that one's end runs beside the other's products: three places of 32 KB, of
// which two are on their way, since a block lets its products run dry between steps. (The mask of dropout does not fit
// 128 registers: there a tile is alone, with six places.)
//
// a and b come by TMA, one thread asking for their boxes. Two blocks are a cluster and take tiles one below the other:
// each asks for its own a, and for half of b, which comes to both. So a place is filled anew when both are done with
// it, of which their threads tell each other, and a block gets ahead of the other by the places that it has and no
// further. Where alignment allows no tensor map, each copies all of its own by cp.async, of which 256 threads issue
// twelve (eight) each in the 1,024 (512) clocks that a step multiplies. The depth of b in gradients lies across its
// rows, as W and A lie in memory: wgmma reads 16-bit operands either way, and nothing is transposed. t beside x and B
// beside W (u beside dy and A beside W) are more steps on the same sums, of which only as many ranks as there are, in
// sixteens, are multiplied; they come by cp.async, since which rows of t count their adapters say. Sums leave through
// shared memory.
//
// The branch comes last, so that a kernel that starts early does the base while t is still being made, if it finds room
// (128 columns of y beside down_beside of skinny.cuh do). Under dropout the mask is of the branch alone: it comes
// first, its sums are masked in registers, and the base is added to them; the bits of the mask are drawn before u is
// waited for.
//
// FLOPs 2 M N (K + r). For a step of 2 * 128 * 256 (128) * 64 FLOPs, 1,024 (512) clocks at the peak, L2 brings 32 (24)
// KB to each block, 128 (85) FLOPs to a byte, for which it takes 936 (702) clocks as far as others have got
// (machine_hopper.h; without clusters 1,404 and 936), and shared memory 1,024 (640). Two tiles of 128 columns read more
// of shared memory than one of 256, and hide ends of 4,400 clocks, with GELU 6,400, where the wide one adds twice as
// much to its steps: which is better the plan says by depth and activation. Not measured: no GPU has run this, and what
// the two blocks of a cluster wait for each other is in no prediction. Not tried: a warpgroup that asks for boxes
// alone.
#pragma once

#include "cuda/gemm.cuh"
#include "cuda/primitives/tma.h"
#include "cuda/primitives/wgmma.h"

namespace lora_kernels::cuda {

template <int kColumns_>
struct WgmmaShape {
  static constexpr int kRows = 128, kColumns = kColumns_, kThreads = 256, kDepth = 64;
};

// Blocks of a multiprocessor. Two leave a thread 128 registers: too few for the mask beside the sums of 128 columns.
template <class Shape, Product kProduct>
constexpr int kWgmmaTogether = Shape::kColumns == 128 && kProduct != Product::kMaskedGradient ? 2 : 1;

template <class T, class Shape, Product kProduct>
struct WgmmaLayout {
  static constexpr bool kMasked = kProduct == Product::kMaskedGradient;
  static constexpr bool kAcross = kProduct == Product::kInputGradient || kMasked;
  static_assert(kAcross || kProduct == Product::kForward, "products that are made here");
  using A = Tile<T, Shape::kRows, Shape::kDepth>;
  // Rows of depth, or rows across depth, of which 64 columns are a tile.
  using B = std::conditional_t<kAcross, Tile<T, Shape::kDepth, 64>, Tile<T, Shape::kColumns, Shape::kDepth>>;
  static constexpr int kBTiles = kAcross ? Shape::kColumns / 64 : 1;
  // Each block of a cluster asks for half of b: of its tiles, or of its rows.
  static constexpr int kBBoxRows = kAcross ? B::kRows : B::kRows / 2;
  static_assert(kClusterBlocks == 2, "in halves");
  static_assert(!kAcross || B::kBytes == static_cast<int>(kWgmmaAcrossBytes), "as the descriptor says");
  using Adapters = TileAdapters<Shape::kRows, Shape::kThreads>;
  static constexpr bool kTwo = kWgmmaTogether<Shape, kProduct> == 2;
  static constexpr int kStages = kTwo ? 3 : Shape::kColumns == 256 ? 4 : 6;
  static constexpr int kStageBytes = A::kBytes + kBTiles * B::kBytes;
  // Sums on their way out: eight words more than a row has, so that the eight rows of a store lie in different banks.
  static constexpr int kSumsStride = Shape::kColumns + 8;
  static constexpr int kTileBytes = kStages * kStageBytes;
  static_assert(Shape::kRows * kSumsStride * 4 <= kTileBytes, "sums take the place of the tiles");
  static constexpr size_t kSharedBytes =
      static_cast<size_t>(kTileBytes) + 2 * ((kStages * 8 + 15) / 16 * 16) + (Adapters::kWords * 4 + 15) / 16 * 16;
};

struct WgmmaParams {
  TensorMap a, b;      // of both operands, boxes of a tile
  bool boxes = false;  // there are such maps
  GemmParams gemm;
};

template <class T, class Shape, Product kProduct>
class WgmmaTile {
  using Layout = WgmmaLayout<T, Shape, kProduct>;
  using A = typename Layout::A;
  using B = typename Layout::B;
  using Adapters = typename Layout::Adapters;
  static constexpr int kThreads = Shape::kThreads, kStages = Layout::kStages;
  // Beside another block products may run dry between steps: the step before is then done when its place is filled. A
  // block alone keeps them going, and a place for the step that is being finished.
  static constexpr bool kDry = Layout::kTwo;
  static constexpr int kAhead = kStages - (kDry ? 1 : 2);
  static constexpr bool kAcross = Layout::kAcross, kMasked = Layout::kMasked;
  // Columns whose bits fill two words of a thread.
  static constexpr int kMaskColumns = 128, kMaskParts = Shape::kColumns / kMaskColumns;
  static_assert(A::kBytes % kWgmmaAlignment == 0 && B::kBytes % kWgmmaAlignment == 0, "tiles follow one another");

 public:
  __device__ WgmmaTile(const WgmmaParams& p, int m, int n)
      : all_(p), p_(p.gemm), dropout_(p.gemm.dropout.with_seed()), m_(m), n_(n) {
    tiles_ = shared_.template take<char>(Layout::kTileBytes);  // first: from a multiple of 1024 on
    landed_ = shared_.template take<uint64_t>(kStages);
    free_ = shared_.template take<uint64_t>(kStages);
  }

  __device__ void run() {
    base_steps_ = (p_.depth + Shape::kDepth - 1) / Shape::kDepth;
    if (all_.boxes && threadIdx.x == 0) {
      for (int i = 0; i < kStages; ++i) {
        init_arrivals(landed_ + i);
        init_arrivals(free_ + i, kClusterBlocks);
      }
      fence_arrivals();
    }
    arrive_in_cluster();
    wait_for_cluster();  // the barriers of both are there
    if (all_.boxes && threadIdx.x == 0)
      for (int k = 0; !kMasked && k < kAhead && k < base_steps_; ++k) fetch_a(k), fetch_b(k);
    const Adapters adapters(p_.routing, shared_.template take<int>(Adapters::kWords), m_, p_.rows);
    int branch_steps = 0;
    for (int i = 0; i < adapters.count(); ++i)
      branch_steps += (p_.routing.rank(adapters.adapter(i)) + Shape::kDepth - 1) / Shape::kDepth;
    // The base has the same places in both blocks, however many steps of a branch each has before it.
    if (kMasked) base_begin_ = (branch_steps + kStages - 1) / kStages * kStages;
    const int first = kMasked ? base_begin_ - branch_steps : 0, steps = first + branch_steps + base_steps_;
    if (kMasked && branch_steps > 0) draw_mask();
    for (int k = first; k < first + kAhead; ++k) {
      if (kMasked) announce(k);
      fetch(k, steps, adapters, !kMasked && all_.boxes);
    }
    Place multiplied;
    tie(c_);
    for (int k = first; k < steps; ++k) {
      wait_copies<kAhead - 1>();
      if (all_.boxes && is_base(k)) wait_for_phase(landed_ + k % kStages, turn(k) & 1);
      fence_proxy();
      if (kDry) wait_products<0>();
      __syncthreads();  // step k has landed for all, and all are done with step k - 1 (k - 2): its place is filled next
      if (kMasked && k == base_begin_ && k > first) mask();
      announce(k + kAhead);
      const char* a = tiles_ + k % kStages * Layout::kStageBytes;
      if (is_base(k))
        multiply<Shape::kDepth / 16>(a);
      else
        multiply_ranks(a, multiplied.next(p_.routing, adapters));
      fetch(k + kAhead, steps, adapters, false);
      if (!kDry) wait_products<1>();  // step k - 1
    }
    arrive_in_cluster();  // and leave when both have asked for all, and had it: store()
    wait_products<0>();
    tie(c_);
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
    wait_for_cluster();
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

  __device__ bool is_base(int k) const { return k >= base_begin_ && k < base_begin_ + base_steps_; }

  // How often the place of a step of the base has been filled by such.
  __device__ int turn(int k) const { return (k - base_begin_) / kStages; }

  // By one thread, once the place was read by products that are done and everyone in this block has said so at a
  // barrier: how many bytes come, of which a is this block's own; and to both blocks that this one is done with the
  // place. (There was nothing in it in the first turn, but for a branch.)
  __device__ void fetch_a(int k) {
    const int place = k % kStages;
    expect_bytes(landed_ + place, Layout::kStageBytes);
    load_box(tiles_ + place * Layout::kStageBytes, all_.a, m_, (k - base_begin_) * Shape::kDepth, landed_ + place);
    if (kMasked || turn(k) > 0)
      for (unsigned i = 0; i < kClusterBlocks; ++i) arrive(free_ + place, i);
  }

  // By the same thread: half of b, for both blocks, when both are done with the place.
  __device__ void fetch_b(int k) {
    const int place = k % kStages, depth = (k - base_begin_) * Shape::kDepth;
    const int rank = static_cast<int>(rank_in_cluster());
    char* b = tiles_ + place * Layout::kStageBytes + A::kBytes;
    if (kMasked || turn(k) > 0) wait_for_phase(free_ + place, (kMasked ? turn(k) : turn(k) - 1) & 1);
    if constexpr (kAcross) {
      constexpr int kHalf = Layout::kBTiles / 2;
#pragma unroll
      for (int i = 0; i < kHalf; ++i) {
        const int tile = rank * kHalf + i;
        share_box(b + tile * B::kBytes, all_.b, depth, n_ + tile * 64, landed_ + place);
      }
    } else {
      constexpr int kHalf = Shape::kColumns / 2;
      share_box(b + rank * (B::kBytes / 2), all_.b, n_ + rank * kHalf, depth, landed_ + place);
    }
  }

  // Before products are asked for, so that the other block waits no longer than it has to; b comes behind them.
  __device__ void announce(int k) {
    if (all_.boxes && is_base(k) && threadIdx.x == 0) fetch_a(k);
  }

  __device__ void fetch(int k, int steps, const Adapters& adapters, bool boxes_are_fetched) {
    if (k < steps) {
      char *a = tiles_ + k % kStages * Layout::kStageBytes, *b = a + A::kBytes;
      if (is_base(k) && all_.boxes) {
        if (!boxes_are_fetched && threadIdx.x == 0) fetch_b(k);
      } else if (is_base(k)) {
        const int depth = (k - base_begin_) * Shape::kDepth;
        load_tile<A, kThreads>(a, p_.a, m_, depth);
        if constexpr (kAcross)
          load_across(b, p_.b, depth);
        else
          load_tile<B, kThreads>(b, p_.b, n_, depth);
      } else {
        wait_for_kernel_before();  // which makes t
        const int adapter = adapters.adapter(fetched_.slot), chunk = fetched_.chunk;
        const int begin = p_.routing.begin(adapter), rank = p_.routing.rank(adapter);
        Matrix t = p_.t;
        t.columns = rank;
        load_tile<A, kThreads>(a, t, m_, chunk, [&](int row) { return adapters.uses(row, adapter); });
        if constexpr (kAcross) {
          Matrix up = p_.up_rows;
          up.rows = begin + rank;
          load_across(b, up, begin + chunk);
        } else {
          load_up<B, kThreads>(b, p_.up, n_, p_.columns, begin, chunk, rank);
        }
        fetched_.next(p_.routing, adapters);
      }
    }
    commit_copies();
  }

  // Rows `row` on of this tile's columns.
  __device__ void load_across(char* b, const Matrix& m, int row) {
#pragma unroll
    for (int i = 0; i < Layout::kBTiles; ++i) load_tile<B, kThreads>(b + i * B::kBytes, m, row, n_ + i * 64);
  }

  template <int kSteps>
  __device__ void multiply(const char* a_tile) {
    uint64_t a = 0, b = 0;
    operands(a_tile, &a, &b);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kSteps; ++i)
      wgmma<T, Shape::kColumns, kAcross>(c_, a + static_cast<uint64_t>(i) * kWgmmaStep,
                                         b + static_cast<uint64_t>(i) * (kAcross ? kWgmmaStepAcross : kWgmmaStep));
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

  // This warpgroup's rows of a, and b.
  __device__ static void operands(const char* a_tile, uint64_t* a, uint64_t* b) {
    *a = wgmma_operand(a_tile + static_cast<int>(threadIdx.x) / 128 * (A::kBytes / 2));
    *b = kAcross ? wgmma_operand_across(a_tile + A::kBytes) : wgmma_operand(a_tile + A::kBytes);
  }

  // The mask of x at this thread's elements of dx: of rows g and g + 8 (kept_[h]) bit 4 j + e for column 8 j + 2 t + e.
  // Two neighbours have the four elements of a counter between them where rows are whole counters: each draws those of
  // one row for both.
  __device__ void draw_mask() {
    const int g = lane_of_warp() / 4, t = lane_of_warp() % 4, odd = t % 2;
    const int row = m_ + static_cast<int>(threadIdx.x) / 32 * 16 + g;
    const auto bits = [&](int of_row, int column, int count) {
      return static_cast<uint64_t>(
          kept_bits(dropout_, static_cast<uint64_t>(of_row) * static_cast<uint64_t>(p_.columns) + column, count));
    };
#pragma unroll
    for (int part = 0; part < kMaskParts; ++part) {
      uint64_t of_row[2] = {0, 0};
      const int column = n_ + part * kMaskColumns;
      if (p_.columns % 4 == 0) {
#pragma unroll 1
        for (int j = 0; j < 16; ++j) of_row[0] |= bits(row + odd * 8, column + j * 8 + t / 2 * 4, 4) << 4 * j;
        const uint64_t others = __shfl_xor_sync(~0u, of_row[0], 1);
        of_row[1] = odd ? of_row[0] : others;
        of_row[0] = odd ? others : of_row[0];
      } else {
#pragma unroll 1
        for (int j = 0; j < 16; ++j) {
          of_row[0] |= bits(row, column + j * 8 + t * 2, 2) << (4 * j + 2 * odd);
          of_row[1] |= bits(row + 8, column + j * 8 + t * 2, 2) << (4 * j + 2 * odd);
        }
      }
      for (int h = 0; h < 2; ++h) kept_[part][h] = of_row[h] >> 2 * odd;
    }
  }

  // 1 / (1 - p) is in the scale of u.
  __device__ void mask() {
    wait_products<0>();
    tie(c_);
#pragma unroll
    for (int j = 0; j < Shape::kColumns / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) c_[j][i] = kept_[j / 16][i / 2] >> (4 * (j % 16) + i % 2) & 1 ? c_[j][i] : 0.0f;
    tie(c_);
  }

  const WgmmaParams& all_;
  const GemmParams& p_;
  const Dropout dropout_;
  Shared shared_;
  char* tiles_;
  uint64_t* landed_;  // of each place: a and b are there
  uint64_t* free_;    // and: both blocks are done with what was there before
  int m_, n_, base_begin_ = 0, base_steps_ = 0;
  Place fetched_;
  uint64_t kept_[kMasked ? kMaskParts : 1][2];
  float c_[Shape::kColumns / 8][4] = {};
};

template <class T, class Shape, Product kProduct>
__global__ void __launch_bounds__(Shape::kThreads, kWgmmaTogether<Shape, kProduct>)
    gemm_wgmma(const __grid_constant__ WgmmaParams p) {
  if constexpr (kWgmma) {
    let_next_kernel_start();
    int m = 0, n = 0;
    tile_of_block<Shape, kClusterBlocks>(static_cast<int>(blockIdx.x), p.gemm.rows, p.gemm.columns, &m, &n);
    WgmmaTile<T, Shape, kProduct> tile(p, m, n);
    tile.run();
    tile.store();
  } else {
#if !defined(LORA_KERNELS_EMULATION)
    __trap();  // a plan takes it only where the library has it for sm_90a (CudaDevice::wgmma)
#endif
  }
}

}  // namespace lora_kernels::cuda
