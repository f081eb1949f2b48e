// Where an operator runs. On a CPU: a pool that runs numbered tasks; on CUDA: a stream.
#pragma once

#include <cstdint>

namespace lora_kernels {

struct Executor {
  using Task = void (*)(void* context, int64_t task);

  // Runs task(context, i) for every i in [0, tasks) and returns when all are done. Tasks of one call may run at the
  // same time or one after the other, in any order; they must not wait for each other.
  void (*parallel_for)(void* pool, int64_t tasks, Task task, void* context) = nullptr;
  void* pool = nullptr;
  void* stream = nullptr;  // cudaStream_t, for CUDA implementations

  // A composite lets every member of a team make the same calls; tasks are shared out among them. What a call does
  // outside of its tasks every member does, perhaps late, when others are at later calls: there it may read its Plan
  // and Args, and operands that no other call writes, but not the workspace, and write nothing that is shared. All
  // members must come to the same numbers of tasks.
  bool shared = false;
  bool leads = true;  // false in all members but one
};

// The executor of a single thread: tasks in order, in the caller.
inline Executor serial_executor() {
  Executor executor;
  executor.parallel_for = [](void*, int64_t tasks, Executor::Task task, void* context) {
    for (int64_t i = 0; i < tasks; ++i) task(context, i);
  };
  return executor;
}

// Calls body(i) for every i in [0, tasks).
template <class Body>
void for_each_task(const Executor& executor, int64_t tasks, const Body& body) {
  if (tasks <= 0) return;
  if (tasks == 1 && !executor.shared) return body(int64_t{0});
  executor.parallel_for(
      executor.pool, tasks, [](void* context, int64_t task) { (*static_cast<const Body*>(context))(task); },
      const_cast<Body*>(&body));
}

// Calls body() once, whoever else makes the same call.
template <class Body>
void in_one_task(const Executor& executor, const Body& body) {
  for_each_task(executor, 1, [&](int64_t) { body(); });
}

}  // namespace lora_kernels
