// The large product of int8_lora_linear on sm_90a: what int8_wgmma.cuh does, by blocks that stay and take tile after
// tile, each warp with one task.
//
// A tile is 256 or 320 rows x 128 channels of y, in steps of 128 k. Warps 0 to 7, two warpgroups of 64 channels each,
// multiply and end. Warp 8 asks TMA for boxes of q (32 or 40 KB) and w (16 KB) into a ring of four places, or of three.
// Warps 9 to 11 bring what the end reads: scales, bias, and of the LoRA branch 32 ranks at a time of t and B, which is
// all of most adapters. They tell each other by barriers in shared memory, and no barrier holds the whole block: boxes
// of the next tile come while one ends, and a warpgroup multiplies while the other ends, so far as the ring lets it get
// ahead. At the first tile the second warpgroup waits for more than it needs, so that they do not end at the same time.
//
// Two blocks are a cluster and take tiles one beside the other: both ask for half of q, which comes to both, and for
// their own w. A place is filled anew when all warps of both blocks have said that they are done with it. Of a step
// that is being multiplied they say so in the midst of the next, when its last product is over; products are in flight
// all the time.
//
// Integer operations 2 M N K, exact. Of 256 rows a step is multiplied in 1,024 clocks at the peak; shared memory, at
// 128 bytes per clock, takes as many (48 KB come, both warpgroups read 32 KB of q, and lanes w once: a tile of 128 rows
// reads q twice as often for its channels); L2 brings 32 KB to each block, for which it takes 936. Of 320 rows these
// are 1,280, 1,216 and 1,053: there is less room for a warpgroup to get ahead, and what counts is which of them divides
// better among the multiprocessors. The end, of about eight instructions a value (kPersistentEnd of the plan) and those
// of an activation, is what the products do not hide (machine_hopper.h). What it reads comes in three readings of L2
// and one for each 24 channels of B and sixteen ranks.
//
// Of 320 rows a thread has 160 sums and 216 registers. So the end goes through them by parts, with a branch between
// (kPart), and asks anew for what could be kept from tile to tile.
//
// Sums leave from registers, a sector of 32 bytes for each row of a warp. There is no fp32 or odd N here: plans take it
// for what it makes. Not measured: no GPU has run this, and what blocks and warps wait for each other is in no
// prediction.
#pragma once

#include "cuda/int8_persistent_bring.cuh"

namespace lora_kernels::cuda {

// The warps that multiply and end.
template <class T, class Block>
class Int8Makers {
  using Shape = typename Block::Shape;
  using Place = typename Block::Place;
  using TileT = typename Block::TileT;
  using TileB = typename Block::TileB;
  static constexpr int kEights = Shape::kRows / 8, kEightsOfProduct = Shape::kOfProduct / 8, kPart = 8;
  static_assert(kInt8WgmmaDepth / 32 % 2 == 0, "registers in turns, from step to step");
  static_assert(kEights % kPart == 0, "all parts are whole");
  using Sums = int32_t[Shape::kProducts][kEightsOfProduct][4];

 public:
  __device__ explicit Int8Makers(const Block& block) : block_(block) {}

  __device__ void make() {
    wait_for_kernel_before();  // no y is written before, and all that is read comes from those that have waited
    if (static_cast<int>(threadIdx.x) >= Shape::kWarps * 16 && block_.steps > Shape::kApart)
      wait_for_phase(block_.landed + Shape::kApart, 0);
    Place place;
    int packages = 0;
    for (bool more = true; more;) {
      const unsigned thread = thread_asked_anew();
      Sums sums = {};
      uint32_t w[2][4];
      tie(sums);
      int k = 0;
      do {
        wait_for_phase(block_.landed + place.index, place.round & 1);
        multiply(thread, place.index, k > 0, w, sums);
        place.next();
      } while (++k < block_.steps);
      wait_products<0>();
      release(before(place.index), true);
      tie(sums);
      more = end(sums, &packages);
    }
  }

 private:
  __device__ void multiply(unsigned thread, int place, bool one_before, uint32_t (&w)[2][4], Sums& sums) const {
    const char* stage = block_.place(place);
    const uint64_t rows = wgmma_operand(stage);
    const char* words = stage + Block::Stage::kRowsBytes + weight_offset(channel_of(thread), lane(thread));
#pragma unroll
    for (int part = 0; part < kInt8WgmmaDepth / 32; ++part) {
      wait_products<1>();  // those before the last, which read the registers that are loaded now
      if (part == 1) release(before(place), one_before);
      load_weight(words, part, w[part % 2]);
      tie(w[part % 2]);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < Shape::kProducts; ++i)
        wgmma_s8<Shape::kOfProduct>(
            sums[i], w[part % 2],
            rows + static_cast<uint64_t>(part) * kWgmmaStep + (i * Shape::kOfProduct * kInt8WgmmaDepth >> 4));
      commit_products();
    }
  }

  __device__ static int before(int place) { return place == 0 ? Shape::kStages - 1 : place - 1; }

  // To both blocks: this warp is done with a place.
  __device__ void release(int place, bool there) const { arrive_at_all(block_.free + place, there); }

  // Of a thread of the block, which each use asks for anew.
  __device__ static int lane(unsigned thread) { return static_cast<int>(thread % 32); }
  __device__ static int warp_channel(unsigned thread) { return static_cast<int>(thread / 32) * kWarpChannels; }
  __device__ static int channel_of(unsigned thread) { return warp_channel(thread) + lane(thread) / 4 * kRunChannels; }

