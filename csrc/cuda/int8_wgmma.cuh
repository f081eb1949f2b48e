// The tiled product of int8_lora_linear on the tensor cores of sm_90a, for many rows: what int8_gemm.cuh does by
// mma.sync, of which Hopper does about 60 % as many as of wgmma. It makes y transposed (int8_transposed.cuh).
//
// Two warpgroups make 128 rows x 128 channels of y, 64 channels each, in steps of 128 k. Both operands come by TMA into
// the 128-byte swizzle: 16 KB of q, rows of 128 bytes, and 16 KB of w, the packed steps of 256 bytes of two blocks as
// rows of 128 bytes. Two blocks are a cluster and take tiles one below the other: one thread of each asks for its own q
// and for half of w, which comes to both. w does not wait for the kernel that makes q.
//
// Two blocks share a multiprocessor, in 128 registers a thread and three places for steps, so that one block's end runs
// beside the other's products. Between its own steps a block lets the products run dry: then the place of the step
// before is free, and two steps are on their way while one is multiplied. Where there are rows and columns enough for
// larger tiles, int8_persistent.cuh reads a fifth less of shared memory; this is for what divides better into these.
//
// The LoRA branch follows on the same sums, then fp32, by mma.sync: B by channels as the left operand, t by rows as the
// right one, r / 32 steps (r / 16 in fp32) fetched by cp.async into places of the ring while the last integers are
// multiplied; of the last step only the half that has ranks. y leaves through shared memory, in one loop with bias,
// activation and residual.
//
// Integer operations 2 M N K, exact. A step of 2 * 128 * 128 * 128 of them is multiplied in 512 clocks at the peak;
// shared memory, at 128 bytes per clock, takes 640 for what comes and is read, which bounds it; L2 brings 24 KB to each
// block, for which it takes 702 as far as others have got (machine_hopper.h; without clusters 936). By its instructions
// the end takes 3,800 clocks, with GELU 5,800, in which the other block's steps are multiplied. That both blocks of a
// multiprocessor are out of step nothing but chance brings about.
//
// Where the driver knows no tensor maps int8_gemm.cuh takes its place. Not measured: no GPU has run this, and what the
// two blocks of a cluster wait for each other is in no prediction. Not tried: blocks of a multiprocessor that begin
// half a tile apart.
#pragma once

#include "cuda/int8_transposed.cuh"

namespace lora_kernels::cuda {

struct Int8WgmmaShape {
  static constexpr int kRows = 128, kColumns = 128, kThreads = 256, kStages = 3;
  static constexpr int kBoxRows = kRows, kBoxBlocks = kColumns / 64 / static_cast<int>(kClusterBlocks);
};

template <class T>
struct Int8WgmmaLayout {
  using Shape = Int8WgmmaShape;
  using TileT = Tile<T, Shape::kRows, kStep<T>>;
  using TileB = Tile<T, Shape::kColumns, kStep<T>>;
  using Adapters = TileAdapters<Shape::kRows, Shape::kThreads>;
  static constexpr int kRowsBytes = Shape::kRows * kInt8WgmmaDepth;
  static constexpr int kStageBytes = kRowsBytes + Shape::kColumns * kInt8WgmmaDepth;
  static_assert(TileT::kBytes <= kRowsBytes && kRowsBytes + TileB::kBytes <= kStageBytes,
                "steps of the branch in the same ring");
  static_assert(kRowsBytes % kWgmmaAlignment == 0 && kStageBytes % kWgmmaAlignment == 0, "tiles follow one another");
  static constexpr int kTileBytes = Shape::kStages * kStageBytes;
  static constexpr size_t kSharedBytes =
      static_cast<size_t>(kTileBytes) + (Shape::kStages * 8 + 15) / 16 * 16 + (Adapters::kWords * 4 + 15) / 16 * 16;
};

template <class T>
class Int8WgmmaTile {
  using Shape = Int8WgmmaShape;
  using Layout = Int8WgmmaLayout<T>;
  using TileT = typename Layout::TileT;
  using TileB = typename Layout::TileB;
  using Adapters = typename Layout::Adapters;
  static constexpr int kThreads = Shape::kThreads, kStages = Shape::kStages;
  // Products run dry between steps: the step before is then done when a place is filled.
  static constexpr int kAhead = kStages - 1;
  static constexpr int kEights = Shape::kRows / 8;
  static_assert(kInt8WgmmaDepth / 32 % 2 == 0, "registers in turns, from step to step");

