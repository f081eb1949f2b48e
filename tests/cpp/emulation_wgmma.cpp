// Products of a warpgroup in the emulation: against their definition, in every order, and kernels with one fault each.
#include <vector>

#include "check.h"
#include "cuda/numbers.h"
#include "cuda/primitives/launch.h"
#include "cuda/primitives/tma.h"
#include "cuda/primitives/wgmma.h"
#include "cuda/tile.h"
#include "emulation_orders.h"

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
  kOperandAlongRows,
  kOperandAcrossRows,
  kNearerColumns,
  kLeadingOffset,
  kBaseOffset,
};

struct Params {
  const void* a;  // [64, 64] of T
  const void* b;  // [columns, 64], or [64, columns] with depth across rows
  float* c;       // [64, columns]
};

template <class T, int kColumns, bool kAcross, Fault kFault>
__global__ void warpgroup(const Params p) {
  using A = Tile<T, 64, 64>;
  using B = std::conditional_t<kAcross, Tile<T, 64, 64>, Tile<T, kColumns, 64>>;
  Shared shared;
  char* tiles = shared.take<char>(A::kBytes + kColumns * 128 + 128);
  if (kFault == Fault::kMisplacedTile) tiles += 128;
  load_tile<A, 128>(tiles, matrix<T>(p.a, 64, 64, 64), 0, 0);
  if (kAcross)
    for (int i = 0; i < kColumns / 64; ++i)
      load_tile<B, 128>(tiles + A::kBytes + i * B::kBytes, matrix<T>(p.b, kColumns, 64, kColumns), 0, i * 64);
  else
    load_tile<B, 128>(tiles + A::kBytes, matrix<T>(p.b, 64, kColumns, 64), 0, 0);
  commit_copies();
  if (kFault == Fault::kProxyFenceTooEarly) fence_proxy();
  wait_copies<0>();
  if (kFault != Fault::kNoProxyFence && kFault != Fault::kProxyFenceTooEarly) fence_proxy();
  __syncthreads();
  float c[kColumns / 8][4] = {};
  uint64_t a = wgmma_operand(tiles);
  uint64_t b = kAcross != (kFault == Fault::kOperandAlongRows || kFault == Fault::kOperandAcrossRows)
                   ? wgmma_operand_across(tiles + A::kBytes)
                   : wgmma_operand(tiles + A::kBytes);
  if (kFault == Fault::kNearerColumns) b -= kWgmmaAcrossBytes / 2 >> 4 << 16;
  if (kFault == Fault::kLeadingOffset) b += uint64_t{1} << 16;
  if (kFault == Fault::kBaseOffset) b |= uint64_t{1} << 49;
  if (kFault == Fault::kOtherOperands && threadIdx.x == 70) a += kWgmmaStep;
  for (uint64_t half = 0; half < 2; ++half) {
    if (kFault != Fault::kNoProductsFence) wgmma_fence();
    for (uint64_t step = 2 * half; step < 2 * half + 2; ++step)
      wgmma<T, kColumns, kAcross>(c, a + step * kWgmmaStep, b + step * (kAcross ? kWgmmaStepAcross : kWgmmaStep));
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
template <class T, int kColumns, bool kAcross, Fault kFault>
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
  const Status status = launch<&warpgroup<T, kColumns, kAcross, kFault>>(
      {"warpgroup", dim3(1, 1, 1), dim3(128, 1, 1), (64 + kColumns) * 128 + 128, nullptr}, p);
  *wrong = 0;
  for (int m = 0; m < 64; ++m)
    for (int n = 0; n < kColumns; ++n) {
      float sum = 0;
      for (int k = 0; k < 64; ++k) sum += a[m * 64 + k] * b[kAcross ? k * kColumns + n : n * 64 + k];
      *wrong += !(sum == c[m * kColumns + n]);
    }
  return status;
}

template <class T, int kColumns, bool kAcross>
void expect_right(const char* name) {
  for (Order order : {Order::kForward, Order::kReverse, Order::kShuffled}) {
    emulation::options = {order, 5};
    int wrong = 0;
    const Status status = multiply<T, kColumns, kAcross, Fault::kNone>(&wrong);
    check(status.ok(), std::string(name) + ": " + status.text);
    check(wrong == 0, std::string(name) + ": " + std::to_string(wrong) + " sums are wrong");
  }
}

// With words: a refusal that has them, in every order, else (or if `late`) in some order wrong sums.
template <Fault kFault, bool kAcross = false>
void expect_caught(const char* name, const char* words, bool late = false) {
  expect_in(three_orders(3), name, words, late ? Caught::kInSomeOrder : Caught::kInEveryOrder,
            multiply<__half, 128, kAcross, kFault>);
}

// ---- Boxes

enum class BoxFault { kNone, kNoWait, kNoBarrier, kNothingExpected, kOtherPhase, kMisplaced, kUnfenced };

struct BoxParams {
  TensorMap map;
  int row, column;
  uint32_t* out;  // the box as it lies, 8 rows of 128 bytes
};

template <BoxFault kFault>
__global__ void box(const BoxParams p) {
  Shared shared;
  char* to = shared.take<char>(2048) + (kFault == BoxFault::kMisplaced ? 64 : 0);
  uint64_t* landed = shared.take<uint64_t>(1);
  if (threadIdx.x == 0) {
    if (kFault != BoxFault::kNoBarrier) init_arrivals(landed);
    if (kFault == BoxFault::kUnfenced) store16(to, {{1, 2, 3, 4}});
    fence_arrivals();
    if (kFault != BoxFault::kNothingExpected) expect_bytes(landed, 1024);
    load_box(to, p.map, p.row, p.column, landed);
  }
  __syncthreads();
  if (kFault != BoxFault::kNoWait) wait_for_phase(landed, kFault == BoxFault::kOtherPhase ? 1 : 0);
  if (kFault == BoxFault::kOtherPhase) wait_for_phase(landed, 0), wait_for_phase(landed, 1);
  for (int i = static_cast<int>(threadIdx.x); i < 256; i += 32)
    p.out[i] = read_shared(reinterpret_cast<const uint32_t*>(to) + i);
}

// The rows 3 to 10 and columns 8 to 71 of 9 x 40: zeros from row 9 and column 40 on. How many halves are wrong.
template <BoxFault kFault>
Status load(int* wrong) {
  constexpr int kRows = 9, kColumns = 40, kRow = 3, kColumn = 8;
  Buffer<uint16_t> matrix = Buffer<uint16_t>::aligned(kRows * kColumns);
  for (int i = 0; i < kRows * kColumns; ++i) matrix[i] = static_cast<uint16_t>(i + 1);
  std::vector<uint32_t> out(256, 7);
  BoxParams p{{}, kRow, kColumn, out.data()};
  check(make_tensor_map(&p.map, matrix.get(), false, kRows, kColumns, kColumns * 2, 8), "a map of aligned rows");
  check(!make_tensor_map(&p.map, matrix.get() + 1, false, kRows, kColumns, kColumns * 2, 8),
        "none of a misaligned one");
  check(!make_tensor_map(&p.map, matrix.get(), false, kRows, kColumns, 82, 8), "nor of a misaligned stride");
  check(!make_tensor_map(&p.map, matrix.get(), false, 0, kColumns, kColumns * 2, 8), "nor of no rows");
  const Status status = launch<&box<kFault>>({"box", dim3(1, 1, 1), dim3(32, 1, 1), 4096, nullptr}, p);
  *wrong = 0;
  for (int r = 0; r < 8; ++r)
    for (int c = 0; c < 64; ++c) {
      const int row = kRow + r, column = kColumn + c;
      const int want = row < kRows && column < kColumns ? row * kColumns + column + 1 : 0;
      const int at = r * 64 + (c / 8 ^ r) * 8 + c % 8;  // its chunk of eight is exchanged by the row
      *wrong += static_cast<int>(out[static_cast<size_t>(at / 2)] >> 16 * (at % 2) & 0xFFFF) != want;
    }
  return status;
}

template <BoxFault kFault>
void expect_box(const char* name, const char* words, bool late = false) {
  const Caught caught = kFault == BoxFault::kNone ? Caught::kNever
                        : late                    ? Caught::kInSomeOrder
                                                  : Caught::kInEveryOrder;
  expect_in(three_orders(4), name, words, caught, load<kFault>);
}

void test_boxes() {
  expect_box<BoxFault::kNone>("a box", "");
  expect_box<BoxFault::kNoWait>("a box that nobody waits for", "nothing has written", true);
  expect_box<BoxFault::kNoBarrier>("a box without a barrier", "nobody has made");
  expect_box<BoxFault::kNothingExpected>("bytes that nobody expects", "nothing on its way brings");
  expect_box<BoxFault::kOtherPhase>("a wait for the next phase", "nothing on its way brings");
  expect_box<BoxFault::kUnfenced>("a box over what a thread wrote", "has not fenced for its proxy");
  expect_box<BoxFault::kMisplaced>("a box between lines of 128 bytes", "multiple of 128");
}

}  // namespace

