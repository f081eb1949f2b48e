// Products of a warpgroup in the emulation: against their definition, in every order, and kernels with one fault each.
#include <vector>

#include "check.h"
#include "cuda/numbers.h"
#include "cuda/primitives/launch.h"
#include "cuda/primitives/wgmma.h"
#include "cuda/tile.h"

using namespace lora_kernels;
using namespace lora_kernels::cuda;

namespace {

using emulation::Order;

// What a kernel leaves out, or does wrongly.
enum class Fault {
  kNone,
  kNoProxyFence,
  kProxyFenceTooEarly,
  kNoProductsFence,
  kNoWait,
  kWaitTooWeak,
  kTileReplaced,
  kMisplacedTile,
  kOtherOperands,
};

struct Params {
  const void* a;  // [64, 64] of T
  const void* b;  // [columns, 64]
  float* c;       // [64, columns]
};

template <class T, int kColumns, Fault kFault>
__global__ void warpgroup(const Params p) {
  using A = Tile<T, 64, 64>;
  using B = Tile<T, kColumns, 64>;
  Shared shared;
  char* tiles = shared.take<char>(A::kBytes + B::kBytes + 128);
  if (kFault == Fault::kMisplacedTile) tiles += 128;
  load_tile<A, 128>(tiles, matrix<T>(p.a, 64, 64, 64), 0, 0);
  load_tile<B, 128>(tiles + A::kBytes, matrix<T>(p.b, 64, kColumns, 64), 0, 0);
  commit_copies();
  if (kFault == Fault::kProxyFenceTooEarly) fence_proxy();
  wait_copies<0>();
  if (kFault != Fault::kNoProxyFence && kFault != Fault::kProxyFenceTooEarly) fence_proxy();
  __syncthreads();
  float c[kColumns / 8][4] = {};
  uint64_t a = wgmma_operand(tiles);
  const uint64_t b = wgmma_operand(tiles + A::kBytes);
  if (kFault == Fault::kOtherOperands && threadIdx.x == 70) a += kWgmmaStep;
  for (uint64_t half = 0; half < 2; ++half) {
    if (kFault != Fault::kNoProductsFence) wgmma_fence();
    for (uint64_t step = 2 * half; step < 2 * half + 2; ++step)
      wgmma<T, kColumns>(c, a + step * kWgmmaStep, b + step * kWgmmaStep);
    commit_products();
  }
  if (kFault == Fault::kTileReplaced) store16(tiles + threadIdx.x * 16, {{0, 0, 0, 0}});
  if (kFault == Fault::kWaitTooWeak)
    wait_products<1>();
  else if (kFault != Fault::kNoWait)
    wait_products<0>();
  const int row = static_cast<int>(threadIdx.x) / 32 * 16 + lane_of_warp() / 4;
  for (int j = 0; j < kColumns / 8; ++j)
    for (int e = 0; e < 4; ++e) p.c[(row + e / 2 * 8) * kColumns + j * 8 + lane_of_warp() % 4 * 2 + e % 2] = c[j][e];
}

// Runs it on small integers; how many of the sums are wrong, or the refusal.
template <class T, int kColumns, Fault kFault>
Status multiply(int* wrong) {
  std::vector<float> a(64 * 64), b(kColumns * 64), c(64 * kColumns, NAN);
  for (float& v : a) v = static_cast<float>(static_cast<int>(generator()() % 17) - 8);
  for (float& v : b) v = static_cast<float>(static_cast<int>(generator()() % 17) - 8);
  const auto stored = [](const std::vector<float>& from) {
    Buffer<T> out = Buffer<T>::aligned(static_cast<int64_t>(from.size()));
    for (size_t i = 0; i < from.size(); ++i) out[static_cast<int64_t>(i)] = from_float<T>(from[i]);
    return out;
  };
  Buffer<T> a_stored = stored(a), b_stored = stored(b);
  const Params p{a_stored.get(), b_stored.get(), c.data()};
  const Status status = launch<&warpgroup<T, kColumns, kFault>>(
      {"warpgroup", dim3(1, 1, 1), dim3(128, 1, 1), (64 + kColumns) * 128 + 128, nullptr}, p);
  *wrong = 0;
  for (int m = 0; m < 64; ++m)
    for (int n = 0; n < kColumns; ++n) {
      float sum = 0;
      for (int k = 0; k < 64; ++k) sum += a[m * 64 + k] * b[n * 64 + k];
      *wrong += !(sum == c[m * kColumns + n]);
    }
  return status;
}

template <class T, int kColumns>
void expect_right(const char* name) {
  for (Order order : {Order::kForward, Order::kReverse, Order::kShuffled}) {
    emulation::options = {order, 5};
    int wrong = 0;
    const Status status = multiply<T, kColumns, Fault::kNone>(&wrong);
    check(status.ok(), std::string(name) + ": " + status.text);
    check(wrong == 0, std::string(name) + ": " + std::to_string(wrong) + " sums are wrong");
  }
}

// With words: a refusal that has them, in every order, else (or if `late`) in some order wrong sums.
template <Fault kFault>
void expect_caught(const char* name, const char* words, bool late = false) {
  int caught = 0, orders = 0;
  std::string text;
  for (Order order : {Order::kForward, Order::kReverse, Order::kShuffled}) {
    emulation::options = {order, 3};
    int wrong = 0;
    const Status status = multiply<__half, 128, kFault>(&wrong);
    if (!status.ok()) text = status.text;
    caught += !status.ok() || wrong > 0;
    ++orders;
  }
  check(late ? caught > 0 : caught == orders,
        std::string(name) + ": caught in " + std::to_string(caught) + " of " + std::to_string(orders) + " orders");
  check(contains(text, words), std::string(name) + ": '" + words + "' is in: " + text);
}

}  // namespace

void test_wgmma() {
  expect_right<__half, 128>("wgmma fp16, 128 columns");
  expect_right<__half, 256>("wgmma fp16, 256 columns");
  expect_right<__nv_bfloat16, 128>("wgmma bf16, 128 columns");
  expect_right<__nv_bfloat16, 256>("wgmma bf16, 256 columns");
  expect_caught<Fault::kNoProxyFence>("no proxy fence", "has not fenced for its proxy");
  // Copies that have landed at once were seen by the fence.
  expect_caught<Fault::kProxyFenceTooEarly>("a proxy fence before the wait", "has not fenced for its proxy", true);
  expect_caught<Fault::kNoProductsFence>("no fence of the products", "wgmma without wgmma_fence()");
  expect_caught<Fault::kNoWait>("no wait", "", true);
  expect_caught<Fault::kWaitTooWeak>("a wait for too few", "", true);
  expect_caught<Fault::kTileReplaced>("a tile replaced too early", "", true);
  expect_caught<Fault::kMisplacedTile>("a tile between multiples of 1024", "multiple of 1024 bytes");
  expect_caught<Fault::kOtherOperands>("lanes with other operands", "different operands");
}