 public:
  __device__ Int8WgmmaTile(const Int8WgmmaParams& p, int m, int n) : all_(p), p_(p.gemm), m_(m), n_(n) {
    tiles_ = shared_.template take<char>(Layout::kTileBytes);  // first: from a multiple of 1024 on
    landed_ = shared_.template take<uint64_t>(kStages);
    warp_channel_ = static_cast<int>(threadIdx.x) / 32 * kWarpChannels;
    base_steps_ = (p_.w.steps * 4 + kInt8WgmmaDepth - 1) / kInt8WgmmaDepth;
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

    int32_t sums[kEights][4] = {};
    uint32_t w[2][4];
    tie(sums);
    int k = 0;
    do {  // There is a step, or there were no map. (If there might be none, ptxas would make products one by one.)
      wait_for_phase(landed_ + k % kStages, k / kStages & 1);
      wait_products<0>();
      __syncthreads();  // all are done with step k - 1, whose place is filled next
      // w a step later than q. The other block asked for its half of step k, which has landed, when it was done with
      // step k - 2: the place that step k + 1 takes.
      static_assert(kAhead == 2 && kStages == 3, "as it says");
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
    float c[kEights][4];
    scale(sums, c);
    for (int i = 0; i < adapters.count(); ++i) {
      const int rank = p_.routing.rank(adapters.adapter(i));
      for (int chunk = 0; chunk < rank; chunk += kStep<T>, ++k) {
        wait_copies<kAhead - 1>();
        __syncthreads();  // step k has landed for all, and all are done with step k - 1
        fetch(k + kAhead, steps, adapters);
        add_branch<T, TileT, TileB>(c, place(k), place(k) + Layout::kRowsBytes, warp_channel_, rank - chunk,
                                    p_.precise);
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
    const int half = static_cast<int>(rank_in_cluster()) * Shape::kBoxBlocks;
    share_planes(place(k) + Layout::kRowsBytes + half * kInt8WgmmaBlockBytes, all_.w, n_ / 64 + half,
                 k * (kInt8WgmmaDepth / 4) * (kInt8StepBytes / 128), 0, landed_ + k % kStages);
  }
  __device__ void fetch_rows(int k) {
    load_planes(place(k), all_.q, 0, m_, k * kInt8WgmmaDepth, landed_ + k % kStages);
  }

  __device__ void fetch(int k, int steps, const Adapters& adapters) {
    if (k >= base_steps_) fetch_branch(k, steps, adapters);
    commit_copies();
  }

  // The next step of the branch: steps come in order, so what has been fetched says where to go on.
  __device__ void fetch_branch(int k, int steps, const Adapters& adapters) {
    if (k >= steps) return;
    const int adapter = adapters.adapter(slot_), rank = p_.routing.rank(adapter);
    Matrix t = p_.t;
    t.columns = rank;
    load_tile<TileT, kThreads>(place(k), t, m_, chunk_, [&](int row) { return adapters.uses(row, adapter); });
    load_factor<T, TileB, kThreads>(place(k) + Layout::kRowsBytes, p_.up, p_.w.columns, n_,
                                    p_.routing.begin(adapter) + chunk_, rank - chunk_, static_cast<int>(threadIdx.x));
    chunk_ += kStep<T>;
    if (chunk_ >= rank) {
      chunk_ = 0;
      ++slot_;
    }
  }

  __device__ void multiply(const char* stage, uint32_t (&w)[2][4], int32_t (&sums)[kEights][4]) const {
    const uint64_t rows = wgmma_operand(stage);
    const char* words = stage + Layout::kRowsBytes + weight_offset(warp_channel_ + lane_of_warp() / 4 * kRunChannels);
#pragma unroll
    for (int step = 0; step < kInt8WgmmaDepth / 32; ++step) {
      wait_products<1>();  // those before the last, which read the registers that are loaded now
      load_weight(words, step, w[step % 2]);
      tie(w[step % 2]);
      wgmma_fence();
      wgmma_s8<Shape::kRows>(sums, w[step % 2], rows + static_cast<uint64_t>(step) * kWgmmaStep);
      commit_products();
    }
  }

  // Sum [j][e] is of row first_row() + 8 j + e % 2 and of channel e / 2 of the lane's two.
  __device__ int first_row() const { return m_ + lane_of_warp() % 4 * 2; }
  __device__ int first_channel() const { return n_ + warp_channel_ + lane_of_warp() / 4 * kRunChannels; }

  __device__ void scale(const int32_t (&sums)[kEights][4], float (&c)[kEights][4]) const {
    const int left = p_.rows - first_row();
    const float* of_rows = p_.scales + first_row();
    float of_channel[kRunChannels];
#pragma unroll
    for (int i = 0; i < kRunChannels; ++i)  // a channel beyond N within its block has the scale 0
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
            for (int i = 0; i < kRunChannels; ++i)
              c[j][i * 2 + e] = static_cast<float>(sums[j][i * 2 + e]) * (of_row * of_channel[i]);
          }
      } else {
#pragma unroll
        for (int j = part; j < part + 4; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) c[j][e] = 0;
      }
    }
  }

