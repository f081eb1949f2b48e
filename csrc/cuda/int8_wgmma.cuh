// The tiled product of int8_lora_linear on the tensor cores of sm_90a, for many rows: what int8_gemm.cuh does by
// mma.sync, of which Hopper does about 60 % as many as of wgmma. It makes y transposed, so that the packed weight needs
// no other layout: wgmma takes its left operand from registers, in the fragments of mma.sync, and that is the weight;
// its right one from shared memory by rows, and that is q.
//
// Two warpgroups make 128 rows x 128 (or 256) channels of y, 64 (128) channels each, in steps of 128 k. Both operands
// come by TMA into the 128-byte swizzle: 16 KB of q, rows of 128 bytes, and 16 (32) KB of w, the packed steps of 256
// bytes of two (four) blocks as rows of 128 bytes. Two blocks are a cluster and take tiles one below the other: one
// thread of each asks for its own q and for half of w, which comes to both. w does not wait for the kernel that makes
// q.
//
// Of tiles of 128 channels two blocks share a multiprocessor, in 128 registers a thread and three places for steps, so
// that one block's end runs beside the other's products. Between its own steps a block lets the products run dry: then
// the place of the step before is free, and two steps are on their way while one is multiplied. (To free it in the
// middle of the next step, products in flight, ptxas puts them one after another.) A tile of 256 channels is alone, has
// four places and keeps products in flight. It reads a tenth less of shared memory, but nothing runs beside its end:
// plans take it for much depth, or where rows and columns divide better into such.
//
// Channels of a tile may be taken in any order: of the sixteen bytes that a lane reads of w (a word of four k of four
// neighbouring channels) two words go to each of two instructions, rows g and g + 8 of their fragments, and the four
// words of k behind them complete both. (At 128 channels there is one instruction, and lanes read eight bytes.) Eight
// (sixteen) lanes read 128 bytes from 32 different banks, as the swizzle has it: the four words t lie 256 bytes apart.
// Afterwards a lane holds four (two) neighbouring channels of each of its 32 rows. The registers of w are taken in
// turns, as wgmma reads them while it multiplies.
//
// The LoRA branch follows on the same sums, then fp32, by mma.sync, whose fragments of a warp are wgmma's: B by
// channels as the left operand, t by rows as the right one, r / 32 steps (r / 16 in fp32) fetched by cp.async into
// places of the ring while the last integers are multiplied; of the last step only the half that has ranks. y leaves
// through shared memory, in one loop with bias, activation and residual.
//
// Integer operations 2 M N K, exact. A step of 2 * 128 * 128 (256) * 128 of them is multiplied in 512 (1,024) clocks at
// the peak; shared memory, at 128 bytes per clock, takes 640 (1,152) for what comes and is read, which bounds it; L2
// brings 24 (32) KB to each block, for which it takes 702 (936) as far as others have got (machine_hopper.h; without
// clusters 936 and 1,404). By its instructions the end of 128 channels takes 3,800 clocks, with GELU 6,700, in which
// the other block's steps are multiplied. That both blocks of a multiprocessor are out of step nothing but chance
// brings about.
//
// Where the driver knows no tensor maps int8_gemm.cuh takes its place. Not measured: no GPU has run this, and what the
// two blocks of a cluster wait for each other is in no prediction. Not tried: blocks of a multiprocessor that begin
// half a tile apart; 256 rows for each read of w, which would leave 1,024 clocks of shared memory to the wide tile.
#pragma once

#include "cuda/int8_gemm.cuh"
#include "cuda/primitives/tma.h"
#include "cuda/primitives/wgmma_int8.h"

