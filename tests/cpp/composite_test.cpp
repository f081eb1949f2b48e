// Composites on pools of every kind: whoever comes late, or last, or never, each task runs once and stages keep their
// order. Runs under ThreadSanitizer too (tests/test_core.py).
#include "lora_kernels/composite.h"

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "check.h"
#include "core/team.h"

using namespace lora_kernels;

namespace {

using Tasks = std::vector<int64_t>;

// Pools that keep parallel_for's promise, and no more.
Executor in_order() { return serial_executor(); }

Executor reversed() {
  Executor executor;
  executor.parallel_for = [](void*, int64_t tasks, Executor::Task task, void* context) {
    for (int64_t i = tasks; i-- > 0;) task(context, i);
  };
  return executor;
}

template <int kLateMilliseconds>
Executor threads() {
  Executor executor;
  executor.parallel_for = [](void*, int64_t tasks, Executor::Task task, void* context) {
    std::vector<std::thread> others;
    for (int64_t i = 1; i < tasks; ++i)
      others.emplace_back([=] {
        std::this_thread::sleep_for(std::chrono::milliseconds(kLateMilliseconds * i));
        task(context, i);
      });
    task(context, 0);
    for (std::thread& other : others) other.join();
  };
  return executor;
}

// Every member makes the same calls; a task sees all that earlier stages did.
void test_team(const char* pool, const Executor& executor, int64_t members) {
  const Tasks stages = {1, 2, 5, 31, 32, 33, 100, 1, 7};
  std::vector<std::vector<int>> runs;
  for (const int64_t tasks : stages) runs.emplace_back(static_cast<size_t>(tasks), 0);
  std::vector<std::atomic<int>> finished(stages.size());
  std::atomic<bool> ordered{true};
  TeamBoard board;
  for_each_task(executor, members, [&](int64_t index) {
    TeamMember member(&board, index, members);
    const Executor own = member.executor();
    for (size_t s = 0; s < stages.size(); ++s)
      for_each_task(own, stages[s], [&](int64_t task) {
        if (s > 0 && finished[s - 1] != stages[s - 1]) ordered = false;
        ++runs[s][static_cast<size_t>(task)];  // not atomic: tasks must not run twice, nor at once
        ++finished[s];
      });
    member.leave();
  });
  const std::string what = std::string(pool) + ", members " + std::to_string(members);
  for (size_t s = 0; s < stages.size(); ++s)
    for (const int count : runs[s])
      check(count == 1, what + ": a task of stage " + std::to_string(s) + " ran " + std::to_string(count) + " times");
  check(ordered, what + ": a stage began before the one before it was over");
}

// h = gelu(norm(x) W1), x += h W2, best of norm(x) W3: what a decoder step is made of.
struct Chain {
  static constexpr int64_t kRows = 3, kWidth = 96, kInner = 200, kWords = 1000;
  Buffer<uint8_t> w1 = weight(kInner, kWidth), w2 = weight(kWidth, kInner), w3 = weight(kWords, kWidth);
  Buffer<float> x = random_floats(kRows * kWidth), h = Buffer<float>(kRows * kInner);
  Buffer<float> norm_weight = random_floats(kWidth), norm_bias = random_floats(kWidth);
  Buffer<int64_t> best = Buffer<int64_t>(kRows * 2);
  CompositeProblem problem;
  CompositeArgs args;

  static Buffer<float> random_floats(int64_t count) {
    static std::mt19937 generator(7);
    std::normal_distribution<float> normal;
    Buffer<float> b(count);
    for (int64_t i = 0; i < count; ++i) b[i] = normal(generator);
    return b;
  }
  static Buffer<uint8_t> weight(int64_t n, int64_t k) {
    Buffer<int8_t> q(n * k);
    Buffer<float> scales(n);
    for (int64_t i = 0; i < n * k; ++i) q[i] = static_cast<int8_t>(i * 37 % 255 - 127);
    for (int64_t i = 0; i < n; ++i) scales[i] = 0.001f;
    Buffer<uint8_t> packed = Buffer<uint8_t>::aligned(int8_packed_bytes(n, k));
    int8_pack(q.get(), scales.get(), n, k, packed.get());
    return packed;
  }
  void add(int64_t k, int64_t n, const float* from, const uint8_t* packed, float* to, bool norm) {
    Int8LoraLinearProblem p;
    p.rows = kRows, p.in_features = k, p.out_features = n, p.has_norm = norm;
    Int8LoraLinearArgs a;
    a.x = from, a.x_stride = k, a.packed_weight = packed, a.y = to;
    a.norm_weight = norm_weight.get(), a.norm_bias = norm_bias.get();
    problem.stages.emplace_back(p);
    args.stages.emplace_back(a);
  }
  Chain() {
    add(kWidth, kInner, x.get(), w1.get(), h.get(), true);
    std::get<Int8LoraLinearProblem>(problem.stages.back()).activation = Activation::kGelu;
    add(kInner, kWidth, h.get(), w2.get(), x.get(), false);
    std::get<Int8LoraLinearProblem>(problem.stages.back()).has_residual = true;
    std::get<Int8LoraLinearArgs>(args.stages.back()).residual = x.get();
    add(kWidth, kWords, x.get(), w3.get(), nullptr, true);
    std::get<Int8LoraLinearProblem>(problem.stages.back()).top_k = 2;
    std::get<Int8LoraLinearArgs>(args.stages.back()).top_columns = best.get();
  }
  // x and best after three runs
  std::vector<float> run_three_times(int threads, const Executor& executor) {
    DeviceInfo device = host_device();
    device.threads = threads;
    CompositePlan chosen;
    check(plan(problem, device, &chosen).ok(), "a composite has a plan");
    check(contains(to_string(chosen), "top_k=2"), to_string(chosen));
    Buffer<uint8_t> workspace = Buffer<uint8_t>::aligned(workspace_bytes(chosen));
    args.workspace = workspace.get();
    for (int i = 0; i < 3; ++i) check(run(chosen, args, executor).ok(), "a composite runs");
    std::vector<float> result(x.get(), x.get() + kRows * kWidth);
    for (int64_t i = 0; i < kRows * 2; ++i) result.push_back(static_cast<float>(best[i]));
    return result;
  }
};

}  // namespace

int main() {
  const std::pair<const char*, Executor> pools[] = {
      {"in order", in_order()}, {"reversed", reversed()}, {"threads", threads<0>()}, {"late threads", threads<2>()}};
  std::vector<float> expected;
  {
    // A chain changes its x: all start from the same numbers, which only one generator's order gives.
    Chain chain;
    std::vector<float> start(chain.x.get(), chain.x.get() + Chain::kRows * Chain::kWidth);
    expected = chain.run_three_times(1, serial_executor());
    for (const auto& [name, executor] : pools)
      for (int members : {1, 2, 3, 5}) {
        test_team(name, executor, members);
        std::copy(start.begin(), start.end(), chain.x.get());
        check(chain.run_three_times(members, executor) == expected,
              std::string(name) + ": a composite on " + std::to_string(members) + " gives other bits than alone");
      }
    CompositePlan chosen;
    plan(chain.problem, host_device(), &chosen);
    chain.args.stages.pop_back();
    check(contains(run(chosen, chain.args, serial_executor()).text, "expected one for each of 3 stages"),
          "missing args are named");
  }
  if (failures == 0) std::printf("all checks passed\n");
  return failures != 0;
}
