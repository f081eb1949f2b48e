// How operators run on a CUDA device: the part of a Plan that csrc/cuda fills in. Plain data that prints.
#pragma once

#include <cstdint>
#include <string>

namespace lora_kernels {

enum class CudaLoraLinearPath : uint8_t {
  kBase,      // no LoRA branch: one tiled matrix product
  kTwoSteps,  // a kernel for t = s x At, then the base product, whose accumulators take t B as more steps over depth
  kInTile,    // one kernel: every tile makes the t of its own rows beside the base product
  kFewRows,   // up to 32 rows: W streams through registers; t, and the sum of split parts, are kernels of their own
};

struct CudaLoraLinearPlan {
  CudaLoraLinearPath path = CudaLoraLinearPath::kBase;
  int arch = 0;              // of the device, as in CudaDevice
  int tile_rows = 0;         // of a block
  int tile_columns = 0;      //
  int splits = 1;            // of K among blocks (kFewRows): partial sums go to the workspace
  bool large_tiles = false;  // which of the two tile shapes
  int wgmma_columns = 0;     // kBase, kTwoSteps: 128 or 256, of tiles by wgmma; 0: by mma.sync
  bool early_start = false;  // a kernel may start before the one whose result it needs at its end has finished
  bool t_in_blocks = false;  // kFewRows: blocks make t themselves, which saves the kernel before
  int cluster = 1;           // t_in_blocks: blocks that make it together
  // kTwoSteps: so many at most make t, beside which the product has room; 0: a block for every 16 rows
  int t_blocks = 0;
  bool convert_a = false;   // A is of another type than x: a kernel converts it first
  double predicted_us = 0;  // by the plan's bytes and FLOPs; orders the paths, and is no measurement
};
std::string to_string(const CudaLoraLinearPlan& plan);

struct CudaLoraLinearBackwardPlan {
  int arch = 0;
  bool large_tiles = false;  // of dx
  int wgmma_columns = 0;     // of dx: 128 or 256, by wgmma; 0: by mma.sync
  bool early_start = false;  //
  int a_splits = 1;          // of the rows, in the sums over rows: partial sums go to the workspace and are
  int b_splits = 1;          // added in order by a last kernel
  int w_splits = 1;          //
  // u = s dy Bt and dB = tt dy in one kernel that reads dy once; blocks take so many tiles of 64 rows, and split rows
  // and columns among them. Parts of both are added by a second kernel.
  bool dy_once = false;
  int row_tiles = 1, row_splits = 1, column_splits = 1;
  double predicted_us = 0;  //
};
std::string to_string(const CudaLoraLinearBackwardPlan& plan);

enum class CudaInt8LoraLinearPath : uint8_t {
  kTiled,    // a kernel for INT8 rows, their scales and t, then INT8 tiles whose sums take t B as more steps over depth
  kFewRows,  // up to 32 rows: the same kernel, then W streamed through registers
  kFused,    // up to 16 rows: one kernel, whose blocks quantize the rows and make t for themselves
};

struct CudaInt8LoraLinearPlan {
  CudaInt8LoraLinearPath path = CudaInt8LoraLinearPath::kTiled;
  int arch = 0;              //
  bool large_tiles = false;  // kTiled: 128 x 128, or 64 x 64
  int wgmma_columns = 0;     // kTiled: 128 or 256, of tiles of 128 rows by wgmma; 0: by mma.sync
  int splits = 1;            // kFewRows: of K among blocks; integer parts go to the workspace
  // kTiled: the product may start before the kernel that makes its rows has finished. kFewRows, kFused: every kernel
  // may start before the one before it has, whichever operator that is of; so may the choice among outputs.
  bool early_start = false;
  bool convert_a = false;  // A is of another type than x: a kernel converts it first
  int cluster = 1;         // kFewRows, kFused: blocks that share out K; integer parts go from one to the other
  int rows_of_block = 16;  // kTiled, kFewRows: that the kernel before quantizes in a block
  // Of shared memory while rows are quantized: for each row of x, and of the first ranks of an A of few rows; 0: they
  // are read from L2.
  int staged_bytes = 0, staged_a_bytes = 0;
  bool staged_w = false;    // kFused: and a block's part of w
  double predicted_us = 0;  // as in CudaLoraLinearPlan
};
std::string to_string(const CudaInt8LoraLinearPlan& plan);

struct CudaKvAttentionStepPlan {
  int arch = 0;             //
  int groups = 1;           // of 64 channels of a head
  bool fused = false;       // new tokens are appended by the kernel that attends; else by one before it
  bool grouped = false;     // a block has all queries of a cache row, which is read once for them; else those of a row
  bool places = false;      // the places of positions are looked up beforehand: new tokens, or slots per position
  int chunks = 1;           // of queries among blocks; more than so many follow in turns
  int splits = 1;           // of the positions among blocks
  int split_positions = 0;  // of each; of a cluster's splits the last may have none
  int cluster = 1;          // or splits: sums go from block to block (sm_90 on), else to memory, and a kernel adds them
  int ask = 0;              // for so many tiles of a warp ahead to come to L2
  bool early_start = false;  // kernels may start before the one before has finished, whichever operator's that is
  double predicted_us = 0;   // as in CudaLoraLinearPlan, with a cache that is full
};
std::string to_string(const CudaKvAttentionStepPlan& plan);

struct CudaKvPackPlan {
  int arch = 0;             //
  double predicted_us = 0;  // as in CudaLoraLinearPlan
};
std::string to_string(const CudaKvPackPlan& plan);

struct CudaKvRelativeStepPlan {
  int arch = 0;             //
  int groups = 1;           // of 64 channels of a head
  int chunks = 1;           // of a row's queries among blocks
  double predicted_us = 0;  // as in CudaLoraLinearPlan
};
std::string to_string(const CudaKvRelativeStepPlan& plan);

}  // namespace lora_kernels