  // By way of shared memory, each warp its own part, since in registers a lane has 32 rows of a few channels, whose
  // code would be as long as they are many: in a loop it has rows of the same four channels. Rows are padded for lanes
  // that write or read together.
  __device__ void store(const float (&c)[kEights][4]) const {
    constexpr int kStride = kWarpChannels + 4, kFours = kWarpChannels / 4;
    static_assert(Shape::kRows * kStride * 4 * (kThreads / 32) <= Layout::kTileBytes, "sums in the place of the tiles");
    __syncthreads();  // all are done with the tiles
    const int warp = static_cast<int>(threadIdx.x) / 32, g = lane_of_warp() / 4, t = lane_of_warp() % 4;
    float* sums = reinterpret_cast<float*>(tiles_) + warp * Shape::kRows * kStride;
#pragma unroll
    for (int j = 0; j < kEights; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        *reinterpret_cast<float2*>(sums + (j * 8 + t * 2 + e) * kStride + g * kRunChannels) =
            make_float2(c[j][e], c[j][2 + e]);
    __syncwarp();
    const Epilogue& end = p_.epilogue.e;
    const int of_warp = lane_of_warp() % kFours * 4, column = n_ + warp_channel_ + of_warp;
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
        for (int e = 0; e < 4; ++e) four[e] = activate<T>(four[e], end.activation);
      p_.epilogue.template store_run<T>(four, m_ + row, column, p_.epilogue.eights);
    }
  }

  const Int8WgmmaParams& all_;
  const Int8GemmParams& p_;
  Shared shared_;
  char* tiles_;
  uint64_t* landed_;  // of each place: q and w are there
  int m_, n_, warp_channel_ = 0, base_steps_ = 0, slot_ = 0, chunk_ = 0;
};

template <class T>
__global__ void __launch_bounds__(Int8WgmmaShape::kThreads, 2) int8_wgmma(const __grid_constant__ Int8WgmmaParams p) {
  if constexpr (kWgmma) {
    int m = 0, n = 0;
    tile_of_block<Int8WgmmaShape, kClusterBlocks>(static_cast<int>(blockIdx.x), p.gemm.rows, p.gemm.w.columns, &m, &n);
    Int8WgmmaTile<T>(p, m, n).run();
  } else {
#if !defined(LORA_KERNELS_EMULATION)
    __trap();  // a plan takes it only where the library has it for sm_90a (CudaDevice::wgmma)
#endif
  }
}

}  // namespace lora_kernels::cuda