void test_wgmma() {
  test_boxes();
  expect_right<__half, 128, false>("wgmma fp16, 128 columns");
  expect_right<__half, 256, false>("wgmma fp16, 256 columns");
  expect_right<__nv_bfloat16, 128, false>("wgmma bf16, 128 columns");
  expect_right<__nv_bfloat16, 256, false>("wgmma bf16, 256 columns");
  expect_right<__half, 128, true>("wgmma fp16, 128 columns across depth");
  expect_right<__half, 256, true>("wgmma fp16, 256 columns across depth");
  expect_right<__nv_bfloat16, 128, true>("wgmma bf16, 128 columns across depth");
  expect_right<__nv_bfloat16, 256, true>("wgmma bf16, 256 columns across depth");
  expect_caught<Fault::kNoProxyFence>("no proxy fence", "has not fenced for its proxy");
  // Copies that have landed at once were seen by the fence.
  expect_caught<Fault::kProxyFenceTooEarly>("a proxy fence before the wait", "has not fenced for its proxy", true);
  expect_caught<Fault::kNoProductsFence>("no fence of the products", "wgmma without wgmma_fence()");
  expect_caught<Fault::kNoWait>("no wait", "", true);
  expect_caught<Fault::kWaitTooWeak>("a wait for too few", "", true);
  expect_caught<Fault::kTileReplaced>("a tile replaced too early", "", true);
  expect_caught<Fault::kMisplacedTile>("a tile between multiples of 1024", "multiple of 1024 bytes");
  expect_caught<Fault::kOtherOperands>("lanes with other operands", "different operands");
  expect_caught<Fault::kOperandAcrossRows>("columns that lie across depth, read along it", "depth lies along rows");
  expect_caught<Fault::kOperandAlongRows, true>("columns that lie along depth, read across it", "multiples of 1024");
  expect_caught<Fault::kNearerColumns, true>("the next columns where half of the first are", "");
  expect_caught<Fault::kLeadingOffset, true>("a leading offset between rows", "multiples of 1024");
  expect_caught<Fault::kBaseOffset, true>("a base offset", "128-byte swizzle alone");
  expect_caught<Fault::kNoProxyFence, true>("no proxy fence of columns across depth", "has not fenced for its proxy");
}
