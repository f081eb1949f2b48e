// Clusters in the emulation: blocks that bring boxes to each other, right in every order, and with one fault each.
#include <vector>

#include "check.h"
#include "cuda/primitives/cluster.h"
#include "cuda/primitives/launch.h"
#include "cuda/primitives/tma.h"
#include "emulation_orders.h"

using namespace lora_kernels;
using namespace lora_kernels::cuda;

namespace {

enum class Fault {
  kNone,
  kNoBarrierBefore,
  kFilledWhileItIsRead,
  kOtherPhase,
  kArrivesAtItself,
  kArrivesTwice,
  kNothingSent,
  kLeavesEarly,
  kLeavesBoxes,
  kWaitsAlone,
  kArrivesAgain,
};

constexpr int kSteps = 7, kPlaces = 2, kRows = 16, kWords = kRows * 32;  // a step is 16 rows of 128 bytes

struct Params {
  TensorMap map;
  uint32_t* out;  // [blocks, kSteps, kWords], steps as they lie
};

template <Fault kFault>
__global__ void shared_steps(const Params p) {
  Shared shared;
  char* places = shared.take<char>(kPlaces * kWords * 4);
  uint64_t *landed = shared.take<uint64_t>(kPlaces), *free = shared.take<uint64_t>(kPlaces);
  const bool first = threadIdx.x == 0;
  const unsigned rank = rank_in_cluster();
  const auto fetch = [&](int k) {
    const int place = k % kPlaces, turn = k / kPlaces;
    expect_bytes(landed + place, kWords * 4);
    if (turn > 0) {
      arrive(free + place, kFault == Fault::kArrivesAtItself ? rank : 0);
      arrive(free + place, kFault == Fault::kArrivesAtItself ? rank : 1);
      if (kFault == Fault::kArrivesTwice) arrive(free + place, rank);
      if (kFault != Fault::kFilledWhileItIsRead)
        wait_for_phase(free + place, (kFault == Fault::kOtherPhase ? turn : turn - 1) & 1);
    }
    if (kFault == Fault::kNothingSent && rank == 1 && k == 4) return;
    share_box(places + place * kWords * 4 + rank * (kWords * 2), p.map, k * kRows + static_cast<int>(rank) * kRows / 2,
              0, landed + place);
  };
  if (first) {
    for (int i = 0; i < kPlaces; ++i) {
      init_arrivals(landed + i);
      init_arrivals(free + i, kClusterBlocks);
    }
    fence_arrivals();
  }
  if (kFault != Fault::kWaitsAlone) arrive_in_cluster();
  if (kFault == Fault::kArrivesAgain) arrive_in_cluster();
  if (kFault != Fault::kNoBarrierBefore) wait_for_cluster();
  for (int k = 0; first && k < kPlaces; ++k) fetch(k);
  if (kFault == Fault::kLeavesEarly && rank == 1) return;
  for (int k = 0; k < kSteps - (kFault == Fault::kLeavesBoxes ? 1 : 0); ++k) {
    __syncthreads();
    wait_for_phase(landed + k % kPlaces, k / kPlaces & 1);
    const uint32_t* step = reinterpret_cast<const uint32_t*>(places) + k % kPlaces * kWords;
    for (int i = static_cast<int>(threadIdx.x); i < kWords; i += 32)
      p.out[(static_cast<int>(blockIdx.x) * kSteps + k) * kWords + i] = read_shared(step + i);
    __syncthreads();
    if (first && k + kPlaces < kSteps) fetch(k + kPlaces);
  }
  if (kFault == Fault::kNoBarrierBefore) wait_for_cluster();
  arrive_in_cluster();
  wait_for_cluster();
}

// How many words of the blocks of two clusters are wrong: each has read all steps, of which it asked for half.
template <Fault kFault>
Status share(int* wrong) {
  constexpr int kBlocks = 4, kColumns = 64;
  Buffer<uint16_t> matrix = Buffer<uint16_t>::aligned(kSteps * kRows * kColumns);
  for (int64_t i = 0; i < matrix.size(); ++i) matrix[i] = static_cast<uint16_t>(i + 1);
  std::vector<uint32_t> out(kBlocks * kSteps * kWords);
  Params p{{}, out.data()};
  check(make_tensor_map(&p.map, matrix.get(), false, kSteps * kRows, kColumns, kColumns * 2, kRows / 2), "a map");
  Launch l{"shared_steps", dim3(kBlocks, 1, 1), dim3(32, 1, 1), kPlaces * kWords * 4 + 64, nullptr};
  l.cluster = kClusterBlocks;
  const Status status = launch<&shared_steps<kFault>>(l, p);
  *wrong = 0;
  for (size_t i = 0; i < out.size(); ++i) {
    const int word = static_cast<int>(i) % (kSteps * kWords), row = word / 32 % 8, at = word ^ row << 2;
    *wrong += out[i] != static_cast<uint32_t>(2 * at + 1) + (static_cast<uint32_t>(2 * at + 2) << 16);
  }
  return status;
}

// `late`: caught in some order. Others are caught in all.
template <Fault kFault>
void expect(const char* name, const char* words, bool late = false) {
  const Caught caught = kFault == Fault::kNone ? Caught::kNever : late ? Caught::kInSomeOrder : Caught::kInEveryOrder;
  expect_in(kFiveOrders, name, words, caught, share<kFault>);
}

void test_what_is_launched() {
  Params p{};
  Launch l{"shared_steps", dim3(3, 1, 1), dim3(32, 1, 1), 0, nullptr};
  l.cluster = kClusterBlocks;
  const Status status = launch<&shared_steps<Fault::kNone>>(l, p);
  check(!status.ok() && contains(status.text, "in clusters of 2"), "three blocks are no clusters: " + status.text);
}

}  // namespace

void test_cluster() {
  expect<Fault::kNone>("boxes for both blocks", "");
  expect<Fault::kNoBarrierBefore>("boxes for a block that has not begun", "nobody has made");
  expect<Fault::kFilledWhileItIsRead>("a place that the other block reads", "", true);
  expect<Fault::kOtherPhase>("a wait for another phase", "", true);
  expect<Fault::kArrivesAtItself>("arrivals of one block alone", "", true);
  expect<Fault::kArrivesTwice>("a block that arrives twice", "");
  expect<Fault::kNothingSent>("a box that nobody sends", "deadlock");
  expect<Fault::kLeavesEarly>("a block that ends before the other is done", "shared memory");
  expect<Fault::kLeavesBoxes>("a block that ends before its boxes have landed", "ends while boxes", true);
  expect<Fault::kWaitsAlone>("a wait without an arrival", "before it has arrived");
  expect<Fault::kArrivesAgain>("arrivals in turn", "again before it has waited");
  test_what_is_launched();
}