namespace lora_kernels::cuda {

template <int kColumns_>
struct Int8WgmmaShape {
  static constexpr int kRows = 128, kColumns = kColumns_, kThreads = 256, kDepth = 128;
  static constexpr int kStages = kColumns == 256 ? 4 : 3;
  static constexpr int kTogether = kColumns == 256 ? 1 : 2;  // blocks of a multiprocessor
  static constexpr int kProducts = kColumns / 128;           // of 64 channels, by each warpgroup
  static constexpr int kBlocks = kColumns / 64;              // of the packed weight
  static_assert(kRows == kWgmmaInt8Columns, "a product has all rows of the tile");
};

template <class T, class Shape>
struct Int8WgmmaLayout {
  using TileT = Tile<T, Shape::kRows, kStep<T>>;
  using TileB = Tile<T, Shape::kColumns, kStep<T>>;
  using Adapters = TileAdapters<Shape::kRows, Shape::kThreads>;
  static constexpr int kRowsBytes = Shape::kRows * Shape::kDepth, kBlockBytes = 64 * Shape::kDepth;
  static constexpr int kStageBytes = kRowsBytes + Shape::kBlocks * kBlockBytes;
  static_assert(TileT::kBytes <= kRowsBytes && kRowsBytes + TileB::kBytes <= kStageBytes,
                "steps of the branch in the same ring");
  static_assert(kRowsBytes % kWgmmaAlignment == 0 && kStageBytes % kWgmmaAlignment == 0, "tiles follow one another");
  static constexpr int kTileBytes = Shape::kStages * kStageBytes;
  static constexpr size_t kSharedBytes =
      static_cast<size_t>(kTileBytes) + (Shape::kStages * 8 + 15) / 16 * 16 + (Adapters::kWords * 4 + 15) / 16 * 16;
};

struct Int8WgmmaParams {
  TensorMap q, w;
  Int8GemmParams gemm;
};

// Maps of both operands; false where there can be none.
template <class Shape>
inline bool make_int8_maps(Int8WgmmaParams* p) {
  const Int8GemmParams& g = p->gemm;
  const int64_t rows = g.rows, steps = g.w.steps, blocks = (int64_t{g.w.columns} + 63) / 64;
  const BytePlanes q{g.q, 1, rows, g.q_stride, rows * g.q_stride, g.q_stride};
  const BytePlanes w{g.w.data, blocks, steps * (kInt8StepBytes / 128), 128, g.w.block_bytes, 128};
  return make_tensor_map(&p->q, q, 1, Shape::kRows) &&
         make_tensor_map(&p->w, w, Shape::kBlocks / kClusterBlocks, Shape::kDepth / 4 * (kInt8StepBytes / 128));
}

template <class T, class Shape>
class Int8WgmmaTile {
  using Layout = Int8WgmmaLayout<T, Shape>;
  using TileT = typename Layout::TileT;
  using TileB = typename Layout::TileB;
  using Adapters = typename Layout::Adapters;
  static constexpr int kThreads = Shape::kThreads, kStages = Shape::kStages;
  // Beside another block products may run dry between steps: the step before is then done when a place is filled. A
  // block alone keeps them going, and a place for the step that is being finished.
  static constexpr bool kDry = Shape::kTogether > 1;
  static constexpr int kAhead = kStages - (kDry ? 1 : 2);
  static constexpr int kProducts = Shape::kProducts, kEights = Shape::kRows / 8;
  static constexpr int kRun = 2 * kProducts;           // neighbouring channels of a lane
  static constexpr int kWarpColumns = 16 * kProducts;  // channels of a warp
  static_assert(Shape::kDepth / 32 % 2 == 0, "registers in turns, from step to step");

 public:
  __device__ Int8WgmmaTile(const Int8WgmmaParams& p, int m, int n) : all_(p), p_(p.gemm), m_(m), n_(n) {
    tiles_ = shared_.template take<char>(Layout::kTileBytes);  // first: from a multiple of 1024 on
    landed_ = shared_.template take<uint64_t>(kStages);
    warp_column_ = static_cast<int>(threadIdx.x) / 32 * kWarpColumns;
    base_steps_ = (p_.w.steps * 4 + Shape::kDepth - 1) / Shape::kDepth;
  }

