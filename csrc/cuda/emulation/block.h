// What threads and blocks are to the engine: engine.cpp runs and stops threads, blocks.cpp begins and ends blocks.
#pragma once

#include <exception>
#include <string>

#include "cuda/emulation/engine.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define ASAN(...) __VA_ARGS__
#else
#define ASAN(...)
#endif
#if defined(LORA_KERNELS_EMULATION_TSAN)
#include <sanitizer/tsan_interface.h>
#define TSAN(...) __VA_ARGS__
#else
#define TSAN(...)
#endif

extern "C" void lora_kernels_switch_fiber(void** save, void* load);  // fiber.cpp

namespace lora_kernels::emulation {

constexpr size_t kMostThreads = 1024, kMostShared = 227 << 10, kStackBytes = 256 << 10;
constexpr size_t kGap = 0 ASAN(+64), kGaps = 0 ASAN(+4096);  // bytes behind each part of shared memory, and of all
constexpr size_t kAlignment = 1024;
constexpr uint32_t kUnwritten = 0xFFFFFFFFu;

struct Context {
  void *stack_pointer, *fake_stack;
  const void* low;
  size_t size;
  void* tsan;
};
enum class State { kReady, kBarrier, kWarp, kCluster, kKernelBefore, kDone };
struct Fiber : Context {
  State state;
  Self self;
  int index;
  uint32_t mask;
  Call call;
  Started started;
};
struct Warp {
  Slot slots[32];
  uint32_t exists, waiting;
  char order;  // its address is what __syncwarp releases and acquires
};

struct Together;
struct Block {
  Fiber fibers[kMostThreads];
  Warp warps[kMostThreads / 32];
  Fiber* ready[kMostThreads];
  int threads, ready_count, waiting, live;
  Fiber* current;
  const Fiber* first_at_barrier;
  char* stacks;
  Grid grid;
  Memory memory;
  uint64_t random;
  Together* together;
  int rank;  // in its cluster
};
// What the blocks of a cluster have in common.
struct Together {
  Block blocks[kMostCluster];
  Cluster cluster;
  Context caller;
  bool early;  // the kernel before has not run
  std::string error;
  std::exception_ptr thrown;
};

// One block runs at a time, on one thread of the host; others of its cluster have been left where a thread could be,
// and those of another launch where they wait for a kernel.
extern Block* here;

inline void set_current(Fiber* f) {
  here->current = f;
  running.thread = f->index;
  running.started = &f->started;
}

inline void use(Block* block) {
  here = block;
  running.memory = &block->memory;
  running.cluster = &block->together->cluster;
}

inline int blocks_together() { return here->together->cluster.count; }
inline Block& of_cluster(int rank) { return here->together->blocks[rank]; }

inline void go(Context& from, Context& to, [[maybe_unused]] bool dying = false) {
  ASAN(__sanitizer_start_switch_fiber(dying ? nullptr : &from.fake_stack, to.low, to.size);)
  TSAN(__tsan_switch_to_fiber(to.tsan, __tsan_switch_to_fiber_no_sync);)
  lora_kernels_switch_fiber(&from.stack_pointer, to.stack_pointer);
  ASAN(__sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);)
}

// The last that is pushed runs first.
template <class Which>
void wake(Block* block, Fiber* fibers, int count, Which which) {
  for (int i = 0; i < count; ++i) {
    Fiber& f = fibers[options.order == Order::kReverse ? i : count - 1 - i];
    if (!which(f)) continue;
    f.state = State::kReady;
    block->ready[block->ready_count++] = &f;
  }
}

// By engine.cpp: a block of the cluster that goes on, or null; and the first code of a fiber, and its last.
Block* next_block();
void enter();

}  // namespace lora_kernels::emulation
