// Between the engine and what runs beside its threads: copies, products and boxes on their way.
#pragma once

#include <map>
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

  void clear() {  // keeps the vectors' memory, which one block after another would ask for again
    copies.clear();
    products.clear();
    unfenced.clear();
    group = product_group = 0;
    registers_fenced = false;
  }
};

struct Arrivals {  // of one phase at a time: one arrival, and bytes that are still to come
  int phase, arrived;
  int64_t bytes;
  void look() {
    if (arrived == 0 || bytes != 0) return;
    ++phase;
    arrived = 0;
  }
};
struct PendingBox {
  void* to;
  Box box;
  uint32_t barrier;
};
// What all threads of a block share of it.
struct UnderWay {
  std::vector<uint16_t> writers;          // of each chunk: a thread's index + 1, until it has fenced what it wrote
  std::map<uint32_t, Arrivals> arrivals;  // by their place in shared memory
  std::vector<PendingBox> boxes;
};

// Of the running block, and of its running thread; the engine keeps it true.
struct Running {
  char* shared = nullptr;
  size_t shared_capacity = 0;  // what the launch asked for, and gaps
  UnderWay* under_way = nullptr;
  int thread = 0;
  Started* started = nullptr;
};
extern Running running;

uint32_t draw(uint32_t below);  // by the engine, from Options.seed

void begin_block();
void land_copies();  // the running thread's, at its end

}  // namespace lora_kernels::emulation
