// The large product of int8_lora_linear on sm_90a: what int8_wgmma.cuh does, by blocks that stay and take tile after
// tile, each warp with one task.
//
// A tile is 256 rows x 128 channels of y, in steps of 128 k. Warps 0 to 7, two warpgroups of 64 channels each, multiply
// and end. Warp 8 asks TMA for boxes of q (32 KB) and w (16 KB) into a ring of four places. Warps 9 to 11 bring what
// the end reads: scales, bias, and of the LoRA branch 32 ranks at a time of t and B, which is all of most adapters.
// They tell each other by barriers in shared memory, and no barrier holds the whole block: boxes of the next tile come
// while one ends, and a warpgroup multiplies while the other ends, so far as the ring lets it get ahead. At the first
// tile the second warpgroup waits for more than it needs, so that they do not end at the same time.
//
// Two blocks are a cluster and take tiles one beside the other: both ask for half of q, which comes to both, and for
// their own w. A place is filled anew when all warps of both blocks have said that they are done with it. Of a step
// that is being multiplied they say so in the midst of the next, when its last product is over; products are in flight
// all the time.
//
// Integer operations 2 M N K, exact. A step of 2 * 256 * 128 * 128 is multiplied in 1,024 clocks at the peak; shared
// memory, at 128 bytes per clock, takes as many (48 KB come, both warpgroups read 32 KB of q, and lanes w once: a tile
// of 128 rows reads q twice as often for its channels); L2 brings 32 KB to each block, for which it takes 936. The end,
// of about eight instructions a value (kPersistentEnd of the plan), is what the products do not hide
// (machine_hopper.h). What it reads comes in three readings of L2 and one for each 24 channels of B and sixteen ranks.
//
// Sums leave from registers, a sector of 32 bytes for each row of a warp. There is no activation, fp32 or odd N here:
// plans take it for what it makes. Not measured: no GPU has run this, and what blocks and warps wait for each other is
// in no prediction.
#pragma once

#include "cuda/int8_shapes.h"
#include "cuda/int8_transposed.cuh"

namespace lora_kernels::cuda {

struct Int8PersistentShape {
  static constexpr int kRows = kInt8PersistentRows, kColumns = 128, kStages = 4;
  static constexpr int kWarps = 8;          // that multiply
  static constexpr int kThreads = 3 * 128;  // the third warpgroup brings, and leaves registers to the others
  static constexpr int kMakerRegisters = 216, kBringerRegisters = 72;
  static constexpr int kBringers = 3;  // warps behind the one that asks for boxes
  static constexpr int kApart = 2;     // steps that the second warpgroup begins behind the first
  static constexpr int kBoxRows = kRows / static_cast<int>(kClusterBlocks), kBoxBlocks = kColumns / 64;
};
// What a cluster makes at a time.
struct Int8PersistentPair {
  static constexpr int kRows = Int8PersistentShape::kRows;
  static constexpr int kColumns = Int8PersistentShape::kColumns * static_cast<int>(kClusterBlocks);
};

template <class T>
struct Int8PersistentLayout {
  using Shape = Int8PersistentShape;
  using TileT = Tile<T, Shape::kRows, kStep<T>>;
  using TileB = Tile<T, Shape::kColumns, kStep<T>>;
  static constexpr int kRowsBytes = Shape::kRows * kInt8WgmmaDepth;
  static constexpr int kStageBytes = kRowsBytes + Shape::kColumns * kInt8WgmmaDepth;
  static_assert(kRowsBytes % kWgmmaAlignment == 0 && kStageBytes % kWgmmaAlignment == 0, "tiles follow one another");
  static constexpr int kRingBytes = Shape::kStages * kStageBytes;
  static constexpr size_t kSharedBytes = static_cast<size_t>(kRingBytes) + TileT::kBytes + TileB::kBytes +
                                         (Shape::kRows + 2 * Shape::kColumns) * 4 + (2 * Shape::kStages + 2) * 8 + 16;
  static_assert(Shape::kStages > Shape::kApart && kSharedBytes <= kInt8PersistentBytes);
};

template <class T>
class Int8Persistent {
  using Shape = Int8PersistentShape;
  using Layout = Int8PersistentLayout<T>;
  using TileT = typename Layout::TileT;
  using TileB = typename Layout::TileB;
  static constexpr int kStages = Shape::kStages, kEights = Shape::kRows / 8;
  static_assert(kInt8WgmmaDepth / 32 % 2 == 0, "registers in turns, from step to step");