  __device__ void convert(unsigned thread, int from, const Sums& sums, float (&c)[kEights][4]) const {
    const float2 of_channels = *reinterpret_cast<const float2*>(block_.of_channels + channel_of(thread));
#pragma unroll
    for (int j = from; j < from + kPart; ++j) {
      const float2 of_rows = *reinterpret_cast<const float2*>(block_.of_rows + j * 8 + lane(thread) % 4 * 2);
      const int32_t (&four)[4] = sums[j / kEightsOfProduct][j % kEightsOfProduct];
      c[j][0] = static_cast<float>(four[0]) * (of_rows.x * of_channels.x);
      c[j][1] = static_cast<float>(four[1]) * (of_rows.y * of_channels.x);
      c[j][2] = static_cast<float>(four[2]) * (of_rows.x * of_channels.y);
      c[j][3] = static_cast<float>(four[3]) * (of_rows.y * of_channels.y);
    }
  }

  // This warp has read a package.
  __device__ void give_back(int* packages) const {
    __syncwarp();
    if (lane_of_warp() == 0) arrive(block_.taken, rank_in_cluster());
    ++*packages;
  }

  // True: there is another tile. Sum [j][e] is of row 8 j + 2 t + e % 2 and of channel e / 2 of the lane's two.
  __device__ bool end(const Sums& sums, int* packages) const {
    const unsigned thread = thread_asked_anew();
    wait_for_phase(block_.brought, *packages & 1);
    typename Block::Package package = *block_.package;
    float c[kEights][4];
    // By parts, between branches: registers do not hold what is read for all of them.
#pragma unroll
    for (int from = 0; from < kEights; from += kPart) {
      convert(thread, from, sums, c);
      add_branch<T, TileT, TileB, kPart>(reinterpret_cast<float (&)[kPart][4]>(c[from]),
                                         block_.t + TileT::offset(from * 8, 0), block_.b, warp_channel(thread),
                                         package.ranks, block_.gemm.precise, lane(thread));
    }
    const float2 biases = *reinterpret_cast<const float2*>(block_.biases + channel_of(thread));
    give_back(packages);
    while (package.more) {
      wait_for_phase(block_.brought, *packages & 1);
      package = *block_.package;
      add_branch<T, TileT, TileB>(c, block_.t, block_.b, warp_channel(thread), package.ranks, block_.gemm.precise,
                                  lane(thread));
      give_back(packages);
    }
    finish(biases, c);
    const bool whole = package.m + Shape::kRows <= block_.gemm.rows;
    if (block_.gemm.epilogue.e.residual)
      whole ? store<true, true>(thread, package.m, package.n, c) : store<true, false>(thread, package.m, package.n, c);
    else
      whole ? store<false, true>(thread, package.m, package.n, c)
            : store<false, false>(thread, package.m, package.n, c);
    __syncwarp();  // products want all lanes of a warp, of which those beyond N have left early
    return !package.last;
  }

  // Bias and activation, by parts as well.
  __device__ void finish(const float2& biases, float (&c)[kEights][4]) const {
    const Activation activation = block_.gemm.epilogue.e.activation;
#pragma unroll
    for (int from = 0; from < kEights; from += kPart) {
      const auto each = [&](Activation known) {
#pragma unroll
        for (int j = from; j < from + kPart; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) c[j][e] = activate<T>(c[j][e] + (e < 2 ? biases.x : biases.y), known);
      };
      if (activation == Activation::kGelu)
        each(Activation::kGelu);
      else if (activation == Activation::kSilu)
        each(Activation::kSilu);
      else
        each(Activation::kNone);
    }
  }

  // Lanes have two neighbouring channels, eight of them a row's sector of 32 bytes. kWhole: all rows are there; so many
  // comparisons would want more registers than there are.
  template <bool kResidual, bool kWhole>
  __device__ void store(unsigned thread, int m, int n, const float (&c)[kEights][4]) const {
    const Epilogue& end = block_.gemm.epilogue.e;
    const int column = n + channel_of(thread), row = m + lane(thread) % 4 * 2;
    if (column >= end.columns) return;
    const int left = block_.gemm.rows - row;
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
        for (int e = 0; e < 2; ++e) {
          uint32_t& two = added[part / kAtOnce % 2][j][e];
          two = 0;  // also where there is none, or a register would hold the one before
          if (kWhole || (part + j) * 8 + e < left)
            two = *reinterpret_cast<const uint32_t*>(residual + ((part + j) * 8 + e) * stride);
        }
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
          float first = c[part + j][e], second = c[part + j][2 + e];
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

  const Block& block_;
};

template <class T, int kRows>
__global__ void __launch_bounds__(Int8PersistentShape<kRows>::kThreads, 1)
    int8_persistent(const __grid_constant__ Int8WgmmaParams p) {
  if constexpr (kWgmma) {
    using Shape = Int8PersistentShape<kRows>;
    using Block = Int8PersistentBlock<T, Shape>;
    const Block block(p);
    block.begin();
    const int warp = static_cast<int>(threadIdx.x) / 32;
    if (warp < Shape::kWarps) {
      take_registers<Shape::kMakerRegisters>();
      Int8Makers<T, Block>(block).make();
    } else {
      leave_registers<Shape::kBringerRegisters>();
      if (warp == Shape::kWarps && lane_of_warp() == 0)
        Int8BoxBringer<Block>(block).bring();
      else
        wait_for_kernel_before();  // which makes scales and t
      if (warp > Shape::kWarps) Int8EndBringer<T, Block>(block).bring(warp - Shape::kWarps - 1);
    }
  } else {
#if !defined(LORA_KERNELS_EMULATION)
    __trap();  // a plan takes it only where the library has it for sm_90a (CudaDevice::wgmma)
#endif
  }
}

}  // namespace lora_kernels::cuda
