// Blocks from their beginning to their end: shared memory, fibers that can begin, and the clusters of a grid in turn.
#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <utility>

#include "cuda/emulation/block.h"

namespace lora_kernels::emulation {
namespace {

void prepare(int i, uint3 block, dim3 size, dim3 grid) {
  Fiber& f = here->fibers[i];
  const unsigned t = static_cast<unsigned>(i);
  f.self = {{t % size.x, t / size.x % size.y, t / size.x / size.y}, block, size, grid};
  f.index = i;
  f.started.clear();
  f.call = {"", "", 0};
  here->warps[i / 32].exists |= 1u << i % 32;
  char* low = here->stacks + static_cast<size_t>(i) * kStackBytes;
  ASAN(__asan_unpoison_memory_region(low, kStackBytes);)
  // What lora_kernels_switch_fiber pops: control words, six registers, where to return; enter() never does.
  void** sp = reinterpret_cast<void**>(low + kStackBytes);
  *--sp = nullptr;
  *--sp = reinterpret_cast<void*>(&enter);
  for (int k = 0; k < 6; ++k) *--sp = nullptr;
  uint32_t control[2] = {};
  asm volatile("stmxcsr %0\n fnstcw %1" : "=m"(control[0]), "=m"(control[1]));
  memcpy(--sp, control, sizeof control);
  f.stack_pointer = sp;
  f.low = low;
  f.size = kStackBytes;
  f.fake_stack = nullptr;
  TSAN(if (!f.tsan) f.tsan = __tsan_create_fiber(0);)
}

// Until nobody can go on: all have exited, or the others wait for the kernel before.
void go_on(Together* together) {
  use(next_block());
  set_current(here->ready[--here->ready_count]);
  go(together->caller, *here->current);
#if defined(LORA_KERNELS_EMULATION_TSAN)
  for (int rank = 0; rank < blocks_together(); ++rank) {
    Block& block = of_cluster(rank);
    for (int i = 0; block.live && i < block.threads; ++i) {  // left early: let go of each thread on its behalf
      __tsan_switch_to_fiber(block.fibers[i].tsan, __tsan_switch_to_fiber_no_sync);
      __tsan_release(&block.grid.arg);
      __tsan_switch_to_fiber(together->caller.tsan, __tsan_switch_to_fiber_no_sync);
      __tsan_destroy_fiber(block.fibers[i].tsan);
      block.fibers[i].tsan = nullptr;
    }
    __tsan_acquire(&block.grid.arg);  // blocks are ordered for the sanitizer, clusters at least
  }
#endif
  if (together->thrown) std::rethrow_exception(std::exchange(together->thrown, nullptr));
  if (!together->error.empty()) throw Error(std::exchange(together->error, ""));
}

// With shared memory as nothing has written it, and threads that can begin.
void start(Block* block, size_t index) {
  use(block);
  const dim3 grid = here->grid.size;
  const uint3 at = {static_cast<unsigned>(index % grid.x), static_cast<unsigned>(index / grid.x % grid.y),
                    static_cast<unsigned>(index / grid.x / grid.y)};
  Memory& m = here->memory;
  ASAN(__asan_unpoison_memory_region(m.shared, m.capacity);)
  memset(m.shared, 0xFF, m.capacity);
  ASAN(__asan_poison_memory_region(m.shared, m.capacity);)
  memset(static_cast<void*>(here->warps), 0, sizeof(Warp) * static_cast<size_t>((here->threads + 31) / 32));
  m.begin();
  here->live = here->threads;
  here->waiting = here->ready_count = 0;
  TSAN(__tsan_release(&here->grid.body);)
  for (int i = 0; i < here->threads; ++i) prepare(i, at, here->grid.block, grid);
  wake(here, here->fibers, here->threads, [](const Fiber&) { return true; });
}

}  // namespace

void expect_valid(const Grid& g) {
  const size_t threads = size_t{g.block.x} * g.block.y * g.block.z, blocks = g.blocks();
  if (!threads || threads > kMostThreads || !blocks || g.size.y > 65535 || g.size.z > 65535 ||
      g.shared_bytes > kMostShared || !g.cluster || g.cluster > kMostCluster || g.size.x % g.cluster)
    throw Error(std::string(g.kernel) + ": invalid configuration: " + std::to_string(blocks) + " blocks of " +
                std::to_string(threads) + " threads, " + std::to_string(g.shared_bytes) +
                " bytes of shared memory, in clusters of " + std::to_string(g.cluster));
}

Block* open_blocks(const Grid& g, int place) {
  static Together places[2];
  Together* together = &places[place];
  together->cluster.count = static_cast<int>(g.cluster);
  together->cluster.threads = 0;
  ASAN(together->caller.low = nullptr;)
  TSAN(together->caller.tsan = __tsan_get_current_fiber();)
  for (int rank = together->cluster.count - 1; rank >= 0; --rank) {
    Block& block = together->blocks[rank];
    if (!block.stacks)
      block.stacks = static_cast<char*>(mmap(nullptr, kMostThreads * kStackBytes, PROT_READ | PROT_WRITE,
                                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    block.grid = g;
    block.threads = static_cast<int>(g.block.x * g.block.y * g.block.z);
    together->cluster.threads += block.threads;
    together->cluster.blocks[rank] = &block.memory;
    block.memory.capacity = (g.shared_bytes + kGaps + kAlignment - 1) / kAlignment * kAlignment + kAlignment;
    block.memory.shared = static_cast<char*>(std::aligned_alloc(kAlignment, block.memory.capacity));
    block.random = options.seed * 0x9E3779B97F4A7C15ull | 1;
    block.together = together;
    block.rank = rank;
    use(&block);
  }
  return here;
}

void close_blocks(Block* first) {
  for (int rank = 0; rank < first->together->cluster.count; ++rank) {
    Memory& m = first->together->blocks[rank].memory;
    ASAN(__asan_unpoison_memory_region(m.shared, m.capacity);)
    std::free(m.shared);
  }
}

void start_blocks(Block* first, size_t index, bool early) {
  Together* together = first->together;
  Cluster& cluster = together->cluster;
  together->early = early;
  cluster.arrived = cluster.phase = 0;
  for (int rank = cluster.count - 1; rank >= 0; --rank)
    start(&together->blocks[rank], index * static_cast<size_t>(cluster.count) + static_cast<size_t>(rank));
  go_on(together);
}

void finish_blocks(Block* first) {
  Together* together = first->together;
  together->early = false;
  for (int rank = together->cluster.count - 1; rank >= 0; --rank) {
    use(&together->blocks[rank]);
    wake(here, here->fibers, here->threads, [](const Fiber& f) { return f.state == State::kKernelBefore; });
  }
  go_on(together);
}

}  // namespace lora_kernels::emulation