 public:
  __device__ explicit Int8Persistent(const Int8WgmmaParams& p) : all_(p), p_(p.gemm) {
    ring_ = shared_.template take<char>(Layout::kRingBytes);  // first: from a multiple of 1024 on
    t_ = shared_.template take<char>(TileT::kBytes);
    b_ = shared_.template take<char>(TileB::kBytes);
    of_rows_ = shared_.template take<float>(Shape::kRows);
    of_channels_ = shared_.template take<float>(Shape::kColumns);
    biases_ = shared_.template take<float>(Shape::kColumns);
    landed_ = shared_.template take<uint64_t>(2 * kStages + 2);
    free_ = landed_ + kStages;
    brought_ = free_ + kStages;
    taken_ = brought_ + 1;
    said_ = shared_.template take<int>(2);
    steps_ = (p_.w.steps * 4 + kInt8WgmmaDepth - 1) / kInt8WgmmaDepth;
  }

  __device__ void run() {
    if (threadIdx.x == 0) {
      for (int i = 0; i < kStages; ++i) {
        init_arrivals(landed_ + i);
        init_arrivals(free_ + i, Shape::kWarps * kClusterBlocks);
      }
      init_arrivals(brought_, Shape::kBringers);
      init_arrivals(taken_, Shape::kWarps);
      fence_arrivals();
    }
    arrive_in_cluster();
    wait_for_cluster();  // the barriers of both are there
    const int warp = static_cast<int>(threadIdx.x) / 32;
    if (warp < Shape::kWarps) {
      take_registers<Shape::kMakerRegisters>();
      make_tiles();
    } else {
      leave_registers<Shape::kBringerRegisters>();
      if (warp == Shape::kWarps && lane_of_warp() == 0)
        bring_boxes();
      else
        wait_for_kernel_before();  // which makes scales and t
      if (warp > Shape::kWarps) bring_ends(warp - Shape::kWarps - 1);
    }
  }

 private:
  // The tiles of this block, one after another, and the steps of each.
  struct Walk {
    int turn = 0, k = 0, m = 0, n = 0;
    bool there = false;
  };
  __device__ void find(Walk* w) const {
    const int clusters = static_cast<int>(gridDim.x / kClusterBlocks);
    const int pair = static_cast<int>(blockIdx.x / kClusterBlocks) + w->turn * clusters;
    using Pair = Int8PersistentPair;
    const int rows = (p_.rows + Pair::kRows - 1) / Pair::kRows;
    w->there = pair < rows * ((p_.w.columns + Pair::kColumns - 1) / Pair::kColumns);
    if (!w->there) return;
    tile_of_block<Pair>(pair, p_.rows, p_.w.columns, &w->m, &w->n);
    w->n += static_cast<int>(rank_in_cluster()) * Shape::kColumns;
  }
  __device__ Walk first() const {
    Walk w;
    find(&w);
    return w;
  }
  __device__ void next_tile(Walk* w) const {
    ++w->turn;
    w->k = 0;
    find(w);
  }
  __device__ void next_step(Walk* w) const {
    if (++w->k == steps_) next_tile(w);
  }

  __device__ char* place(int step) const { return ring_ + step % kStages * Layout::kStageBytes; }

  // ---- The thread that asks for boxes

  __device__ void bring_boxes() {
    Walk weight = first(), rows = weight;
    for (int i = 0; i < kStages && weight.there; ++i, next_step(&weight)) fetch_weight(i, weight);
    wait_for_kernel_before();  // which makes q
    int step = 0;
    for (; rows.there; ++step, next_step(&rows)) {
      if (step >= kStages) {
        wait_until_free(step);
        fetch_weight(step, rows);
      }
      share_planes(place(step) + rank_in_cluster() * (Layout::kRowsBytes / kClusterBlocks), all_.q, 0,
                   rows.m + static_cast<int>(rank_in_cluster()) * Shape::kBoxRows, rows.k * kInt8WgmmaDepth,
                   landed_ + step % kStages);
    }
    // The other block arrives here until both are done with the last places.
    for (int last = step; last < step + kStages; ++last)
      if (last >= kStages) wait_until_free(last);
  }