  __device__ void run() {
    const int first = kAhead < base_steps_ ? kAhead : base_steps_;
    if (threadIdx.x == 0) {
      for (int i = 0; i < kStages; ++i) init_arrivals(landed_ + i);
      fence_arrivals();
    }
    arrive_in_cluster();
    wait_for_cluster();  // the barriers of both are there
    if (threadIdx.x == 0)
      for (int k = 0; k < first; ++k) expect(k), fetch_weight(k);
    wait_for_kernel_before();  // which makes q and t
    if (threadIdx.x == 0)
      for (int k = 0; k < first; ++k) fetch_rows(k);
    const Adapters adapters(p_.routing, shared_.template take<int>(Adapters::kWords), m_, p_.rows);
    int steps = base_steps_;
    for (int i = 0; i < adapters.count(); ++i)
      steps += (p_.routing.rank(adapters.adapter(i)) + kStep<T> - 1) / kStep<T>;
#pragma unroll 1
    for (int k = 0; k < kAhead; ++k) fetch(k, steps, adapters);

    int32_t sums[kProducts][kEights][4] = {};
    uint32_t w[2][kProducts][4];
    tie(sums);
    int k = 0;
    do {  // There is a step, or there were no map. (If there might be none, ptxas would make products one by one.)
      wait_for_phase(landed_ + k % kStages, k / kStages & 1);
      if (kDry) wait_products<0>();
      __syncthreads();  // all are done with step k - 1 (k - 2), whose place is filled next
      // w a step later than q. The other block asked for its half of step k, which has landed, when it was done with
      // step k - 2 (k - 3): the place that step k + 1 takes.
      static_assert(kAhead == 2 && kStages == (kDry ? 3 : 4), "as it says");
      if (threadIdx.x == 0) {
        if (k + kAhead < base_steps_) expect(k + kAhead), fetch_rows(k + kAhead);
        if (k > 0 && k + kAhead - 1 < base_steps_) fetch_weight(k + kAhead - 1);
      }
      fetch(k + kAhead, steps, adapters);
      multiply(place(k), w, sums);
    } while (++k < base_steps_);
    arrive_in_cluster();  // and leave when both have asked for all, and had it
    wait_products<0>();
    tie(sums);
    float c[kProducts][kEights][4];
    scale(sums, c);
    for (int i = 0; i < adapters.count(); ++i) {
      const int rank = p_.routing.rank(adapters.adapter(i));
      for (int chunk = 0; chunk < rank; chunk += kStep<T>, ++k) {
        wait_copies<kAhead - 1>();
        __syncthreads();  // step k has landed for all, and all are done with step k - 1
        fetch(k + kAhead, steps, adapters);
        add_branch(place(k), rank - chunk, c);
      }
    }
    wait_copies<0>();
    store(c);
    wait_for_cluster();
  }

 private:
  __device__ char* place(int k) const { return tiles_ + k % kStages * Layout::kStageBytes; }

  // By one thread, once the place was read by products and loads that are done and everyone in this block has said so
  // at a barrier: how many bytes come, q of this block's rows, and half of w for both blocks.
  __device__ void expect(int k) { expect_bytes(landed_ + k % kStages, Layout::kStageBytes); }
  __device__ void fetch_weight(int k) {
    constexpr int kHalf = Shape::kBlocks / static_cast<int>(kClusterBlocks);
    const int half = static_cast<int>(rank_in_cluster()) * kHalf;
    share_planes(place(k) + Layout::kRowsBytes + half * Layout::kBlockBytes, all_.w, n_ / 64 + half,
                 k * (Shape::kDepth / 4) * (kInt8StepBytes / 128), 0, landed_ + k % kStages);
  }
  __device__ void fetch_rows(int k) { load_planes(place(k), all_.q, 0, m_, k * Shape::kDepth, landed_ + k % kStages); }

  __device__ void fetch(int k, int steps, const Adapters& adapters) {
    if (k >= base_steps_) fetch_branch(k, steps, adapters);
    commit_copies();
  }

