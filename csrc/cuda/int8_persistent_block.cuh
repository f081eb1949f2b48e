// One block of int8_persistent.cuh: its shape, what lies in its shared memory, and which tiles it makes.
#pragma once

#include "cuda/int8_shapes.h"
#include "cuda/int8_transposed.cuh"

namespace lora_kernels::cuda {

template <int kRows_>
struct Int8PersistentShape {
  static constexpr int kRows = kRows_, kColumns = 128, kStages = kRows <= 256 ? 4 : 3;
  static constexpr int kProducts = (kRows + 255) / 256, kOfProduct = kRows / kProducts;  // wgmma has 256 at most
  static constexpr int kWarps = 8;                                                       // that multiply
  static constexpr int kThreads = 3 * 128;  // the third warpgroup brings, and leaves registers to the others
  static constexpr int kMakerRegisters = 216, kBringerRegisters = 72;
  static constexpr int kBringers = 3;  // warps behind the one that asks for boxes
  static constexpr int kApart = 2;     // steps that the second warpgroup begins behind the first
  static constexpr int kBoxRows = kRows / static_cast<int>(kClusterBlocks), kBoxBlocks = kColumns / 64;
  static_assert(kStages > kApart && kRows % 32 == 0 && kProducts * kOfProduct == kRows);
};

// What a cluster makes at a time.
template <class Shape>
struct Int8PersistentPair {
  static constexpr int kRows = Shape::kRows, kColumns = Shape::kColumns * static_cast<int>(kClusterBlocks);
};

// A step in the ring: q, and w behind it.
template <class Shape>
struct Int8PersistentStage {
  static constexpr int kRowsBytes = Shape::kRows * kInt8WgmmaDepth;
  static constexpr int kBytes = kRowsBytes + Shape::kColumns * kInt8WgmmaDepth;
  static_assert(kRowsBytes / kClusterBlocks % kWgmmaAlignment == 0 && kBytes % kWgmmaAlignment == 0,
                "boxes and tiles follow one another");
};

// A place of the ring, and how often it was taken before.
template <class Shape>
struct Int8PersistentPlace {
  int index = 0, round = 0;
  __device__ void next() {
    if (++index == Shape::kStages) {
      index = 0;
      ++round;
    }
  }
};

template <class T, class Shape_>
struct Int8PersistentBlock {
  using Shape = Shape_;
  using Stage = Int8PersistentStage<Shape>;
  using Place = Int8PersistentPlace<Shape>;
  using TileT = Tile<T, Shape::kRows, kStep<T>>;
  using TileB = Tile<T, Shape::kColumns, kStep<T>>;
  static constexpr int kRingBytes = Shape::kStages * Stage::kBytes;
  static constexpr size_t kSharedBytes = static_cast<size_t>(kRingBytes) + TileT::kBytes + TileB::kBytes +
                                         (Shape::kRows + 2 * Shape::kColumns) * 4 + (2 * Shape::kStages + 2) * 8 + 32;
  static_assert(kSharedBytes <= kInt8PersistentBytes);

  // What is brought for a step of a tile's branch: its ranks, whether there is another, and where the tile begins.
  struct Package {
    int ranks, more, m, n, last;
  };

  const Int8WgmmaParams& maps;
  const Int8GemmParams& gemm;
  int steps;  // of a tile; there is one, or there were no map
  char *ring, *t, *b;
  float *of_rows, *of_channels, *biases;
  uint64_t* landed;           // of each place: q and w are there
  uint64_t* free;             // and: all warps of both blocks are done with what was there before
  uint64_t *brought, *taken;  // what an end reads is there; all warps have read it
  Package* package;

  __device__ explicit Int8PersistentBlock(const Int8WgmmaParams& p) : maps(p), gemm(p.gemm) {
    Shared shared;
    ring = shared.template take<char>(kRingBytes);  // first: from a multiple of 1024 on
    t = shared.template take<char>(TileT::kBytes);
    b = shared.template take<char>(TileB::kBytes);
    of_rows = shared.template take<float>(Shape::kRows);
    of_channels = shared.template take<float>(Shape::kColumns);
    biases = shared.template take<float>(Shape::kColumns);
    landed = shared.template take<uint64_t>(2 * Shape::kStages + 2);
    free = landed + Shape::kStages;
    brought = free + Shape::kStages;
    taken = brought + 1;
    package = shared.template take<Package>(1);
    steps = (gemm.w.steps * 4 + kInt8WgmmaDepth - 1) / kInt8WgmmaDepth;
  }

  // By all threads: barriers, of both blocks.
  __device__ void begin() const {
    if (threadIdx.x == 0) {
      for (int i = 0; i < Shape::kStages; ++i) {
        init_arrivals(landed + i);
        init_arrivals(free + i, Shape::kWarps * kClusterBlocks);
      }
      init_arrivals(brought, Shape::kBringers);
      init_arrivals(taken, Shape::kWarps);
      fence_arrivals();
    }
    arrive_in_cluster();
    wait_for_cluster();
  }

  __device__ char* place(int index) const { return ring + index * Stage::kBytes; }

  // How many tiles this block makes, one after another, and where one of them begins.
  __device__ int tiles() const {
    using Pair = Int8PersistentPair<Shape>;
    const int pairs =
        ((gemm.rows + Pair::kRows - 1) / Pair::kRows) * ((gemm.w.columns + Pair::kColumns - 1) / Pair::kColumns);
    return (pairs - cluster() + clusters() - 1) / clusters();
  }
  __device__ void find(int tile, int* m, int* n) const {
    tile_of_block<Int8PersistentPair<Shape>>(cluster() + tile * clusters(), gemm.rows, gemm.w.columns, m, n);
    *n += static_cast<int>(rank_in_cluster()) * Shape::kColumns;
  }

 private:
  __device__ static int cluster() { return static_cast<int>(blockIdx.x / kClusterBlocks); }
  __device__ static int clusters() { return static_cast<int>(gridDim.x / kClusterBlocks); }
};

}  // namespace lora_kernels::cuda
