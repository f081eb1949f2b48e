// Between the engine and what runs beside its threads: copies, products and boxes on their way.
#pragma once

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

// Of the running block, and of its running thread; the engine keeps it true.
struct Running {
  char* shared = nullptr;
  size_t shared_capacity = 0;  // what the launch asked for, and gaps
  int thread = 0;
  Started* started = nullptr;
};
extern Running running;

uint32_t draw(uint32_t below);  // by the engine, from Options.seed

void begin_block();
void land_copies();  // the running thread's, at its end

}  // namespace lora_kernels::emulation
