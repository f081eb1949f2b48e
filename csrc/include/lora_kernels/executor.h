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
  if (tasks <= 1) {
    if (tasks == 1) body(int64_t{0});
    return;
  }
  executor.parallel_for(
      executor.pool, tasks, [](void* context, int64_t task) { (*static_cast<const Body*>(context))(task); },
      const_cast<Body*>(&body));
}

}  // namespace lora_kernels