  // The next step of the branch: steps come in order, so what has been fetched says where to go on. A warp's channels
  // lie in its tile of B as in the fragments of w: row 8 (2 i + h) + g is that of instruction i, row g + 8 h.
  __device__ void fetch_branch(int k, int steps, const Adapters& adapters) {
    if (k >= steps) return;
    char *rows = place(k), *factor = rows + Layout::kRowsBytes;
    const int adapter = adapters.adapter(slot_), begin = p_.routing.begin(adapter), rank = p_.routing.rank(adapter);
    Matrix t = p_.t;
    t.columns = rank;
    load_tile<TileT, kThreads>(rows, t, m_, chunk_, [&](int row) { return adapters.uses(row, adapter); });
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < Shape::kColumns * 4; i += kThreads) {
      const int at = i % Shape::kColumns, part = i / Shape::kColumns, r = chunk_ + part * kPerChunk<T>;
      const int n = n_ + at / kWarpColumns * kWarpColumns + at % 8 * kRun + at % kWarpColumns / 8;
      const int left = n < p_.w.columns ? rank - r : 0;
      const int count = left < 0 ? 0 : left > kPerChunk<T> ? kPerChunk<T> : left;
      store16(factor + TileB::offset(at, part), p_.up.chunk<T>(begin + r, n, count));
    }
    chunk_ += kStep<T>;
    if (chunk_ >= rank) {
      chunk_ = 0;
      ++slot_;
    }
  }

  // The registers of all instructions of 32 k: words t and t + 4 of a lane's channels.
  __device__ void load_weight(const char* weight, int step, uint32_t (&w)[kProducts][4]) const {
    const int g = lane_of_warp() / 4, t = lane_of_warp() % 4, channel = warp_column_ + g * kRun;
    const char* block = weight + channel / 64 * Layout::kBlockBytes;
#pragma unroll
    for (int high = 0; high < 2; ++high) {
      const int at = (step * 8 + high * 4 + t) * kInt8StepBytes + channel % 64 * 4;
      const char* word = block + (at ^ (at >> 7 & 7) << 4);
      if constexpr (kProducts == 2) {
        const Vector four = load16(word);
#pragma unroll
        for (int i = 0; i < 4; ++i) w[i / 2][high * 2 + i % 2] = four.v[i];
      } else {
        const uint2 two = *reinterpret_cast<const uint2*>(word);
        w[0][high * 2] = two.x;
        w[0][high * 2 + 1] = two.y;
      }
    }
  }

