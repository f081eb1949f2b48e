// The warps of int8_persistent.cuh that bring: one thread asks for boxes, three warps for what ends read.
#pragma once

#include "cuda/int8_persistent_block.cuh"

namespace lora_kernels::cuda {

// The thread that asks for boxes.
template <class Block>
class Int8BoxBringer {
  using Shape = typename Block::Shape;
  using Stage = typename Block::Stage;
  using Place = typename Block::Place;

 public:
  __device__ explicit Int8BoxBringer(const Block& block) : block_(block), tiles_(block.tiles()) {}

  __device__ void bring() {
    const int steps = tiles_ * block_.steps;
    Step ahead = first(), step = ahead;
    for (int i = 0; i < Shape::kStages && i < steps; ++i, next(&ahead)) fetch_weight(ahead);
    wait_for_kernel_before();  // which makes q
    for (int i = 0; i < steps; ++i, next(&step)) {
      if (step.place.round > 0) {
        wait_until_free(step.place);
        fetch_weight(step);
      }
      const int half = static_cast<int>(rank_in_cluster());
      share_planes(block_.place(step.place.index) + half * (Stage::kRowsBytes / static_cast<int>(kClusterBlocks)),
                   block_.maps.q, 0, step.m + half * Shape::kBoxRows, step.k * kInt8WgmmaDepth,
                   block_.landed + step.place.index);
    }
    // The other block arrives here until both are done with the last places.
    for (int i = 0; i < Shape::kStages; ++i, step.place.next())
      if (step.place.round > 0) wait_until_free(step.place);
  }

 private:
  struct Step {
    Place place;
    int tile = 0, k = 0, m = 0, n = 0;
  };
  __device__ Step first() const {
    Step step;
    block_.find(0, &step.m, &step.n);
    return step;
  }
  __device__ void next(Step* step) const {
    step->place.next();
    if (++step->k < block_.steps) return;
    step->k = 0;
    if (++step->tile < tiles_) block_.find(step->tile, &step->m, &step->n);
  }

  // All that come to a place are expected with w.
  __device__ void fetch_weight(const Step& step) const {
    uint64_t* landed = block_.landed + step.place.index;
    expect_bytes(landed, Stage::kBytes);
    load_planes(block_.place(step.place.index) + Stage::kRowsBytes, block_.maps.w, step.n / 64,
                step.k * (kInt8WgmmaDepth / 4) * (kInt8StepBytes / 128), 0, landed);
  }

  // Both blocks are done with what was there before.
  __device__ void wait_until_free(const Place& place) const {
    wait_for_phase(block_.free + place.index, (place.round - 1) & 1);
  }

  const Block& block_;
  const int tiles_;
};

// Warps that bring scales, bias, t and B, in packages.
template <class T, class Block>
class Int8EndBringer {
  using Shape = typename Block::Shape;
  using TileT = typename Block::TileT;
  using TileB = typename Block::TileB;
  static constexpr int kThirtyTwos = Shape::kRows / 32;

 public:
  __device__ explicit Int8EndBringer(const Block& block) : block_(block) {}

  // Each of them goes through the packages alone and brings its part of each.
  __device__ void bring(int part) {
    int packages = 0;
    const int tiles = block_.tiles();
    for (int tile = 0; tile < tiles; ++tile) {
      int m, n;
      block_.find(tile, &m, &n);
      int adapters[kThirtyTwos];  // of rows lane + 32 i; -1: none, or one that has been
#pragma unroll
      for (int i = 0; i < kThirtyTwos; ++i) {
        const int row = m + lane_of_warp() + i * 32,
                  adapter = row < block_.gemm.rows ? block_.gemm.routing.adapter_of(row) : -1;
        adapters[i] = adapter >= 0 && block_.gemm.routing.rank(adapter) > 0 ? adapter : -1;
      }
      int adapter = next_adapter(adapters), chunk = 0;
      bool more = false;
      do {
        wait_until_taken(packages++);
        if (!more) bring_scales(m, n, part);
        const int left = adapter < 0 ? 0 : block_.gemm.routing.rank(adapter) - chunk;
        if (left > 0) bring_factors(m, n, adapters, adapter, chunk, left, part);
        chunk += kStep<T>;
        if (left <= kStep<T>) {
#pragma unroll
          for (int i = 0; i < kThirtyTwos; ++i) adapters[i] = adapters[i] == adapter ? -1 : adapters[i];
          adapter = next_adapter(adapters);
          chunk = 0;
        }
        more = adapter >= 0;
        if (part == 0 && lane_of_warp() == 0) *block_.package = {left, more, m, n, tile + 1 == tiles};
        commit_copies();
        wait_copies<0>();
        __syncwarp();
        if (lane_of_warp() == 0) arrive(block_.brought, rank_in_cluster());
      } while (more);
    }
  }

