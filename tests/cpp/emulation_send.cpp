// Blocks of a cluster that send each other sixteen bytes at a time and add up what has come: right in every order, and
// with one fault each.
#include <string>
#include <vector>

#include "check.h"
#include "cuda/primitives/copy.h"
#include "cuda/primitives/launch.h"
#include "cuda/primitives/tma.h"
#include "cuda/primitives/wgmma.h"
#include "emulation_orders.h"

using namespace lora_kernels;
using namespace lora_kernels::cuda;

namespace {

enum class Fault {
  kNone,
  kExpectedLate,  // which is none
  kNoWait,
  kNoBarrierBefore,
  kNothingMade,
  kSendsLess,
  kSendsMore,
  kSendsMoreLate,
  kOtherBlock,
  kOneToOther,
  kOutside,
  kMisaligned,
  kNotShared,
  kLeavesEarly,
  kSharesBox,
  kBoxOver,
  kBoxOverFenced,  // which is none
};

constexpr unsigned kThreads = 64, kPart = kThreads * 4;  // words
constexpr int kPartBytes = kPart * 4;

struct Params {
  TensorMap map;
  uint32_t* out;  // [blocks, kPart]
};

// What thread `t` of block `from` has for `to`.
__device__ inline uint32_t word(unsigned from, unsigned to, unsigned t, unsigned i) {
  return (from * 64 + to * 8 + 1) * 4096 + t * 4 + i;
}

template <Fault kFault, unsigned kBlocks>
__global__ void parts(const Params p) {
  Shared shared;
  uint32_t* parts = shared.take<uint32_t>(kBlocks * kPart);
  uint64_t *landed = shared.take<uint64_t>(1), *box = shared.take<uint64_t>(1);
  const unsigned rank = rank_in_cluster(kBlocks), t = threadIdx.x, first = blockIdx.x - rank;
  const bool odd_one = rank == 1 && t == 5;
  if (t == 0 && !(kFault == Fault::kNothingMade && rank == 2)) {
    init_arrivals(landed);
    init_arrivals(box);
    fence_arrivals();
    if (kFault != Fault::kExpectedLate) expect_bytes(landed, static_cast<int>(kBlocks) * kPartBytes);
  }
  arrive_in_cluster();
  if (kFault != Fault::kNoBarrierBefore) wait_for_cluster();
  if (kFault == Fault::kSharesBox) share_box(parts, p.map, 0, 0, landed);
  for (unsigned to = 0; to < kBlocks; ++to) {
    if (kFault == Fault::kSendsLess && odd_one && to == 2) continue;
    uint32_t* place = parts + rank * kPart + t * 4;
    const Vector v = {{word(first + rank, to, t, 0), word(first + rank, to, t, 1), word(first + rank, to, t, 2),
                       word(first + rank, to, t, 3)}};
    unsigned block = kFault == Fault::kOtherBlock ? (to + 1) % kBlocks : to;
    if (kFault == Fault::kOneToOther && odd_one && to == 2) block = 3;
    if (kFault == Fault::kOutside && odd_one && to == 3) block = kBlocks;
    if (kFault == Fault::kNotShared && odd_one && to == 3) place = p.out;
    send16(kFault == Fault::kMisaligned && odd_one ? place + 1 : place, v, landed, block);
    if (kFault == Fault::kSendsMore && odd_one && to == 2) send16(place, v, landed, block);
  }
  if (kFault == Fault::kExpectedLate && t == 0) expect_bytes(landed, static_cast<int>(kBlocks) * kPartBytes);
  if (kFault == Fault::kLeavesEarly && rank == 1) return;
  if (kFault != Fault::kNoWait) wait_for_phase(landed, 0);
  if (kFault == Fault::kSendsMoreLate) {  // than its phase counts, which is over, to a block that is still there
    arrive_in_cluster();
    wait_for_cluster();
    if (odd_one) send16(parts + rank * kPart + t * 4, load16(parts + rank * kPart + t * 4), landed, 2);
    arrive_in_cluster();
    wait_for_cluster();
  }
  const unsigned other = t ^ 33;  // what other threads have sent, of another warp
  uint32_t sums[4] = {};
  for (unsigned from = 0; from < kBlocks; ++from)
    for (unsigned i = 0; i < 4; ++i) sums[i] += read_shared(parts + from * kPart + other * 4 + i);
  for (unsigned i = 0; i < 4; ++i) p.out[blockIdx.x * kPart + other * 4 + i] = sums[i];
  if (kFault == Fault::kNoBarrierBefore) wait_for_cluster();
  if (kFault == Fault::kBoxOver || kFault == Fault::kBoxOverFenced) {
    if (kFault == Fault::kBoxOverFenced) fence_proxy();
    __syncthreads();
    if (t == 0) {
      expect_bytes(box, kPartBytes);
      load_box(parts, p.map, 0, 0, box);
    }
    wait_for_phase(box, 0);
  }
}

// How many sums of the blocks of two clusters are wrong.
template <Fault kFault, unsigned kBlocks = 4>
Status add_up(int* wrong) {
  std::vector<uint32_t> out(2 * kBlocks * kPart);
  Buffer<uint16_t> matrix = Buffer<uint16_t>::aligned(8 * 64);
  Params p{{}, out.data()};
  check(make_tensor_map(&p.map, matrix.get(), false, 8, 64, 128, 8), "a map");
  Launch l{"parts", dim3(2 * kBlocks, 1, 1), dim3(kThreads, 1, 1), kBlocks * kPartBytes + 32, nullptr};
  l.cluster = kBlocks;
  const Status status = launch<&parts<kFault, kBlocks>>(l, p);
  *wrong = 0;
  for (unsigned at = 0; at < out.size(); ++at) {
    const unsigned block = at / kPart, rank = block % kBlocks;
    uint32_t sum = 0;
    for (unsigned from = 0; from < kBlocks; ++from) sum += word(block - rank + from, rank, at % kPart / 4, at % 4);
    *wrong += out[at] != sum;
  }
  return status;
}

// By the same words in each order.
template <Fault kFault, unsigned kBlocks = 4>
void expect(const char* name, const char* words) {
  for (const InOrder& in : kFiveOrders) expect_in({in}, name, words, Caught::kInEveryOrder, add_up<kFault, kBlocks>);
}

}  // namespace

