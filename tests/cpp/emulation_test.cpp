// The emulation of CUDA's execution model: primitives against what they are defined to do, in every order of threads,
// and small kernels with one fault each, which must be refused with a text that says where. (Faults planted in the real
// kernels: tests/cuda/test_emulation.py.)
#include <cmath>
#include <vector>

#include "check.h"
#include "cuda/numbers.h"
#include "cuda/primitives/launch.h"

using namespace lora_kernels;
using namespace lora_kernels::cuda;

void test_activations();  // emulation_activation.cpp
void test_cluster();      // emulation_cluster.cpp
void test_send();         // emulation_send.cpp
void test_wgmma();        // emulation_wgmma.cpp
void test_wgmma_int8();   // emulation_wgmma_int8.cpp

namespace {

using emulation::Order;

struct Words {
  const uint32_t* in;
  uint32_t* out;
  int count;
};

template <auto kKernel>
Status run(const Words& p, unsigned threads, size_t shared = 0, unsigned blocks = 1) {
  return launch<kKernel>({"test kernel", dim3(blocks, 1, 1), dim3(threads, 1, 1), shared, nullptr}, p);
}

// ---- Faults

__global__ void diverging_barriers(const Words p) {
  if (threadIdx.x < 64)
    __syncthreads();
  else
    __syncthreads();
  p.out[threadIdx.x] = 1;
}
__global__ void barrier_in_a_branch(const Words p) {
  if (threadIdx.x < 64) __syncthreads();
  p.out[threadIdx.x] = __shfl_xor_sync(~0u, p.in[threadIdx.x], 1);
  if (threadIdx.x >= 64) __syncthreads();
}
__global__ void lane_that_exited(const Words p) {
  if (threadIdx.x == 5) return;
  p.out[threadIdx.x] = __shfl_xor_sync(~0u, p.in[threadIdx.x], 1);
}
__global__ void different_collectives(const Words p) {
  if (threadIdx.x % 32 < 16)
    __syncwarp();
  else
    p.out[threadIdx.x] = __shfl_xor_sync(~0u, p.in[threadIdx.x], 1);
}
__global__ void lane_outside_its_mask(const Words p) {
  p.out[threadIdx.x] = __shfl_sync(0xFFFFu, p.in[threadIdx.x], 0);
}
__global__ void misaligned_load(const Words p) { p.out[threadIdx.x] = load16(p.in + threadIdx.x).v[0]; }
__global__ void misaligned_store(const Words p) { store16(p.out + threadIdx.x, {{1, 2, 3, 4}}); }
__global__ void misaligned_copy(const Words p) {
  Shared shared;
  copy16_async(shared.take<uint32_t>(64) + 4 * threadIdx.x, p.in + 1, 16);
}
__global__ void misaligned_ldmatrix(const Words p) {
  Shared shared;
  uint32_t* words = shared.take<uint32_t>(256);
  for (int i = static_cast<int>(threadIdx.x); i < 256; i += 32) words[i] = 1;
  __syncwarp();
  uint32_t r[4];
  ldmatrix(r, words + 4 * threadIdx.x + 1);
  p.out[threadIdx.x] = r[0];
}
__global__ void unwritten_ldmatrix(const Words p) {
  Shared shared;
  uint32_t* words = shared.take<uint32_t>(128);
  for (int i = static_cast<int>(threadIdx.x); i < 127; i += 32) words[i] = 1;
  __syncwarp();
  uint32_t r[4];
  ldmatrix(r, words + 4 * threadIdx.x);
  p.out[threadIdx.x] = r[0];
}
__global__ void unwritten_word(const Words p) {
  Shared shared;
  p.out[threadIdx.x] = read_shared(shared.take<uint32_t>(32) + threadIdx.x);
}
__global__ void too_much_shared(const Words p) {
  Shared shared;
  p.out[threadIdx.x] = shared.take<uint32_t>(100000)[0];
}
__global__ void missing_barrier(const Words p) {  // thread i reads what thread i + 1 writes
  Shared shared;
  uint32_t* words = shared.take<uint32_t>(64);
  words[threadIdx.x] = p.in[threadIdx.x];
  p.out[threadIdx.x] = read_shared(words + (threadIdx.x + 1) % 64);
}
__global__ void missing_wait(const Words p) {
  Shared shared;
  uint32_t* words = shared.take<uint32_t>(128);
  copy16_async(words + 4 * threadIdx.x, p.in + 4 * threadIdx.x, 16);
  commit_copies();
  wait_copies<1>();  // all but the newest group: this one need not have landed
  p.out[threadIdx.x] = read_shared(words + 4 * threadIdx.x);
}

template <auto kKernel>
void expect_refusal(const char* name, unsigned threads, size_t shared, const char* words, bool in_every_order = true) {
  alignas(16) uint32_t in[512], out[512];
  for (uint32_t i = 0; i < 512; ++i) in[i] = i;
  int refused = 0, orders = 0;
  std::string text;
  for (Order order : {Order::kForward, Order::kReverse, Order::kShuffled}) {
    for (uint64_t seed = 1; seed <= (order == Order::kShuffled ? 3 : 1); ++seed, ++orders) {
      emulation::options = {order, seed};
      const Status status = run<kKernel>({in, out, 512}, threads, shared);
      refused += !status.ok();
      if (!status.ok()) text = status.text;
    }
  }
  check(in_every_order ? refused == orders : refused > 0,
        std::string(name) + ": refused in " + std::to_string(refused) + " of " + std::to_string(orders) + " orders");
  check(contains(text, words), std::string(name) + ": '" + words + "' is in: " + text);
}

void test_faults() {
  expect_refusal<&diverging_barriers>("diverging barriers", 128, 0, "different barriers");
  expect_refusal<&barrier_in_a_branch>("a barrier in a branch", 128, 0, "emulation_test.cpp:");
  expect_refusal<&lane_that_exited>("a lane that exited", 32, 0, "exited");
  expect_refusal<&different_collectives>("different collectives", 32, 0, "meet in");
  expect_refusal<&lane_outside_its_mask>("a lane outside its mask", 32, 0, "outside its mask");
  expect_refusal<&misaligned_load>("a misaligned load", 32, 0, "misaligned");
  expect_refusal<&misaligned_store>("a misaligned store", 32, 0, "misaligned");
  expect_refusal<&misaligned_copy>("a misaligned copy", 16, 256, "cp.async of a misaligned");
  expect_refusal<&misaligned_ldmatrix>("a misaligned ldmatrix", 32, 1024, "misaligned row");
  expect_refusal<&unwritten_ldmatrix>("ldmatrix of what nothing wrote", 32, 512, "nothing has written");
  expect_refusal<&unwritten_word>("a load of what nothing wrote", 32, 128, "nothing has written");
  expect_refusal<&too_much_shared>("more shared memory than launched with", 32, 128, "launched with 128");
  expect_refusal<&missing_barrier>("a missing barrier", 64, 256, "nothing has written");
  expect_refusal<&missing_wait>("a missing wait", 32, 512, "nothing has written", false);
  check(!run<&misaligned_store>({}, 2000).ok(), "more threads than a block may have are refused");
}

// ---- Primitives, against their definitions on random registers

template <class T>
struct Product {
  const float *a, *b;
  float* c;
};

// One tensor-core step, its operands taken straight from matrices a [16][K] and b [8][K] by the documented layout.
template <class T>
__global__ void mma_kernel(const Product<T> p) {
  constexpr int K = sizeof(T) == 4 ? 8 : 16, kPer = sizeof(T) == 4 ? 1 : 2;
  const int g = static_cast<int>(threadIdx.x) / 4, t = static_cast<int>(threadIdx.x) % 4;
  const auto word = [&](const float* m, int row, int k) {
    uint32_t w = 0;
    for (int e = 0; e < kPer; ++e) w |= bits_of<T>(from_float<T>(m[row * K + k + e])) << 16 * e;
    return w;
  };
  const int k = t * kPer;
  const uint32_t a[4] = {word(p.a, g, k), word(p.a, g + 8, k), word(p.a, g, k + K / 2), word(p.a, g + 8, k + K / 2)};
  float c[4] = {};
  product<T>(c, a, word(p.b, g, k), word(p.b, g, k + K / 2), false);
  for (int e = 0; e < 4; ++e) p.c[(g + e / 2 * 8) * 8 + t * 2 + e % 2] = c[e];
}

template <class T>
void test_mma(const char* name) {
  constexpr int K = sizeof(T) == 4 ? 8 : 16;
  float a[16 * K], b[8 * K], c[128];
  for (float& v : a) v = static_cast<float>(static_cast<int>(generator()() % 17) - 8);
  for (float& v : b) v = static_cast<float>(static_cast<int>(generator()() % 17) - 8);
  const Product<T> p{a, b, c};
  const Status status = launch<&mma_kernel<T>>({name, dim3(1, 1, 1), dim3(32, 1, 1), 0, nullptr}, p);
  check(status.ok(), status.text);
  int wrong = 0;
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 8; ++n) {
      float sum = 0;
      for (int k = 0; k < K; ++k) sum += a[m * K + k] * b[n * K + k];
      wrong += sum != c[m * 8 + n];
    }
  check(wrong == 0, std::string(name) + ": " + std::to_string(wrong) + " of 128 sums are wrong");
}

