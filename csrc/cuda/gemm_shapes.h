// What the tiled products of gemm.cuh take, the shapes of their tiles, and how these lie in shared memory.
#pragma once

#include "cuda/epilogue.h"
#include "cuda/routing.h"
#include "cuda/tile.h"

namespace lora_kernels::cuda {

enum class Product { kForward, kInTile, kInputGradient, kMaskedGradient, kRowSums };

struct GemmParams {
  Matrix a, b;                           // as gemm.cuh says
  int rows = 0, columns = 0, depth = 0;  // of the result, and of the sums
  bool precise = false;
  Matrix t;        // [rows, max_rank] (kForward; u in gradients)
  Factor up;       // B (kForward, kInTile)
  Matrix up_rows;  // A by rank row (gradients)
  Matrix down;     // A (kInTile)
  Routing routing;
  Dropout dropout;  // of the branch of dx, or of b in kRowSums
  Epilogue epilogue;
  float* sums = nullptr;  // kRowSums: [splits][..., columns] fp32
  int splits = 1;         // of depth
  int64_t split_stride = 0;
};

// Steps of rows that kRowSums looks over at a time for rows of its adapter: one for each thread of the small shape.
constexpr int kSegment = 128;

constexpr int kInTileRank = 32;  // the most that kInTile keeps in registers beside the base's sums

struct LargeShape {
  static constexpr int kRows = 128, kColumns = 128, kWarpRows = 64, kWarpColumns = 32, kThreads = 256, kStages = 3;
};
struct SmallShape {
  static constexpr int kRows = 64, kColumns = 64, kWarpRows = 32, kWarpColumns = 32, kThreads = 128, kStages = 4;
};

template <class T, class Shape, Product kProduct>
struct GemmLayout {
  static constexpr bool kMasked = kProduct == Product::kMaskedGradient;
  static constexpr bool kGradient = kProduct == Product::kInputGradient || kMasked;
  static constexpr bool kAAcross = kProduct == Product::kRowSums;
  static constexpr bool kBAcross = kAAcross || kGradient;
  using A = std::conditional_t<kAAcross, Tile<T, kStep<T>, Shape::kRows>, Tile<T, Shape::kRows, kStep<T>>>;
  using B = std::conditional_t<kBAcross, Tile<T, kStep<T>, Shape::kColumns>, Tile<T, Shape::kColumns, kStep<T>>>;
  using Down = Tile<T, kInTileRank, kStep<T>>;
  using Adapters = TileAdapters<Shape::kRows, Shape::kThreads>;
  static constexpr bool kInTile = kProduct == Product::kInTile;
  static constexpr bool kRouted = kProduct == Product::kForward || kGradient;
  static constexpr int kTSteps = kInTile ? kInTileRank / kStep<T> : 0;  // of the t that a tile makes
  static constexpr int kStageBytes = A::kBytes + B::kBytes + (kInTile ? Down::kBytes : 0);
  static constexpr int kWords = kRouted ? Adapters::kWords : kAAcross ? kSegment / 32 : 0;
  static constexpr size_t kSharedBytes =
      static_cast<size_t>(Shape::kStages) * kStageBytes + kTSteps * A::kBytes + (kWords * 4 + 15) / 16 * 16;
};

// B's columns [n, n + BN) and rank rows [begin + chunk, ...) as a tile with depth along its rows.
template <class TileB, int kThreads>
__device__ inline void load_up(char* tile, const Factor& up, int n, int columns, int begin, int chunk, int rank) {
  using T = typename TileB::T;
  if (up.type == kDTypeOf<T> && up.stride_rank == 1) {  // PEFT's own layout
    const T* first = static_cast<const T*>(up.data) + begin;
    const bool aligned = reinterpret_cast<uintptr_t>(first) % 16 == 0 && up.stride_out * sizeof(T) % 16 == 0;
    load_tile<TileB, kThreads>(tile, {first, up.stride_out, columns, rank, aligned}, n, chunk);
    return;
  }
  for (int i = static_cast<int>(threadIdx.x); i < TileB::kRows * TileB::kChunks; i += kThreads) {
    const int column = i % TileB::kRows, part = i / TileB::kRows;  // neighbours read neighbours of a rank row
    const int r = chunk + part * kPerChunk<T>, count = of_chunk<T>(n + column < columns ? rank - r : 0);
    store16(tile + TileB::offset(column, part),
            gather16<T>(count, [&](int j) { return from_float<T>(up.at(begin + r + j, n + column)); }));
  }
}

}  // namespace lora_kernels::cuda
