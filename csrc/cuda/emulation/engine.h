// Between the engine, which runs the threads of a block, and launches, which say of what grid and when.
#pragma once

#include "cuda/emulation/asynchronous.h"

namespace lora_kernels::emulation {

struct Grid {
  const char* kernel;
  dim3 size, block;
  size_t shared_bytes;  // what the launch asked for
  unsigned cluster;
  void (*body)(const void*);
  const void* arg;
  size_t blocks() const { return size_t{size.x} * size.y * size.z; }
  size_t clusters() const { return blocks() / cluster; }
};

// Throws where a device would refuse.
void expect_valid(const Grid& grid);

// Threads and shared memory for the blocks of a grid, one cluster after another; there are two places for such. What is
// returned is the first block of the cluster.
struct Block;
Block* open_blocks(const Grid& grid, int place);
void close_blocks(Block* first);

// Runs the blocks of cluster `index`. With `early` they come no further than to wait_for_kernel_before(), which every
// thread has to come to, and finish_blocks() runs the rest.
void start_blocks(Block* first, size_t index, bool early);
void finish_blocks(Block* first);

}  // namespace lora_kernels::emulation