void test_send() {
  expect_in(kFiveOrders, "parts of two blocks", "", Caught::kNever, add_up<Fault::kNone, 2>);
  expect_in(kFiveOrders, "parts of four blocks", "", Caught::kNever, add_up<Fault::kNone, 4>);
  expect_in(kFiveOrders, "parts of eight blocks", "", Caught::kNever, add_up<Fault::kNone, 8>);
  expect_in(kFiveOrders, "parts that are expected late", "", Caught::kNever, add_up<Fault::kExpectedLate>);
  expect_in(kFiveOrders, "nine blocks", "in clusters of 9", Caught::kInEveryOrder, add_up<Fault::kNone, 9>);
  expect<Fault::kNoWait>("sums before the parts have come", "nothing has written");
  expect<Fault::kNoBarrierBefore>("parts for a block that has not begun", "nobody has made");
  expect<Fault::kNothingMade>("parts for a barrier that is none", "nobody has made");
  expect<Fault::kSendsLess>("a part that nobody sends", "deadlock");
  expect<Fault::kSendsLess, 8>("a part that nobody sends, of eight blocks", "deadlock");
  // A phase is over with the bytes that it expects, whichever they are: a part is read before it has come.
  expect<Fault::kSendsMore>("a part that is sent twice", "nothing has written");
  expect<Fault::kOneToOther>("a part for another block", "nothing has written");
  expect<Fault::kOtherBlock>("each block's parts for the next one", "");  // as many as are expected: wrong sums alone
  expect<Fault::kOutside>("parts for a block outside the cluster", "not of its cluster");
  expect<Fault::kOutside, 8>("parts for a ninth block", "not of its cluster");
  expect<Fault::kMisaligned>("a misaligned place", "no multiple of 16");
  expect<Fault::kNotShared>("a place in global memory", "outside shared memory");
  expect<Fault::kSharesBox>("a box for two blocks in a cluster of four", "a box for 2 blocks");
  expect<Fault::kBoxOver>("a box over parts", "over what another block sent");
  expect_in(kFiveOrders, "a box over parts, fenced", "", Caught::kNever, add_up<Fault::kBoxOverFenced>);
  // At their wait, they are still on their way; at once, they come too late.
  const std::vector<InOrder> late = {{emulation::Order::kForward, 1}}, at_once = {{emulation::Order::kReverse, 1}};
  expect_in(late, "a block that ends before parts have landed", "ends while boxes, or bytes of another block",
            Caught::kInEveryOrder, add_up<Fault::kLeavesEarly>);
  expect_in(at_once, "parts for a block that has ended", "sends to a block that has ended", Caught::kInEveryOrder,
            add_up<Fault::kLeavesEarly>);
  expect_in(late, "a part that nobody waits for", "ends while boxes, or bytes of another block", Caught::kInEveryOrder,
            add_up<Fault::kSendsMoreLate>);
  expect_in(at_once, "a part that nobody expects", "ends with more bytes", Caught::kInEveryOrder,
            add_up<Fault::kSendsMoreLate>);
  expect_in(kFiveOrders, "parts more than a phase counts", "", Caught::kInEveryOrder, add_up<Fault::kSendsMoreLate>);
}
