// Several threads that make the same calls and share out their tasks (Executor::shared).
//
// Every call of parallel_for is a stage. A member takes the tasks of its own place first and then any that nobody has
// taken; a stage is over when its tasks are done, whoever did them. So one member alone gets through all stages, a pool
// may start them late or one after the other, and a member that has lost its core to something else holds up nobody
// unless it was in the middle of a task; on its return it skips the stages that went by without it.
#pragma once

#include <atomic>
#include <chrono>
#include <thread>

#include "lora_kernels/executor.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace lora_kernels {

// Waiting for another thread: for a while by spinning, as what is awaited takes microseconds; then by sleeping, so that
// a thread that has lost its core finds this one free. (Yielding leaves it where it is: an idle core fetches work, a
// busy one does not.)
class Patience {
 public:
  void wait() {
    if (spins_ < kSpins) {
      ++spins_;
#if defined(__x86_64__)
      _mm_pause();
#endif
    } else {
      ++naps_;
      std::this_thread::sleep_for(std::chrono::microseconds(30));
    }
  }
  int naps() const { return naps_; }

 private:
  static constexpr int kSpins = 1000;  // about 50 us, longer than any task
  int spins_ = 0, naps_ = 0;
};

// What the members share: the number of the stage they are at, with a bit for each of its groups of tasks that is
// taken, and how many groups are done. One word for stage and bits, so that a latecomer cannot take from a stage that
// is over.
struct alignas(64) TeamBoard {
  static constexpr int kMostGroups = 32;
  std::atomic<uint64_t> stage_and_taken{0};
  alignas(64) std::atomic<uint32_t> done{0};
  alignas(64) std::atomic<int64_t> left{0};  // members that are through all stages
};

class TeamMember {
 public:
  TeamMember(TeamBoard* board, int64_t index, int64_t members) : board_(board), index_(index), members_(members) {}

  // Stages count from this call on: one executor per member and run.
  Executor executor() {
    Executor executor;
    executor.pool = this;
    executor.shared = true;
    executor.leads = index_ == 0;
    executor.parallel_for = [](void* pool, int64_t tasks, Executor::Task task, void* context) {
      static_cast<TeamMember*>(pool)->run_stage(tasks, task, context);
    };
    return executor;
  }

  // After the last stage. The pool will wait for all members by spinning; where one is missing, some naps before that
  // give it a core to come by. Not more: a pool may well start it only after this one has returned.
  void leave() {
    board_->left.fetch_add(1, std::memory_order_relaxed);
    for (Patience patience; board_->left.load(std::memory_order_relaxed) < members_ && patience.naps() < 3;)
      patience.wait();
  }

 private:
  void run_stage(int64_t tasks, Executor::Task task, void* context) {
    const uint64_t stage = stage_++;
    const int64_t groups = tasks < TeamBoard::kMostGroups ? tasks : TeamBoard::kMostGroups;
    const int64_t first = groups * index_ / members_;
    for (Patience patience;;) {
      uint64_t state = board_->stage_and_taken.load(std::memory_order_acquire);
      if (state >> 32 != stage) return;  // over
      int64_t group = -1;
      for (int64_t i = 0; i < groups && group < 0; ++i) {
        const int64_t candidate = (first + i) % groups;
        if (!(state >> candidate & 1)) group = candidate;
      }
      if (group < 0) {  // all are taken, by members that are at them still
        patience.wait();
        continue;
      }
      if (!board_->stage_and_taken.compare_exchange_weak(state, state | uint64_t{1} << group,
                                                         std::memory_order_acq_rel))
        continue;
      for (int64_t i = tasks * group / groups; i < tasks * (group + 1) / groups; ++i) task(context, i);
      if (board_->done.fetch_add(1, std::memory_order_acq_rel) + 1 < groups) continue;
      board_->done.store(0, std::memory_order_relaxed);
      board_->stage_and_taken.store((stage + 1) << 32, std::memory_order_release);
      return;
    }
  }

  TeamBoard* board_;
  int64_t index_, members_;
  uint64_t stage_ = 0;
};

}  // namespace lora_kernels
