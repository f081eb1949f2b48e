// INT8 products of a warpgroup in the emulation, whose left operand is in registers, and boxes of planes of bytes:
// against their definition, in every order, and kernels with one fault each.
#include <vector>

#include "check.h"
#include "cuda/primitives/launch.h"
#include "cuda/primitives/tma.h"
#include "cuda/primitives/wgmma_int8.h"
#include "emulation_orders.h"

using namespace lora_kernels;
using namespace lora_kernels::cuda;

namespace {

using emulation::Order;

// What a kernel leaves out, or does wrongly.
enum class Fault {
  kNone,
  kNoProductsFence,
  kNoWait,
  kWaitTooWeak,
  kRegistersReplaced,
  kRegistersReplacedByOne,
  kRowsReplaced,
  kNothingWritten,
  kOtherOperands,
  kOneLaneLess,
};

constexpr int kDepth = 64;  // two steps

struct Params {
  const int8_t* a;  // [64, kDepth]
  TensorMap b;      // [kRows, kDepth]
  int32_t* c;       // [64, kRows]
};

template <int kRows, Fault kFault>
__global__ void integers(const Params p) {
  Shared shared;
  char* tile = shared.take<char>(kRows * 128);
  uint64_t* landed = shared.take<uint64_t>(1);
  const int thread = static_cast<int>(threadIdx.x), g = thread % 32 / 4, t = thread % 4, row = thread / 32 * 16 + g;
  if (thread == 0) {
    init_arrivals(landed);
    fence_arrivals();
    if (kFault != Fault::kNothingWritten) {
      expect_bytes(landed, kRows * 128);
      load_planes(tile, p.b, 0, 0, 0, landed);
    }
  }
  __syncthreads();
  if (kFault != Fault::kNothingWritten) wait_for_phase(landed, 0);
  if (kFault == Fault::kOneLaneLess && thread == 37) return;
  uint32_t words[2][4];
  int32_t c[kRows / 8][4] = {};
  uint64_t b = wgmma_operand(tile);
  if (kFault == Fault::kOtherOperands && thread == 70) b += kWgmmaStep;
  for (int step = 0; step < kDepth / 32; ++step) {
    uint32_t (&a)[4] = words[kFault == Fault::kRegistersReplaced ? 0 : step];
    for (int i = 0; i < 4; ++i)
      memcpy(&a[i], p.a + (row + i % 2 * 8) * kDepth + step * 32 + i / 2 * 16 + t * 4, sizeof a[i]);
    if (kFault != Fault::kNoProductsFence) wgmma_fence();
    wgmma_s8<kRows>(c, a, b + static_cast<uint64_t>(step) * kWgmmaStep);
    commit_products();
  }
  if (kFault == Fault::kRegistersReplacedByOne && thread == 77) words[1][2] ^= 0x100;
  if (kFault == Fault::kRowsReplaced) memset(tile + thread * 16, 0, 16);
  if (kFault == Fault::kWaitTooWeak)
    wait_products<1>();
  else if (kFault != Fault::kNoWait)
    wait_products<0>();
  for (int j = 0; j < kRows / 8; ++j)
    for (int e = 0; e < 4; ++e) p.c[(row + e / 2 * 8) * kRows + j * 8 + t * 2 + e % 2] = c[j][e];
}

// How many of the sums are wrong, or the refusal.
template <int kRows, Fault kFault>
Status multiply(int* wrong) {
  Buffer<int8_t> a = Buffer<int8_t>::aligned(64 * kDepth), b = Buffer<int8_t>::aligned(kRows * kDepth);
  std::vector<int32_t> c(64 * kRows, 1 << 30);
  for (int64_t i = 0; i < a.size(); ++i) a[i] = static_cast<int8_t>(generator()() % 255 - 127);
  for (int64_t i = 0; i < b.size(); ++i) b[i] = static_cast<int8_t>(generator()() % 255 - 127);
  Params p{a.get(), {}, c.data()};
  check(make_tensor_map(&p.b, BytePlanes{b.get(), 1, kRows, kDepth, kRows * kDepth, kDepth}, 1, kRows), "a map");
  const Status status =
      launch<&integers<kRows, kFault>>({"integers", dim3(1, 1, 1), dim3(128, 1, 1), kRows * 128 + 16, nullptr}, p);
  *wrong = 0;
  for (int m = 0; m < 64; ++m)
    for (int n = 0; n < kRows; ++n) {
      int32_t sum = 0;
      for (int k = 0; k < kDepth; ++k) sum += a[m * kDepth + k] * b[n * kDepth + k];
      *wrong += sum != c[static_cast<size_t>(m * kRows + n)];
    }
  return status;
}

// kNone: right in every order. With words: a refusal that has them, in every order; else, or if `late`, wrong sums in
// some order.
template <Fault kFault, int kRows = 128>
void expect(const char* name, const char* words, bool late = false) {
  const Caught caught = kFault == Fault::kNone ? Caught::kNever : late ? Caught::kInSomeOrder : Caught::kInEveryOrder;
  expect_in(kFiveOrders, name, words, caught, multiply<kRows, kFault>);
}

// ---- Boxes of planes

struct PlanesParams {
  TensorMap map;
  int8_t* out;  // the box as it lies: 2 planes of 8 rows of 128 bytes
};

__global__ void planes(const PlanesParams p) {
  Shared shared;
  char* to = shared.take<char>(2048);
  uint64_t* landed = shared.take<uint64_t>(1);
  if (threadIdx.x == 0) {
    init_arrivals(landed);
    fence_arrivals();
    expect_bytes(landed, 2048);
    load_planes(to, p.map, 2, 6, 16, landed);
  }
  __syncthreads();
  wait_for_phase(landed, 0);
  for (int i = static_cast<int>(threadIdx.x); i < 2048; i += 32) p.out[i] = static_cast<int8_t>(to[i]);
}

// Planes 2 and 3, rows 6 to 13 and bytes 16 to 143 of 3 planes of 11 rows of 100 bytes: zeros beyond each of them.
void test_planes() {
  constexpr int kPlanes = 3, kRowsOfPlane = 11, kBytes = 100, kStride = 112, kPlaneStride = 12 * kStride;
  Buffer<int8_t> data = Buffer<int8_t>::aligned(kPlanes * kPlaneStride);
  for (int64_t i = 0; i < data.size(); ++i) data[i] = static_cast<int8_t>(generator()() | 1);
  const BytePlanes all{data.get(), kPlanes, kRowsOfPlane, kBytes, kPlaneStride, kStride};
  PlanesParams p{};
  check(make_tensor_map(&p.map, all, 2, 8), "a map of planes");
  const auto refused = [&](BytePlanes changed, const char* what) {
    TensorMap none{};
    check(!make_tensor_map(&none, changed, 2, 8), std::string("no map: ") + what);
  };
  refused({data.get() + 8, kPlanes, kRowsOfPlane, kBytes, kPlaneStride, kStride}, "a misaligned address");
  refused({data.get(), kPlanes, kRowsOfPlane, kBytes, kPlaneStride, 104}, "a misaligned stride");
  refused({data.get(), kPlanes, kRowsOfPlane, kBytes, kPlaneStride + 16, kStride}, "a plane between rows");
  refused({data.get(), 0, kRowsOfPlane, kBytes, kPlaneStride, kStride}, "no planes");
  refused({data.get(), kPlanes, kRowsOfPlane, 0, kPlaneStride, kStride}, "no bytes");
  for (Order order : {Order::kForward, Order::kReverse, Order::kShuffled}) {
    emulation::options = {order, 4};
    std::vector<int8_t> out(2048, 7);
    p.out = out.data();
    const Status status = launch<&planes>({"planes", dim3(1, 1, 1), dim3(32, 1, 1), 4096, nullptr}, p);
    check(status.ok(), status.text);
    int wrong = 0;
    for (int r = 0; r < 16; ++r)
      for (int c = 0; c < 128; ++c) {
        const int plane = 2 + r / 8, row = 6 + r % 8, column = 16 + c;
        const bool inside = plane < kPlanes && row < kRowsOfPlane && column < kBytes;
        const int want = inside ? data[plane * kPlaneStride + row * kStride + column] : 0;
        wrong += out[static_cast<size_t>(r * 128 + (c / 16 ^ r % 8) * 16 + c % 16)] != want;
      }
    check(wrong == 0, "planes: " + std::to_string(wrong) + " bytes are wrong");
  }
}

}  // namespace

void test_wgmma_int8() {
  test_planes();
  expect<Fault::kNone>("integers", "");
  expect<Fault::kNone, 160>("integers, 160 columns", "");
  expect<Fault::kNone, 256>("integers, 256 columns", "");
  expect<Fault::kNoProductsFence>("no fence of the products", "wgmma without wgmma_fence()");
  // What is made at once has read its registers, and left its sums.
  expect<Fault::kNoWait>("no wait", "", true);
  expect<Fault::kWaitTooWeak>("a wait for too few", "", true);
  expect<Fault::kRegistersReplaced>("registers replaced too early", "", true);
  expect<Fault::kRegistersReplacedByOne>("one lane's registers replaced too early", "", true);
  expect<Fault::kRowsReplaced>("rows replaced too early", "", true);
  expect<Fault::kNothingWritten>("rows that nobody asked for", "nothing has written");
  expect<Fault::kOtherOperands>("lanes with other operands", "different operands");
  expect<Fault::kOneLaneLess>("a warp without one of its lanes", "names a thread that has exited");
}
