// Between the engine and what runs beside its threads: copies, products and boxes on their way.
#pragma once

#include <map>
#include <variant>
#include <vector>

#include "cuda/emulation/emulation.h"

namespace lora_kernels::emulation {

struct PendingCopy {
  void* to;
  const void* from;
  int bytes, valid, group;
  Copy copy;
};
struct PendingProduct {
  void* registers;
  uint64_t a, b;
  int group;
  Multiply multiply;
  const uint32_t* words;  // the left operand in registers, or null: it is `a`
  MultiplyRegisters multiply_registers;
  Call call;
};
// What one thread has started and not waited for.
struct Started {
  std::vector<PendingCopy> copies;
  int group = 0;
  std::vector<PendingProduct> products;
  int product_group = 0;
  bool registers_fenced = false;
  std::vector<uint32_t> unfenced;  // chunks of shared memory
  int cluster_phase = -1;          // in which it has arrived and not waited, or -1

  void clear() {  // keeps the vectors' memory, which one block after another would ask for again
    copies.clear();
    products.clear();
    unfenced.clear();
    group = product_group = 0;
    cluster_phase = -1;
    registers_fenced = false;
  }
};

struct Arrivals {  // of one phase at a time: so many arrivals, and bytes that are still to come
  int expected, phase, arrived;
  int64_t bytes;
  void look() {
    if (arrived < expected || bytes != 0) return;
    ++phase;
    arrived = 0;
  }
};
struct Sent {
  uint32_t words[4];
};
struct PendingBytes {
  uint32_t to;  // by its place in shared memory, as the barrier
  std::variant<Box, Sent> what;
  uint32_t barrier;
};
constexpr uint16_t kAnotherBlock = 0xFFFF;  // in the place of a thread's index + 1
// A block's shared memory, and what all its threads share of what is under way there.
struct Memory {
  char* shared = nullptr;
  size_t capacity = 0;                    // what the launch asked for, and gaps
  bool gone = false;                      // with its block, which has ended
  std::vector<uint16_t> writers;          // of each chunk: a thread's index + 1, until it has fenced what it wrote
  std::map<uint32_t, Arrivals> arrivals;  // by their place in shared memory
  std::vector<PendingBytes> coming;
  std::vector<uint32_t> sent;  // chunks that came from blocks, until a thread has fenced

  void begin() {
    gone = false;
    arrivals.clear();
    coming.clear();
    sent.clear();
    writers.assign(capacity / 16, 0);
  }
};
constexpr int kMostCluster = 8;
struct Cluster {
  Memory* blocks[kMostCluster];
  int count, threads;
  int arrived, phase;  // of arrive_in_cluster()
};

// Of the running block, and of its running thread; the engine keeps it true.
struct Running {
  Memory* memory = nullptr;
  Cluster* cluster = nullptr;
  int thread = 0;
  Started* started = nullptr;
};
extern Running running;

// By the engine. From Options.seed; until something has happened in the cluster; and that it has.
uint32_t draw(uint32_t below);
void wait_in_cluster(const Call& call);
void wake_cluster();

void land_copies();  // the running thread's, at its end
void end_block();    // by its last thread

}  // namespace lora_kernels::emulation
