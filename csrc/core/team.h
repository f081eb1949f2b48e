// Several threads that make the same calls and share out their tasks (Executor::shared).
#pragma once

#include <atomic>
#include <thread>

#include "lora_kernels/executor.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace lora_kernels {

inline void spin_pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// All members wait until the last has come. They spin, as the kernels between two meetings take microseconds; where a
// member has lost its core to something else, the others soon give theirs away.
class Barrier {
 public:
  void wait(int64_t members) {
    const uint32_t phase = phase_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == members) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins)
      spins < kSpins ? spin_pause() : std::this_thread::yield();
  }

 private:
  static constexpr int kSpins = 2000;  // about 100 us: longer than any stage's imbalance
  alignas(64) std::atomic<int64_t> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
};

// One member's view: an executor whose tasks are this member's share, followed by a meeting.
class TeamMember {
 public:
  TeamMember(Barrier* barrier, int64_t index, int64_t members) : barrier_(barrier), index_(index), members_(members) {}

  Executor executor() {
    Executor executor;
    executor.pool = this;
    executor.shared = true;
    executor.leads = index_ == 0;
    executor.parallel_for = [](void* pool, int64_t tasks, Executor::Task task, void* context) {
      TeamMember& self = *static_cast<TeamMember*>(pool);
      const int64_t end = tasks * (self.index_ + 1) / self.members_;
      for (int64_t i = tasks * self.index_ / self.members_; i < end; ++i) task(context, i);
      self.barrier_->wait(self.members_);
    };
    return executor;
  }

 private:
  Barrier* barrier_;
  int64_t index_, members_;
};

}  // namespace lora_kernels
