// The launches of one call, in order on one stream, and what they have in common.
#pragma once

#include "cuda/primitives/launch.h"
#include "cuda/routing.h"
#include "lora_kernels/lora_bank.h"

namespace lora_kernels::cuda::launching {

inline unsigned tiles(int64_t count, int64_t size) { return static_cast<unsigned>((count + size - 1) / size); }

// Runs the launches of a call until one fails.
class Sequence {
 public:
  // With rest_early every kernel behind the first starts early, and the first when all before the call have finished.
  explicit Sequence(void* stream, bool rest_early = false) : stream_(stream), rest_early_(rest_early) {}
  template <auto kKernel, class Params>
  void run(const char* name, dim3 grid, unsigned threads, size_t shared, const Params& params, bool early = false,
           bool most_shared = false, unsigned cluster = 1) {
    if (!status_.ok() || grid.x == 0 || grid.y == 0 || grid.z == 0) return;
    early = early || (rest_early_ && begun_);
    begun_ = true;
    status_ = launch<kKernel>({name, grid, dim3(threads, 1, 1), shared, stream_, early, most_shared, cluster}, params);
  }
  // After the last.
  Status status() {
    const Status end = launches_.end();
    return status_.ok() ? end : status_;
  }

 private:
  void* stream_;
  bool rest_early_, begun_ = false;
  Launches launches_;
  Status status_;
};

inline Routing routing_of(const LoraShape& shape, const LoraBank& bank, int64_t rows) {
  Routing r;
  if (!shape.present()) return r;
  r.ids = bank.adapter_ids;
  r.offsets = bank.offsets;
  r.scales = bank.scales;
  r.rows_per_group = shape.groups > 0 ? static_cast<int>(rows / shape.groups) : 1;
  if (shape.groups == 0) r.ids = nullptr;
  r.adapters = static_cast<int>(shape.adapters);
  r.total_rank = static_cast<int>(shape.total_rank);
  r.max_rank = static_cast<int>(shape.max_rank);
  return r;
}

}  // namespace lora_kernels::cuda::launching
