// Fibers, barriers, collectives and shared memory behind emulation.h.
//
// Under ThreadSanitizer every thread is a fiber of the sanitizer's, switched without synchronisation; barriers and
// __syncwarp release and acquire, shuffles and matrix products order nothing, as on the device. This file itself is
// then compiled without -fsanitize=thread and with LORA_KERNELS_EMULATION_TSAN.
#include "cuda/emulation/engine.h"

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <exception>
#include <utility>

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

Options options;
uint64_t bank_conflicts = 0;
Running running;

namespace {

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

}  // namespace

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

namespace {

// One block runs at a time, on one thread of the host; others of its cluster have been left where a thread could be,
// and those of another launch where they wait for a kernel.
Block* b = nullptr;

void set_current(Fiber* f) {
  b->current = f;
  running.thread = f->index;
  running.started = &f->started;
}

void use(Block* block) {
  b = block;
  running.memory = &block->memory;
  running.cluster = &block->together->cluster;
}

int blocks_together() { return b->together->cluster.count; }
Block& of_cluster(int rank) { return b->together->blocks[rank]; }

void go(Context& from, Context& to, [[maybe_unused]] bool dying = false) {
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

std::string what_threads_do(const Block& block) {
  std::string text;
  for (int i = 0, shown = 0; i < block.threads && shown < 8; ++i) {
    const Fiber &f = block.fibers[i], &before = block.fibers[i ? i - 1 : 0];
    if (i && f.state == before.state && f.call.line == before.call.line) continue;
    text += "\n  from thread " + std::to_string(i) + (&block == b ? " on: " : " of the other block on: ");
    if (f.state == State::kDone)
      text += "exited";
    else if (f.state == State::kReady)
      text += "running";
    else
      text += std::string("waits in ") + f.call.what + " at " + f.call.file + ":" + std::to_string(f.call.line);
    ++shown;
  }
  return text;
}

// All have exited, or the others wait for the kernel before.
bool done_for_now() {
  bool live = false;
  for (int rank = 0; rank < blocks_together(); ++rank) {
    const Block& block = of_cluster(rank);
    live = live || block.live;
    for (int i = 0; i < block.threads; ++i)
      if (block.fibers[i].state == State::kKernelBefore) return true;
  }
  return !live;
}

// A block of the cluster that can go on, or null. One gets as far ahead as it can: the first, the last, or the one that
// runs for a while that is drawn.
Block* next_block() {
  Block* able[kMostCluster];
  int count = 0;
  for (int rank = 0; rank < blocks_together(); ++rank)
    if (of_cluster(rank).ready_count) able[count++] = &of_cluster(rank);
  if (count == 0) return nullptr;
  if (count == 1 || options.order == Order::kForward) return able[0];
  if (options.order == Order::kReverse) return able[count - 1];
  constexpr uint32_t kWhile = 512;  // switches of threads
  return b->ready_count && draw(kWhile) ? b : able[draw(static_cast<uint32_t>(count))];
}

void next(bool dying = false) {
  Block* mine = b;
  Fiber* me = b->current;
  const auto back = [=] {
    use(mine);
    set_current(me);
  };
  Block* block = next_block();
  if (!block) {
    if (!done_for_now()) refuse("deadlock");
    go(*me, b->together->caller, dying);
    return back();  // the kernel before has run
  }
  use(block);
  const int i = options.order == Order::kShuffled ? static_cast<int>(draw(static_cast<uint32_t>(b->ready_count)))
                                                  : b->ready_count - 1;
  Fiber* f = b->ready[i];
  b->ready[i] = b->ready[--b->ready_count];
  if (f == me) return;
  set_current(f);
  go(*me, *f, dying);
  back();
}

void open_barrier() {
  b->waiting = 0;
  wake(b, b->fibers, b->threads, [](const Fiber& f) { return f.state == State::kBarrier; });
}

// The first code of a fiber, and its last.
void enter() {
  ASAN(const void* low; size_t size; __sanitizer_finish_switch_fiber(nullptr, &low, &size);
       Context& caller = b->together->caller; if (!caller.low) caller.low = low,
                                              caller.size = size;)  // the first one comes from the caller
  TSAN(__tsan_acquire(&b->grid.body);)
  try {
    b->grid.body(b->grid.arg);
  } catch (...) {
    b->together->thrown = std::current_exception();
    go(*b->current, b->together->caller);
  }
  if (b->together->early) refuse("started early and ended without wait_for_kernel_before()");
  land_copies();
  // Not what enter() acquires: threads that start later are not ordered behind those that are done.
  TSAN(__tsan_release(&b->grid.arg);)
  b->current->state = State::kDone;
  if (--b->live == 0)
    end_block();
  else if (b->waiting == b->live)
    open_barrier();  // threads that exited no longer count
  next(true);
  std::abort();
}

void prepare(int i, uint3 block, dim3 size, dim3 grid) {
  Fiber& f = b->fibers[i];
  const unsigned t = static_cast<unsigned>(i);
  f.self = {{t % size.x, t / size.x % size.y, t / size.x / size.y}, block, size, grid};
  f.index = i;
  f.started.clear();
  f.call = {"", "", 0};
  b->warps[i / 32].exists |= 1u << i % 32;
  char* low = b->stacks + static_cast<size_t>(i) * kStackBytes;
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
  set_current(b->ready[--b->ready_count]);
  go(together->caller, *b->current);
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
  const dim3 grid = b->grid.size;
  const uint3 at = {static_cast<unsigned>(index % grid.x), static_cast<unsigned>(index / grid.x % grid.y),
                    static_cast<unsigned>(index / grid.x / grid.y)};
  Memory& m = b->memory;
  ASAN(__asan_unpoison_memory_region(m.shared, m.capacity);)
  memset(m.shared, 0xFF, m.capacity);
  ASAN(__asan_poison_memory_region(m.shared, m.capacity);)
  memset(static_cast<void*>(b->warps), 0, sizeof(Warp) * static_cast<size_t>((b->threads + 31) / 32));
  m.begin();
  b->live = b->threads;
  b->waiting = b->ready_count = 0;
  TSAN(__tsan_release(&b->grid.body);)
  for (int i = 0; i < b->threads; ++i) prepare(i, at, b->grid.block, grid);
  wake(b, b->fibers, b->threads, [](const Fiber&) { return true; });
}

}  // namespace

uint32_t draw(uint32_t below) {
  b->random ^= b->random << 13;
  b->random ^= b->random >> 7;
  b->random ^= b->random << 17;
  return static_cast<uint32_t>((b->random >> 11) % below);
}

const Self& self() { return b->current->self; }

void refuse(const std::string& why) {
  const uint3& at = b->current->self.block;
  std::string& error = b->together->error;
  error = std::string(b->grid.kernel) + ": " + why + ", by thread " + std::to_string(b->current->index) + " of block " +
          std::to_string(at.x) + "," + std::to_string(at.y) + "," + std::to_string(at.z) + what_threads_do(*b);
  for (int rank = 0; rank < blocks_together(); ++rank)
    if (rank != b->rank) error += what_threads_do(of_cluster(rank));
  go(*b->current, b->together->caller);
  std::abort();
}

void barrier(const Call& call) {
  Fiber& f = *b->current;
  f.call = call;
  f.state = State::kBarrier;
  TSAN(__tsan_release(&b->waiting);)
  if (b->waiting == 0) b->first_at_barrier = &f;
  if (b->first_at_barrier->call.line != call.line || strcmp(b->first_at_barrier->call.file, call.file) != 0)
    refuse("threads of one block meet in different barriers");
  if (++b->waiting == b->live) open_barrier();
  next();
  TSAN(__tsan_acquire(&b->waiting);)
}

Slot& collective(uint32_t mask, const Call& call, const void* in, size_t in_bytes, Compute compute,
                 [[maybe_unused]] bool orders_memory) {
  Fiber& f = *b->current;
  Warp& w = b->warps[f.index / 32];
  Fiber* lanes_of_warp = b->fibers + f.index / 32 * 32;
  const int lane = f.index % 32;
  const uint32_t lanes = mask & w.exists;
  f.call = call;
  f.mask = mask;
  f.state = State::kWarp;
  if (!(mask >> lane & 1)) refuse(std::string(call.what) + " by a lane outside its mask");
  for (int l = 0; l < 32; ++l)
    if ((lanes >> l & 1) && lanes_of_warp[l].state == State::kDone)
      refuse(std::string(call.what) + " names a thread that has exited");
  if (in_bytes) memcpy(w.slots[lane].in, in, in_bytes);
  TSAN(if (orders_memory) __tsan_release(&w.order);)
  w.waiting |= 1u << lane;
  bool all = (w.waiting & lanes) == lanes;
  for (int l = 0; all && l < 32; ++l)
    if (lanes >> l & 1) {
      all = lanes_of_warp[l].mask == mask;
      if (all && strcmp(lanes_of_warp[l].call.what, call.what) != 0)
        refuse(std::string("lanes of one warp meet in ") + call.what + " and " + lanes_of_warp[l].call.what);
    }
  if (all) {
    compute(w.slots, lanes);
    w.waiting &= ~lanes;
    const int first = f.index / 32 * 32, count = b->threads - first < 32 ? b->threads - first : 32;
    wake(b, lanes_of_warp, count, [=](const Fiber& g) { return (lanes >> (g.index % 32) & 1) != 0; });
  }
  next();
  TSAN(if (orders_memory) __tsan_acquire(&w.order);)
  return w.slots[lane];
}

void* open_shared(size_t used, size_t gaps, size_t bytes, size_t* gap) {
  *gap = kGap;
  if (used + bytes > b->grid.shared_bytes)
    refuse("takes " + std::to_string(used + bytes) + " bytes of shared memory, launched with " +
           std::to_string(b->grid.shared_bytes));
  if (gaps + kGap > kGaps) refuse("shared memory is taken in more parts than the emulation guards");
  char* part = b->memory.shared + used + gaps;
  ASAN(__asan_unpoison_memory_region(part, bytes);)
  return part;
}

void expect_written(const void* word, const char* what) {
  uint32_t bits;
  memcpy(&bits, word, sizeof bits);
  if (bits == kUnwritten) refuse(std::string(what) + " reads shared memory that nothing has written");
}

void wait_in_cluster(const Call& call) {
  b->current->call = call;
  b->current->state = State::kCluster;
  next();
}

void wake_cluster() {
  for (int rank = 0; rank < blocks_together(); ++rank) {
    Block& block = of_cluster(rank);
    wake(&block, block.fibers, block.threads, [](const Fiber& f) { return f.state == State::kCluster; });
  }
}

void wait_for_kernel_before(const Call& call) {
  if (!b->together->early) return;
  b->current->call = call;
  b->current->state = State::kKernelBefore;
  next();
}

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
  return b;
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
    wake(b, b->fibers, b->threads, [](const Fiber& f) { return f.state == State::kKernelBefore; });
  }
  go_on(together);
}

}  // namespace lora_kernels::emulation
