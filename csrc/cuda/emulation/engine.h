// Between the engine, which runs the threads of a block, and launches, which say of what grid and when.
#pragma once

#include "cuda/emulation/asynchronous.h"

namespace lora_kernels::emulation {

struct Grid {
  const char* kernel;
  dim3 size, block;
  size_t shared_bytes;  // what the launch asked for
  void (*body)(const void*);
  const void* arg;
  size_t blocks() const { return size_t{size.x} * size.y * size.z; }
};

// Throws where a device would refuse.
void expect_valid(const Grid& grid);

// Threads and shared memory for the blocks of a grid, one after another; there are two places for such.
struct Block;
Block* open_blocks(const Grid& grid, int place);
void close_blocks(Block* block);

// Runs block `index`. With `early` it comes no further than to wait_for_kernel_before(), which every thread has to come
// to, and finish_block() runs the rest.
void start_block(Block* block, size_t index, bool early);
void finish_block(Block* block);

}  // namespace lora_kernels::emulation