  // All that come to a place are expected with w.
  __device__ void fetch_weight(int step, const Walk& w) {
    expect_bytes(landed_ + step % kStages, Layout::kStageBytes);
    load_planes(place(step) + Layout::kRowsBytes, all_.w, w.n / 64,
                w.k * (kInt8WgmmaDepth / 4) * (kInt8StepBytes / 128), 0, landed_ + step % kStages);
  }

  // Both blocks are done with the step that had the place of this one before it.
  __device__ void wait_until_free(int step) { wait_for_phase(free_ + step % kStages, (step / kStages - 1) & 1); }

  // ---- The warps that bring what ends read

  // Each of them goes through the packages alone and brings its part of each.
  __device__ void bring_ends(int part) {
    int package = 0;
    for (Walk tile = first(); tile.there; next_tile(&tile)) {
      int adapters[kEights / 4];  // of rows lane + 32 i; -1: none, or one that has been
#pragma unroll
      for (int i = 0; i < kEights / 4; ++i) {
        const int row = tile.m + lane_of_warp() + i * 32, adapter = row < p_.rows ? p_.routing.adapter_of(row) : -1;
        adapters[i] = adapter >= 0 && p_.routing.rank(adapter) > 0 ? adapter : -1;
      }
      int adapter = next_adapter(adapters), chunk = 0;
      bool more = false;
      do {
        wait_until_taken(package++);
        if (!more) bring_scales(tile, part);
        const int left = adapter < 0 ? 0 : p_.routing.rank(adapter) - chunk;
        if (left > 0) bring_factors(tile, adapters, adapter, chunk, left, part);
        chunk += kStep<T>;
        if (left <= kStep<T>) {
#pragma unroll
          for (int i = 0; i < kEights / 4; ++i) adapters[i] = adapters[i] == adapter ? -1 : adapters[i];
          adapter = next_adapter(adapters);
          chunk = 0;
        }
        more = adapter >= 0;
        if (part == 0 && lane_of_warp() == 0) {
          said_[0] = left;
          said_[1] = more;
        }
        commit_copies();
        wait_copies<0>();
        __syncwarp();
        if (lane_of_warp() == 0) arrive(brought_, rank_in_cluster());
      } while (more);
    }
  }

  __device__ void wait_until_taken(int package) {
    if (package > 0) wait_for_phase(taken_, (package - 1) & 1);
  }

  // In order of their first row.
  __device__ static int next_adapter(const int (&adapters)[kEights / 4]) {
    int found = -1;
#pragma unroll
    for (int i = kEights / 4 - 1; i >= 0; --i) {
      const uint32_t vote = __ballot_sync(~0u, adapters[i] >= 0);
      const int one = __shfl_sync(~0u, adapters[i], vote ? __ffs(static_cast<int>(vote)) - 1 : 0);
      if (vote) found = one;
    }
    return found;
  }

  __device__ void bring_scales(const Walk& tile, int part) {
    constexpr int kThreads = Shape::kBringers * 32;
    const int thread = part * 32 + lane_of_warp();
#pragma unroll
    for (int turn = 0; turn < (Shape::kRows + kThreads - 1) / kThreads; ++turn) {
      const int i = thread + turn * kThreads;
      if (i < Shape::kRows) of_rows_[i] = tile.m + i < p_.rows ? p_.scales[tile.m + i] : 0.0f;
    }
    const Epilogue& end = p_.epilogue.e;
#pragma unroll 1
    for (int i = thread; i < Shape::kColumns; i += kThreads) {
      const int channel = tile.n + i;  // one beyond N within its block has the scale 0
      of_channels_[i] = channel / 64 < p_.w.blocks() ? p_.w.scale(channel) : 0.0f;
      biases_[i] = end.bias && channel < p_.w.columns ? end.bias_at(channel) : 0.0f;
    }
  }

