// Threads as fibers, barriers, collectives and shared memory behind emulation.h.
//
// Under ThreadSanitizer every thread is a fiber of the sanitizer's, switched without synchronisation; barriers and
// __syncwarp release and acquire, shuffles and matrix products order nothing, as on the device. This file and
// blocks.cpp are then compiled without -fsanitize=thread and with LORA_KERNELS_EMULATION_TSAN.
#include <cstdlib>
#include <cstring>

#include "cuda/emulation/block.h"

namespace lora_kernels::emulation {

Options options;
uint64_t bank_conflicts = 0;
Running running;
Block* here = nullptr;

namespace {

std::string what_threads_do(const Block& block) {
  std::string text;
  for (int i = 0, shown = 0; i < block.threads && shown < 8; ++i) {
    const Fiber &f = block.fibers[i], &before = block.fibers[i ? i - 1 : 0];
    if (i && f.state == before.state && f.call.line == before.call.line) continue;
    text += "\n  from thread " + std::to_string(i) +
            (&block == here ? " on: " : " of block " + std::to_string(block.rank) + " of the cluster on: ");
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

void next(bool dying = false) {
  Block* mine = here;
  Fiber* me = here->current;
  const auto back = [=] {
    use(mine);
    set_current(me);
  };
  Block* block = next_block();
  if (!block) {
    if (!done_for_now()) refuse("deadlock");
    go(*me, here->together->caller, dying);
    return back();  // the kernel before has run
  }
  use(block);
  const int i = options.order == Order::kShuffled ? static_cast<int>(draw(static_cast<uint32_t>(here->ready_count)))
                                                  : here->ready_count - 1;
  Fiber* f = here->ready[i];
  here->ready[i] = here->ready[--here->ready_count];
  if (f == me) return;
  set_current(f);
  go(*me, *f, dying);
  back();
}

void open_barrier() {
  here->waiting = 0;
  wake(here, here->fibers, here->threads, [](const Fiber& f) { return f.state == State::kBarrier; });
}

}  // namespace

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
  return here->ready_count && draw(kWhile) ? here : able[draw(static_cast<uint32_t>(count))];
}

void enter() {
  ASAN(const void* low; size_t size; __sanitizer_finish_switch_fiber(nullptr, &low, &size);
       Context& caller = here->together->caller; if (!caller.low) caller.low = low,
                                                 caller.size = size;)  // the first one comes from the caller
  TSAN(__tsan_acquire(&here->grid.body);)
  try {
    here->grid.body(here->grid.arg);
  } catch (...) {
    here->together->thrown = std::current_exception();
    go(*here->current, here->together->caller);
  }
  if (here->together->early) refuse("started early and ended without wait_for_kernel_before()");
  land_copies();
  // Not what enter() acquires: threads that start later are not ordered behind those that are done.
  TSAN(__tsan_release(&here->grid.arg);)
  here->current->state = State::kDone;
  if (--here->live == 0)
    end_block();
  else if (here->waiting == here->live)
    open_barrier();  // threads that exited no longer count
  next(true);
  std::abort();
}

uint32_t draw(uint32_t below) {
  here->random ^= here->random << 13;
  here->random ^= here->random >> 7;
  here->random ^= here->random << 17;
  return static_cast<uint32_t>((here->random >> 11) % below);
}

const Self& self() { return here->current->self; }

void refuse(const std::string& why) {
  const uint3& at = here->current->self.block;
  std::string& error = here->together->error;
  error = std::string(here->grid.kernel) + ": " + why + ", by thread " + std::to_string(here->current->index) +
          " of block " + std::to_string(at.x) + "," + std::to_string(at.y) + "," + std::to_string(at.z) +
          what_threads_do(*here);
  for (int rank = 0; rank < blocks_together(); ++rank)
    if (rank != here->rank) error += what_threads_do(of_cluster(rank));
  go(*here->current, here->together->caller);
  std::abort();
}

void barrier(const Call& call) {
  Fiber& f = *here->current;
  f.call = call;
  f.state = State::kBarrier;
  TSAN(__tsan_release(&here->waiting);)
  if (here->waiting == 0) here->first_at_barrier = &f;
  if (here->first_at_barrier->call.line != call.line || strcmp(here->first_at_barrier->call.file, call.file) != 0)
    refuse("threads of one block meet in different barriers");
  if (++here->waiting == here->live) open_barrier();
  next();
  TSAN(__tsan_acquire(&here->waiting);)
}

Slot& collective(uint32_t mask, const Call& call, const void* in, size_t in_bytes, Compute compute,
                 [[maybe_unused]] bool orders_memory) {
  Fiber& f = *here->current;
  Warp& w = here->warps[f.index / 32];
  Fiber* lanes_of_warp = here->fibers + f.index / 32 * 32;
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
    const int first = f.index / 32 * 32, count = here->threads - first < 32 ? here->threads - first : 32;
    wake(here, lanes_of_warp, count, [=](const Fiber& g) { return (lanes >> (g.index % 32) & 1) != 0; });
  }
  next();
  TSAN(if (orders_memory) __tsan_acquire(&w.order);)
  return w.slots[lane];
}

void* open_shared(size_t used, size_t gaps, size_t bytes, size_t* gap) {
  *gap = kGap;
  if (used + bytes > here->grid.shared_bytes)
    refuse("takes " + std::to_string(used + bytes) + " bytes of shared memory, launched with " +
           std::to_string(here->grid.shared_bytes));
  if (gaps + kGap > kGaps) refuse("shared memory is taken in more parts than the emulation guards");
  char* part = here->memory.shared + used + gaps;
  ASAN(__asan_unpoison_memory_region(part, bytes);)
  return part;
}

void expect_written(const void* word, const char* what) {
  uint32_t bits;
  memcpy(&bits, word, sizeof bits);
  if (bits == kUnwritten) refuse(std::string(what) + " reads shared memory that nothing has written");
}

void wait_in_cluster(const Call& call) {
  here->current->call = call;
  here->current->state = State::kCluster;
  next();
}

void wake_cluster() {
  for (int rank = 0; rank < blocks_together(); ++rank) {
    Block& block = of_cluster(rank);
    wake(&block, block.fibers, block.threads, [](const Fiber& f) { return f.state == State::kCluster; });
  }
}

void wait_for_kernel_before(const Call& call) {
  if (!here->together->early) return;
  here->current->call = call;
  here->current->state = State::kKernelBefore;
  next();
}

}  // namespace lora_kernels::emulation