 private:
  __device__ void wait_until_taken(int packages) const {
    if (packages > 0) wait_for_phase(block_.taken, (packages - 1) & 1);
  }

  // In order of their first row.
  __device__ static int next_adapter(const int (&adapters)[kThirtyTwos]) {
    int found = -1;
#pragma unroll
    for (int i = kThirtyTwos - 1; i >= 0; --i) {
      const uint32_t vote = __ballot_sync(~0u, adapters[i] >= 0);
      const int one = __shfl_sync(~0u, adapters[i], vote ? __ffs(static_cast<int>(vote)) - 1 : 0);
      if (vote) found = one;
    }
    return found;
  }

  __device__ void bring_scales(int m, int n, int part) const {
    constexpr int kThreads = Shape::kBringers * 32;
    const int thread = part * 32 + lane_of_warp();
#pragma unroll
    for (int turn = 0; turn < (Shape::kRows + kThreads - 1) / kThreads; ++turn) {
      const int i = thread + turn * kThreads;
      if (i < Shape::kRows) block_.of_rows[i] = m + i < block_.gemm.rows ? block_.gemm.scales[m + i] : 0.0f;
    }
    const Epilogue& end = block_.gemm.epilogue.e;
#pragma unroll 1
    for (int i = thread; i < Shape::kColumns; i += kThreads) {
      const int channel = n + i;  // one beyond N within its block has the scale 0
      block_.of_channels[i] = channel / 64 < block_.gemm.w.blocks() ? block_.gemm.w.scale(channel) : 0.0f;
      block_.biases[i] = end.bias && channel < block_.gemm.w.columns ? end.bias_at(channel) : 0.0f;
    }
  }

  // Of an adapter, and of its rows, whose ranks from `chunk` on are so many.
  __device__ void bring_factors(int m, int n, const int (&adapters)[kThirtyTwos], int adapter, int chunk, int ranks,
                                int part) const {
    const T* t = static_cast<const T*>(block_.gemm.t.data);
    const int lane = lane_of_warp();
#pragma unroll
    for (int i = 0; i < kThirtyTwos; ++i) {
      const bool uses = adapters[i] == adapter;
#pragma unroll 1
      for (int j = part; j < 4; j += Shape::kBringers) {  // eight rows of four chunks of sixteen bytes
        const int of_32 = j * 8 + lane / 4, row = i * 32 + of_32, chunk_of_row = lane % 4;
        const int r = chunk_of_row * kPerChunk<T>;
        const int count = of_chunk<T>(__shfl_sync(~0u, uses, of_32) ? ranks - r : 0);
        copy16_async(block_.t + TileT::offset(row, chunk_of_row),
                     t + (count ? (m + row) * block_.gemm.t.stride + chunk + r : 0),
                     count * static_cast<int>(sizeof(T)));
      }
    }
    load_factor<T, TileB, Shape::kBringers * 32>(block_.b, block_.gemm.up, block_.gemm.w.columns, n,
                                                 block_.gemm.routing.begin(adapter) + chunk, ranks, part * 32 + lane);
  }

  const Block& block_;
};

}  // namespace lora_kernels::cuda