__global__ void s8_kernel(const Words p) {  // a [16][32] and b [8][32] bytes, one after the other
  const int g = static_cast<int>(threadIdx.x) / 4, t = static_cast<int>(threadIdx.x) % 4;
  const uint32_t* b_words = p.in + 16 * 8;
  const uint32_t a[4] = {p.in[g * 8 + t], p.in[(g + 8) * 8 + t], p.in[g * 8 + t + 4], p.in[(g + 8) * 8 + t + 4]};
  int32_t c[4] = {};
  mma_m16n8k32_s8(c, a, b_words[g * 8 + t], b_words[g * 8 + t + 4]);
  for (int e = 0; e < 4; ++e) p.out[(g + e / 2 * 8) * 8 + t * 2 + e % 2] = static_cast<uint32_t>(c[e]);
}

void test_s8() {
  uint32_t in[24 * 8], out[128];
  for (uint32_t& w : in) w = generator()();
  check(run<&s8_kernel>({in, out, 0}, 32).ok(), "the s8 product runs");
  const auto* a = reinterpret_cast<const int8_t*>(in);
  const int8_t* b = a + 16 * 32;
  int wrong = 0;
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 8; ++n) {
      int32_t sum = 0;
      for (int k = 0; k < 32; ++k) sum += a[m * 32 + k] * b[n * 32 + k];
      wrong += sum != static_cast<int32_t>(out[m * 8 + n]);
    }
  check(wrong == 0, "mma s8: " + std::to_string(wrong) + " of 128 sums are wrong");
}