  __device__ void multiply(const char* stage, uint32_t (&w)[2][kProducts][4],
                           int32_t (&sums)[kProducts][kEights][4]) const {
    const uint64_t rows = wgmma_operand(stage);
#pragma unroll
    for (int step = 0; step < Shape::kDepth / 32; ++step) {
      wait_products<1>();  // those before the last, which read the registers that are loaded now
      load_weight(stage + Layout::kRowsBytes, step, w[step % 2]);
      tie(w[step % 2]);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < kProducts; ++i)
        wgmma_s8(sums[i], w[step % 2][i], rows + static_cast<uint64_t>(step) * kWgmmaStep);
      commit_products();
    }
  }

  // Sum [i][j][e] is of row first_row() + 8 j + e % 2 and of channel 2 i + e / 2 of the lane's run.
  __device__ int first_row() const { return m_ + lane_of_warp() % 4 * 2; }
  __device__ int first_channel() const { return n_ + warp_column_ + lane_of_warp() / 4 * kRun; }

  __device__ void scale(const int32_t (&sums)[kProducts][kEights][4], float (&c)[kProducts][kEights][4]) const {
    const int left = p_.rows - first_row();
    const float* of_rows = p_.scales + first_row();
    float of_channel[kRun];
#pragma unroll
    for (int i = 0; i < kRun; ++i)  // a channel beyond N within its block has the scale 0
      of_channel[i] = first_channel() / 64 < p_.w.blocks() ? p_.w.scale(first_channel() + i) : 0.0f;
    // By parts, which those beyond M skip: all at once would want more registers than there are.
#pragma unroll
    for (int part = 0; part < kEights; part += 4) {
      if (m_ + part * 8 < p_.rows) {
#pragma unroll
        for (int j = part; j < part + 4; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float of_row = j * 8 + e < left ? of_rows[j * 8 + e] : 0.0f;
#pragma unroll
            for (int i = 0; i < kRun; ++i)
              c[i / 2][j][i % 2 * 2 + e] = static_cast<float>(sums[i / 2][j][i % 2 * 2 + e]) * (of_row * of_channel[i]);
          }
      } else {
#pragma unroll
        for (int i = 0; i < kProducts; ++i)
#pragma unroll
          for (int j = part; j < part + 4; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) c[i][j][e] = 0;
      }
    }
  }

  // A step of the branch, of which so many ranks are left: a half that has none is left out.
  __device__ void add_branch(const char* stage, int ranks, float (&c)[kProducts][kEights][4]) const {
#pragma unroll 1
    for (int half = 0; half < 2 && half * (kStep<T> / 2) < ranks; ++half) {
      uint32_t a[kProducts][4], b[4];
#pragma unroll
      for (int i = 0; i < kProducts; ++i) load_a<TileB>(a[i], stage + Layout::kRowsBytes, warp_column_ + i * 16, half);
#pragma unroll
      for (int j = 0; j < kEights; j += 2) {
        load_b<TileT>(b, stage, j * 8, half);
#pragma unroll
        for (int i = 0; i < kProducts; ++i) {
          product<T>(c[i][j], a[i], b[0], b[1], p_.precise);
          product<T>(c[i][j + 1], a[i], b[2], b[3], p_.precise);
        }
      }
    }
  }

  // By way of shared memory, each warp its own part, since in registers a lane has 32 rows of a few channels, whose
  // code would be as long as they are many: in a loop it has rows of the same four channels. Rows are padded for lanes
  // that write or read together.
  __device__ void store(const float (&c)[kProducts][kEights][4]) const {
    constexpr int kStride = kWarpColumns + 4, kFours = kWarpColumns / 4;
    static_assert(Shape::kRows * kStride * 4 * (kThreads / 32) <= Layout::kTileBytes, "sums in the place of the tiles");
    __syncthreads();  // all are done with the tiles
    const int warp = static_cast<int>(threadIdx.x) / 32, g = lane_of_warp() / 4, t = lane_of_warp() % 4;
    float* sums = reinterpret_cast<float*>(tiles_) + warp * Shape::kRows * kStride;
#pragma unroll
    for (int j = 0; j < kEights; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float* to = sums + (j * 8 + t * 2 + e) * kStride + g * kRun;
        if constexpr (kProducts == 2)
          *reinterpret_cast<float4*>(to) = make_float4(c[0][j][e], c[0][j][2 + e], c[1][j][e], c[1][j][2 + e]);
        else
          *reinterpret_cast<float2*>(to) = make_float2(c[0][j][e], c[0][j][2 + e]);
      }
    __syncwarp();
    const Epilogue& end = p_.epilogue.e;
    const int of_warp = lane_of_warp() % kFours * 4, column = n_ + warp_column_ + of_warp;
    float biases[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) biases[e] = end.bias && column + e < p_.w.columns ? end.bias_at(column + e) : 0.0f;
    const int rows = p_.rows - m_ < Shape::kRows ? p_.rows - m_ : Shape::kRows;
#pragma unroll 1
    for (int row = lane_of_warp() / kFours; row < rows; row += 32 / kFours) {
      const Vector of_row = load16(sums + row * kStride + of_warp);
      float four[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) four[e] = __uint_as_float(of_row.v[e]) + biases[e];
      if (end.activation != Activation::kNone)
#pragma unroll
        for (int e = 0; e < 4; ++e) four[e] = activate(four[e], end.activation);
      p_.epilogue.template store_run<T>(four, m_ + row, column, p_.epilogue.eights);
    }
  }

  const Int8WgmmaParams& all_;
  const Int8GemmParams& p_;
  Shared shared_;
  char* tiles_;
  uint64_t* landed_;  // of each place: q and w are there
  int m_, n_, warp_column_ = 0, base_steps_ = 0, slot_ = 0, chunk_ = 0;
};

template <class T, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kTogether)
    int8_wgmma(const __grid_constant__ Int8WgmmaParams p) {
  if constexpr (kWgmma) {
    int m = 0, n = 0;
    tile_of_block<Shape, kClusterBlocks>(static_cast<int>(blockIdx.x), p.gemm.rows, p.gemm.w.columns, &m, &n);
    Int8WgmmaTile<T, Shape>(p, m, n).run();
  } else {
#if !defined(LORA_KERNELS_EMULATION)
    __trap();  // a plan takes it only where the library has it for sm_90a (CudaDevice::wgmma)
#endif
  }
}

}  // namespace lora_kernels::cuda
