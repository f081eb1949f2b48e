// Launches in the order of their stream.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#include "cuda/emulation/engine.h"

namespace lora_kernels::emulation {
namespace {

// A launch that has not run, but for a block that may have started early.
class Held {
 public:
  Held(Grid grid, size_t arg_bytes, int place) : place_(place) {
    arg_ = std::aligned_alloc(128, (arg_bytes + 127) / 128 * 128);
    memcpy(arg_, grid.arg, arg_bytes);
    grid.arg = arg_;
    first_ = open_blocks(grid, place);
    order_.resize(grid.clusters());
    std::iota(order_.begin(), order_.end(), size_t{0});
    if (options.order == Order::kReverse) std::reverse(order_.begin(), order_.end());
    if (options.order == Order::kShuffled)
      for (size_t i = order_.size(); i > 1; --i) std::swap(order_[i - 1], order_[draw(static_cast<uint32_t>(i))]);
  }
  Held(const Held&) = delete;
  ~Held() {
    close_blocks(first_);
    std::free(arg_);
  }

  int place() const { return place_; }
  // One cluster, as far as it comes before the kernel before has run.
  void start_early() {
    start_blocks(first_, order_[0], true);
    started_ = true;
  }
  void run() {
    if (started_) finish_blocks(first_);
    for (size_t i = started_ ? 1 : 0; i < order_.size(); ++i) start_blocks(first_, order_[i], false);
  }

 private:
  int place_;
  void* arg_;
  Block* first_;
  std::vector<size_t> order_;
  bool started_ = false;
};

std::unique_ptr<Held> last;  // what the next launch runs, or finish()
int holds = 0;
#if defined(LORA_KERNELS_EMULATION_TSAN)
constexpr bool kHolds = false;  // a block that is left would be one that the sanitizer has to order
#else
constexpr bool kHolds = true;
#endif

void run_last() {
  if (const auto running_now = std::move(last)) running_now->run();
}

}  // namespace

void launch(const Launched& l) {
  const Grid grid{l.kernel, l.grid, l.block, l.shared_bytes, l.cluster, l.body, l.arg};
  expect_valid(grid);
  auto next = std::make_unique<Held>(grid, l.arg_bytes, last ? 1 - last->place() : 0);
  if (last && l.early) next->start_early();
  run_last();
  last = std::move(next);
  if (!kHolds || holds == 0) run_last();
}

void hold() { ++holds; }

void finish() {
  if (--holds == 0) run_last();
}

}  // namespace lora_kernels::emulation