// ldmatrix and its transpose of four 8x8 matrices [4][8][8]: lane l receives (g, 2t), or (2t, g).
template <bool kTrans>
__global__ void ldmatrix_kernel(const Words p) {
  Shared shared;
  uint32_t* words = shared.take<uint32_t>(128);
  copy16_async(words + 4 * threadIdx.x, p.in + 4 * threadIdx.x, 16);
  commit_copies();
  wait_copies<0>();
  __syncthreads();
  uint32_t r[4];
  if (kTrans)
    ldmatrix_trans(r, words + 4 * threadIdx.x);
  else
    ldmatrix(r, words + 4 * threadIdx.x);
  for (int i = 0; i < 4; ++i) p.out[threadIdx.x * 4 + i] = r[i];
}

void test_ldmatrix() {
  alignas(16) uint16_t in[256];
  uint32_t out[128];
  for (uint16_t i = 0; i < 256; ++i) in[i] = i;
  for (bool trans : {false, true}) {
    const Words p{reinterpret_cast<uint32_t*>(in), out, 0};
    check((trans ? run<&ldmatrix_kernel<true>>(p, 32, 512) : run<&ldmatrix_kernel<false>>(p, 32, 512)).ok(), "it runs");
    int wrong = 0;
    for (int lane = 0; lane < 32; ++lane)
      for (int m = 0; m < 4; ++m) {
        const int g = lane / 4, t = lane % 4 * 2;
        const uint32_t low = in[m * 64 + (trans ? t * 8 + g : g * 8 + t)];
        const uint32_t high = in[m * 64 + (trans ? (t + 1) * 8 + g : g * 8 + t + 1)];
        wrong += out[lane * 4 + m] != (low | high << 16);
      }
    check(wrong == 0, std::string(trans ? "ldmatrix.trans" : "ldmatrix") + ": " + std::to_string(wrong) + " wrong");
  }
}

__global__ void warp_kernel(const Words p) {
  const uint32_t i = threadIdx.x, v = p.in[i];
  p.out[i] = __shfl_xor_sync(~0u, v, 5) + __shfl_down_sync(~0u, v, 3) + __shfl_sync(~0u, v, 7);
  p.out[i] += __ballot_sync(~0u, v % 3 == 0) + static_cast<uint32_t>(__any_sync(~0u, v == 1));
  if (i % 32 < 16)  // halves of a warp with masks of their own
    p.out[i] += __shfl_xor_sync(0xFFFFu, v, 1);
  else
    p.out[i] += 2 * __shfl_xor_sync(0xFFFF0000u, v, 1);
}