  // Of an adapter, and of its rows, whose ranks from `chunk` on are so many.
  __device__ void bring_factors(const Walk& tile, const int (&adapters)[kEights / 4], int adapter, int chunk, int ranks,
                                int part) {
    const T* t = static_cast<const T*>(p_.t.data);
    const int lane = lane_of_warp();
#pragma unroll
    for (int i = 0; i < kEights / 4; ++i) {
      const bool uses = adapters[i] == adapter;
#pragma unroll 1
      for (int j = part; j < 4; j += Shape::kBringers) {  // eight rows of four chunks of sixteen bytes
        const int of_32 = j * 8 + lane / 4, row = i * 32 + of_32, chunk_of_row = lane % 4;
        const int r = chunk_of_row * kPerChunk<T>, left = __shfl_sync(~0u, uses, of_32) ? ranks - r : 0;
        const int count = left < 0 ? 0 : left > kPerChunk<T> ? kPerChunk<T> : left;
        copy16_async(t_ + TileT::offset(row, chunk_of_row), t + (count ? (tile.m + row) * p_.t.stride + chunk + r : 0),
                     count * static_cast<int>(sizeof(T)));
      }
    }
    load_factor<T, TileB, Shape::kBringers * 32>(b_, p_.up, p_.w.columns, tile.n, p_.routing.begin(adapter) + chunk,
                                                 ranks, part * 32 + lane);
  }

  // ---- The warps that multiply

  __device__ void make_tiles() {
    wait_for_kernel_before();  // no y is written before, and all that is read comes from those that have waited
    int step = 0, package = 0;
    if (static_cast<int>(threadIdx.x) >= Shape::kWarps * 16 && steps_ > Shape::kApart)
      wait_for_phase(landed_ + Shape::kApart, 0);
    for (Walk tile = first(); tile.there; next_tile(&tile)) {
      int32_t sums[kEights][4] = {};
      uint32_t w[2][4];
      tie(sums);
      int k = 0;
      do {  // There is a step, or there were no map.
        wait_for_phase(landed_ + step % kStages, step / kStages & 1);
        multiply(step, k > 0, w, sums);
        ++step;
      } while (++k < steps_);
      wait_products<0>();
      release(step - 1, true);
      tie(sums);
      end(tile, sums, &package);
    }
  }

  __device__ void multiply(int step, bool one_before, uint32_t (&w)[2][4], int32_t (&sums)[kEights][4]) const {
    const char* stage = place(step);
    const uint64_t rows = wgmma_operand(stage);
    const char* words = stage + Layout::kRowsBytes + weight_offset(channel_of_lane());
#pragma unroll
    for (int part = 0; part < kInt8WgmmaDepth / 32; ++part) {
      wait_products<1>();  // those before the last, which read the registers that are loaded now
      if (part == 1) release(step - 1, one_before);
      load_weight(words, part, w[part % 2]);
      tie(w[part % 2]);
      wgmma_fence();
      wgmma_s8<Shape::kRows>(sums, w[part % 2], rows + static_cast<uint64_t>(part) * kWgmmaStep);
      commit_products();
    }
  }

  // To both blocks: this warp is done with the place of a step.
  __device__ void release(int step, bool there) const { arrive_at_all(free_ + step % kStages, there); }

  __device__ static int channel_of_lane() { return warp_channel() + lane_of_warp() / 4 * kRunChannels; }
  __device__ static int warp_channel() { return static_cast<int>(threadIdx.x) / 32 * kWarpChannels; }