void test_warps() {
  uint32_t in[96], out[96];
  for (uint32_t& v : in) v = generator()() % 1000;
  check(run<&warp_kernel>({in, out, 0}, 96).ok(), "warp functions run");
  int wrong = 0;
  for (uint32_t i = 0; i < 96; ++i) {
    const uint32_t base = i / 32 * 32, lane = i % 32;
    uint32_t votes = 0, any = 0;
    for (uint32_t l = 0; l < 32; ++l) votes |= uint32_t{in[base + l] % 3 == 0} << l, any |= in[base + l] == 1;
    uint32_t want = in[i ^ 5] + in[lane + 3 < 32 ? i + 3 : i] + in[base + 7] + votes + any;
    want += (lane < 16 ? 1 : 2) * in[i ^ 1];
    wrong += want != out[i];
  }
  check(wrong == 0, "shuffles and votes: " + std::to_string(wrong) + " of 96 threads are wrong");
}

__global__ void copies_kernel(const Words p) {  // partial copies fill with zeros; groups land in order
  Shared shared;
  uint32_t* words = shared.take<uint32_t>(256);
  const int t = static_cast<int>(threadIdx.x);
  copy16_async(words + 4 * t, p.in + 4 * t, t % 9 * 2);
  commit_copies();
  copy16_async(words + 128 + 4 * t, p.in + 4 * t, 16);
  commit_copies();
  wait_copies<1>();
  for (int i = 0; i < 4; ++i) p.out[4 * t + i] = read_shared(words + 4 * t + i);
  wait_copies<0>();
  for (int i = 0; i < 4; ++i) p.out[128 + 4 * t + i] = read_shared(words + 128 + 4 * t + i);
}

void test_copies() {
  alignas(16) uint32_t in[128], out[256];
  for (uint32_t& w : in) w = generator()() | 1;
  const Status status = run<&copies_kernel>({in, out, 0}, 32, 1024);
  check(status.ok(), status.text);
  int wrong = 0;
  for (int t = 0; t < 32; ++t)
    for (int byte = 0; byte < 16; ++byte) {
      const auto* from = reinterpret_cast<const uint8_t*>(in) + 16 * t + byte;
      const auto* to = reinterpret_cast<const uint8_t*>(out) + 16 * t + byte;
      wrong += *to != (byte < t % 9 * 2 ? *from : 0);
      wrong += to[512] != *from;
    }
  check(wrong == 0, "copies: " + std::to_string(wrong) + " bytes are wrong");
}

__global__ void sum_kernel(const Words p) {  // blocks of any order: integer atomics
  Shared shared;
  uint32_t* parts = shared.take<uint32_t>(4);
  uint32_t sum = 0;
  for (int i = static_cast<int>(blockIdx.x * 128 + threadIdx.x); i < p.count; i += static_cast<int>(gridDim.x) * 128)
    sum += p.in[i];
  for (int by = 16; by; by /= 2) sum += __shfl_xor_sync(~0u, sum, by);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) atomicAdd(p.out, parts[0] + parts[1] + parts[2] + parts[3]);
}

void test_blocks() {
  std::vector<uint32_t> in(1000);
  uint32_t want = 0, got = 0;
  for (uint32_t& v : in) want += v = generator()() % 100;
  check(run<&sum_kernel>({in.data(), &got, 1000}, 128, 64, 3).ok() && got == want, "a sum over three blocks");
}

void test_tf32() {
  check(round_to_tf32(1.0f + 0x1p-11f) == __float_as_uint(1.0f + 0x1p-10f), "tf32: halves are rounded away from zero");
  check(round_to_tf32(1.0f + 0x1p-12f) == __float_as_uint(1.0f), "tf32: less than a half is rounded down");
  check(std::isinf(__uint_as_float(round_to_tf32(INFINITY))), "tf32: infinity stays");
}

}  // namespace

int main() {
  test_faults();
  for (Order order : {Order::kForward, Order::kReverse, Order::kShuffled}) {
    emulation::options = {order, 7};
    test_mma<__half>("mma fp16");
    test_mma<__nv_bfloat16>("mma bf16");
    test_mma<float>("mma tf32");
    test_s8();
    test_ldmatrix();
    test_warps();
    test_copies();
    test_blocks();
  }
  test_tf32();
  test_activations();
  test_wgmma();
  test_wgmma_int8();
  test_cluster();
  test_send();
  if (failures) std::printf("%d checks failed\n", failures);
  if (!failures) std::printf("all checks passed\n");
  return failures != 0;
}