  // Sum [j][e] is of row 8 j + 2 t + e % 2 and of channel e / 2 of the lane's two.
  __device__ void end(const Walk& tile, const int32_t (&sums)[kEights][4], int* package) const {
    const int lane = lane_of_warp();
    wait_for_phase(brought_, *package & 1);
    float c[kEights][4];
    const float2 of_channels = *reinterpret_cast<const float2*>(of_channels_ + channel_of_lane());
#pragma unroll
    for (int j = 0; j < kEights; ++j) {
      const float2 of_rows = *reinterpret_cast<const float2*>(of_rows_ + j * 8 + lane % 4 * 2);
      c[j][0] = static_cast<float>(sums[j][0]) * (of_rows.x * of_channels.x);
      c[j][1] = static_cast<float>(sums[j][1]) * (of_rows.y * of_channels.x);
      c[j][2] = static_cast<float>(sums[j][2]) * (of_rows.x * of_channels.y);
      c[j][3] = static_cast<float>(sums[j][3]) * (of_rows.y * of_channels.y);
    }
    float2 biases;
    for (bool more = true; more;) {
      const int ranks = said_[0];
      more = said_[1];
      add_branch<T, TileT, TileB>(c, t_, b_, warp_channel(), ranks, p_.precise);
      biases = *reinterpret_cast<const float2*>(biases_ + channel_of_lane());
      __syncwarp();
      if (lane == 0) arrive(taken_, rank_in_cluster());
      ++*package;
      if (more) wait_for_phase(brought_, *package & 1);
    }
    const bool whole = tile.m + Shape::kRows <= p_.rows, residual = p_.epilogue.e.residual;
    if (residual)
      whole ? store<true, true>(tile, c, biases) : store<true, false>(tile, c, biases);
    else
      whole ? store<false, true>(tile, c, biases) : store<false, false>(tile, c, biases);
    __syncwarp();  // products want all lanes of a warp, of which those beyond N have left early
  }

  // Lanes have two neighbouring channels, eight of them a row's sector of 32 bytes. kWhole: all rows are there; so many
  // comparisons would want more registers than there are.
  template <bool kResidual, bool kWhole>
  __device__ void store(const Walk& tile, const float (&c)[kEights][4], const float2& biases) const {
    const Epilogue& end = p_.epilogue.e;
    const int column = tile.n + channel_of_lane(), row = tile.m + lane_of_warp() % 4 * 2;
    if (column >= end.columns) return;
    const int left = p_.rows - row;
    const int64_t at = int64_t{row} * end.columns + column, stride = end.columns;
    T* y = static_cast<T*>(end.y) + at;
    const T* residual = kResidual ? static_cast<const T*>(end.residual) + at : nullptr;
    // Loads of a residual are asked for before the stores of the eights before them, since y may be its place.
    constexpr int kAtOnce = kWhole ? 4 : 1;
    uint32_t added[2][kAtOnce][2];
    const auto load = [&](int part) {
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (kWhole || (part + j) * 8 + e < left)
            added[part / kAtOnce % 2][j][e] =
                *reinterpret_cast<const uint32_t*>(residual + ((part + j) * 8 + e) * stride);
    };
    if constexpr (kResidual) load(0);
#pragma unroll
    for (int part = 0; part < kEights; part += kAtOnce) {
      if constexpr (kResidual)
        if (part + kAtOnce < kEights) load(part + kAtOnce);
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j, y += 8 * stride)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float first = c[part + j][e] + biases.x, second = c[part + j][2 + e] + biases.y;
          if (!kWhole && (part + j) * 8 + e >= left) continue;
          if constexpr (kResidual) {
            const uint32_t two = added[part / kAtOnce % 2][j][e];
            first += to_float(from_bits<T>(two & 0xFFFF));
            second += to_float(from_bits<T>(two >> 16));
          }
          *reinterpret_cast<uint32_t*>(y + e * stride) =
              bits_of<T>(from_float<T>(first)) | bits_of<T>(from_float<T>(second)) << 16;
        }
    }
  }

  const Int8WgmmaParams& all_;
  const Int8GemmParams& p_;
  Shared shared_;
  char *ring_, *t_, *b_;
  float *of_rows_, *of_channels_, *biases_;
  uint64_t* landed_;            // of each place: q and w are there
  uint64_t* free_;              // and: all warps of both blocks are done with what was there before
  uint64_t *brought_, *taken_;  // what an end reads is there; all warps have read it
  int* said_;                   // ranks of this step of the branch, and whether there is another
  int steps_;
};

template <class T>
__global__ void __launch_bounds__(Int8PersistentShape::kThreads, 1)
    int8_persistent(const __grid_constant__ Int8WgmmaParams p) {
  if constexpr (kWgmma) {
    Int8Persistent<T>(p).run();
  } else {
#if !defined(LORA_KERNELS_EMULATION)
    __trap();  // a plan takes it only where the library has it for sm_90a (CudaDevice::wgmma)
#endif
  }
}

}  // namespace lora_kernels::cuda
