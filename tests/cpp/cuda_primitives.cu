// Every primitive on registers that the caller draws: compiled by nvcc for a GPU and by the host's compiler for the
// emulation, whose readings of the PTX ISA are the same and have to be compared with the device's. 32 lanes; lane l
// reads in[l * 16 ...] and writes out[l * 8 ...]. A warpgroup of 128 threads shares these words.
#include "cuda/numbers.h"
#include "cuda/primitives/launch.h"
#include "cuda/primitives/tma.h"
#include "cuda/primitives/wgmma_int8.h"
#include "cuda/tile.h"

using namespace lora_kernels;
using namespace lora_kernels::cuda;

namespace {

struct Registers {
  const uint32_t* in;
  uint32_t* out;
};

template <int kWhich>
__global__ void primitive(const Registers p) {
  const int lane = static_cast<int>(threadIdx.x);
  const uint32_t* in = p.in + lane * 16;
  uint32_t* out = p.out + lane * 8;
  uint32_t r[4] = {in[0], in[1], in[2], in[3]};
  float c[4] = {__uint_as_float(in[6]), __uint_as_float(in[7]), __uint_as_float(in[8]), __uint_as_float(in[9])};
  Shared shared;
  uint32_t* words = shared.take<uint32_t>(256);
  if constexpr (kWhich <= 1) {
    for (int i = 0; i < 4; ++i) words[lane * 4 + i] = in[i];
    __syncwarp();
    if constexpr (kWhich == 0)
      ldmatrix(r, words + (lane ^ 3) * 4);
    else
      ldmatrix_trans(r, words + (lane ^ 3) * 4);
    for (int i = 0; i < 4; ++i) out[i] = r[i];
  } else if constexpr (kWhich <= 5) {
    if constexpr (kWhich == 2) mma_step(__half(), c, r, in[4], in[5]);
    if constexpr (kWhich == 3) mma_step(__nv_bfloat16(), c, r, in[4], in[5]);
    if constexpr (kWhich == 4) mma_step(float(), c, r, in[4], in[5]);
    if constexpr (kWhich == 5) mma_m16n8k8_f16(c, r[0], r[1], in[4]);
    for (int i = 0; i < 4; ++i) out[i] = __float_as_uint(c[i]);
  } else if constexpr (kWhich == 6) {
    int32_t sums[4];
    for (int i = 0; i < 4; ++i) sums[i] = static_cast<int32_t>(in[6 + i]);
    mma_m16n8k32_s8(sums, r, in[4], in[5]);
    for (int i = 0; i < 4; ++i) out[i] = static_cast<uint32_t>(sums[i]);
  } else if constexpr (kWhich == 7) {
    out[0] = __shfl_xor_sync(~0u, in[0], 5);
    out[1] = __shfl_down_sync(~0u, in[0], 3);
    out[2] = __shfl_sync(~0u, in[0], static_cast<int>(in[1] % 32));
    out[3] = __ballot_sync(~0u, in[2] & 1);
    out[4] = static_cast<uint32_t>(__any_sync(~0u, in[3] % 97 == 0));
  } else if constexpr (kWhich == 8) {
    copy16_async(words + lane * 4, in, lane % 9 * 2);
    commit_copies();
    copy16_async(words + 128 + lane * 4, in + 4, 16);
    commit_copies();
    wait_copies<1>();
    for (int i = 0; i < 4; ++i) out[i] = words[lane * 4 + i];
    wait_copies<0>();
    for (int i = 0; i < 4; ++i) out[4 + i] = words[128 + lane * 4 + i];
  } else if constexpr (kWhich == 9) {
    for (int i = 0; i < 4; ++i) out[i] = round_to_tf32(__uint_as_float(in[i]));
    for (int i = 0; i < 2; ++i) out[4 + i] = bits_of(from_float<__half>(__uint_as_float(in[i])));
    for (int i = 0; i < 2; ++i) out[6 + i] = bits_of(from_float<__nv_bfloat16>(__uint_as_float(in[i])));
  } else if constexpr (kWhich == 10) {
    for (int i = 0; i < 2; ++i) out[i] = __float_as_uint(activate<float>(c[i], Activation::kGelu));
    for (int i = 2; i < 4; ++i) out[i] = __float_as_uint(activate<__half>(c[i], Activation::kGelu));
    for (int i = 0; i < 4; ++i) out[4 + i] = __float_as_uint(activate<float>(c[i], Activation::kSilu));
  } else {
    Dropout dropout;
    dropout.seed = uint64_t{in[0]} << 32 | in[1];
    dropout.threshold = in[2];
    out[0] = kept_bits(dropout, uint64_t{in[3]} << 16 | in[4] % 65536, 32);
  }
}

// Tiles of 64 and kColumns rows and 64 of depth, filled with the 1024 halves of `in` in two different orders; two of
// each thread's sums, which ones the first word says. kAcross: the second operand is read as tiles of 64 rows across
// depth, one for each 64 columns; the bytes are the same, and are other elements.
template <class T, int kColumns, bool kAcross>
__global__ void __launch_bounds__(128) warpgroup(const Registers p) {
  using A = Tile<T, 64, 64>;
  using B = Tile<T, kColumns, 64>;
  Shared shared;
  char* tiles = shared.take<char>(A::kBytes + B::kBytes);
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < 64 * 8; i += 128) copy16_async(tiles + A::offset(i / 8, i % 8), p.in + i * 4 % 512, 16);
  for (int i = thread; i < kColumns * 8; i += 128)
    copy16_async(tiles + A::kBytes + B::offset(i / 8, i % 8), p.in + (i * 12 + i / 128 * 4) % 512, 16);
  commit_copies();
  wait_copies<0>();
  fence_proxy();
  __syncthreads();
  float c[kColumns / 8][4] = {};
  const uint64_t a = wgmma_operand(tiles);
  const uint64_t b = kAcross ? wgmma_operand_across(tiles + A::kBytes) : wgmma_operand(tiles + A::kBytes);
  constexpr uint64_t kStepOfB = kAcross ? kWgmmaStepAcross : kWgmmaStep;
  for (uint64_t half = 0; half < 2; ++half) {
    wgmma_fence();
    for (uint64_t step = 0; step < 2; ++step)
      wgmma<T, kColumns, kAcross>(c, a + (2 * half + step) * kWgmmaStep, b + (2 * half + step) * kStepOfB);
    commit_products();
  }
  wait_products<0>();
  const int chosen = static_cast<int>(p.in[0] % (kColumns / 8));
#pragma unroll
  for (int j = 0; j < kColumns / 8; ++j)
    if (j == chosen) {
      p.out[2 * thread] = __float_as_uint(p.in[1] & 1 ? c[j][0] : c[j][1]);
      p.out[2 * thread + 1] = __float_as_uint(p.in[1] & 1 ? c[j][3] : c[j][2]);
    }
}

template <class T, int kColumns, bool kAcross = false>
Status run_warpgroup(const Registers& p) {
  constexpr size_t kBytes = (64 + kColumns) * 128;
  return launch<&warpgroup<T, kColumns, kAcross>>({"warpgroup", dim3(1, 1, 1), dim3(128, 1, 1), kBytes, nullptr}, p);
}

// The same of bytes, rows of 128 of them and four steps of depth, the left operand in registers that are taken in
// turns.
template <int kColumns>
__global__ void __launch_bounds__(128) integers(const Registers p) {
  Shared shared;
  char* tile = shared.take<char>(kColumns * 128);
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < kColumns * 8; i += 128)
    copy16_async(tile + (i / 8 * 8 + (i % 8 ^ (i / 8 & 7))) * 16, p.in + (i * 12 + i / 64 * 4) % 512, 16);
  commit_copies();
  wait_copies<0>();
  fence_proxy();
  __syncthreads();
  int32_t c[kColumns / 8][4] = {};
  uint32_t a[2][4];
  const uint64_t b = wgmma_operand(tile);
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    wait_products<1>();
    for (int i = 0; i < 4; ++i) a[step % 2][i] = p.in[(thread * 4 + i * 37 + step * 101) % 512];
    wgmma_fence();
    wgmma_s8<kColumns>(c, a[step % 2], b + static_cast<uint64_t>(step) * kWgmmaStep);
    commit_products();
  }
  wait_products<0>();
  const int chosen = static_cast<int>(p.in[0] % (kColumns / 8));
#pragma unroll
  for (int j = 0; j < kColumns / 8; ++j)
    if (j == chosen) {
      p.out[2 * thread] = static_cast<uint32_t>(p.in[1] & 1 ? c[j][0] : c[j][1]);
      p.out[2 * thread + 1] = static_cast<uint32_t>(p.in[1] & 1 ? c[j][3] : c[j][2]);
    }
}

template <int kColumns>
Status run_integers(const Registers& p) {
  return launch<&integers<kColumns>>({"integers", dim3(1, 1, 1), dim3(128, 1, 1), kColumns * 128, nullptr}, p);
}

struct BoxParams {
  TensorMap map;
  uint32_t* out;
};

// A box as it lies in shared memory. Of the 11 rows of 64 halves that `in` begins with: rows 5 to 12, columns 8 to 71.
// Of `in` as 2 planes of 4 rows of 100 bytes, 160 apart: planes 1 and 2, rows 1 to 4, bytes 16 to 143.
template <bool kPlanes>
__global__ void box(const __grid_constant__ BoxParams p) {
  Shared shared;
  uint32_t* to = shared.take<uint32_t>(256);
  uint64_t* landed = shared.take<uint64_t>(1);
  if (threadIdx.x == 0) {
    init_arrivals(landed);
    fence_arrivals();
    expect_bytes(landed, 1024);
    if constexpr (kPlanes)
      load_planes(to, p.map, 1, 1, 16, landed);
    else
      load_box(to, p.map, 5, 8, landed);
  }
  __syncthreads();
  wait_for_phase(landed, 0);
  for (int i = static_cast<int>(threadIdx.x); i < 256; i += 32) p.out[i] = to[i];
}

template <bool kPlanes>
Status run_box(const Registers& p) {
  BoxParams b{{}, p.out};
  const bool made = kPlanes ? make_tensor_map(&b.map, BytePlanes{p.in, 2, 4, 100, 5 * 160, 160}, 2, 4)
                            : make_tensor_map(&b.map, p.in, false, 11, 64, 128, 8);
  if (!made) return Status::failed("no tensor map");
  return launch<&box<kPlanes>>({"box", dim3(1, 1, 1), dim3(32, 1, 1), 2048, nullptr}, b);
}

// Two blocks of a cluster, each of which asks for eight of sixteen rows for both, twice into the same place: of `in` as
// 16 rows of 64 halves rows 0 to 15, then 4 to 19. Each block writes sums of what it has seen.
__global__ void shared_box(const __grid_constant__ BoxParams p) {
  constexpr int kHalf = 256;  // words
  Shared shared;
  uint32_t* to = shared.take<uint32_t>(2 * kHalf);
  uint64_t *landed = shared.take<uint64_t>(1), *free = shared.take<uint64_t>(1);
  const unsigned rank = rank_in_cluster();
  const bool first = threadIdx.x == 0;
  if (first) {
    init_arrivals(landed);
    init_arrivals(free, kClusterBlocks);
    fence_arrivals();
  }
  arrive_in_cluster();
  wait_for_cluster();
  uint32_t sums[4] = {};
  for (int turn = 0; turn < 2; ++turn) {
    if (first) {
      expect_bytes(landed, 2 * kHalf * 4);
      if (turn > 0) {
        for (unsigned i = 0; i < kClusterBlocks; ++i) arrive(free, i);
        wait_for_phase(free, 0);
      }
      share_box(to + rank * kHalf, p.map, 4 * turn + 8 * static_cast<int>(rank), 0, landed);
    }
    wait_for_phase(landed, turn);
    for (int i = 0; i < 16; ++i)
      sums[i % 4] += to[i * 32 + static_cast<int>(threadIdx.x)] * static_cast<uint32_t>(16 * turn + i + 1);
    __syncthreads();
  }
  for (int i = 0; i < 4; ++i) p.out[rank * 128 + i * 32 + threadIdx.x] = sums[i];
  arrive_in_cluster();
  wait_for_cluster();
}

Status run_shared_box(const Registers& p) {
  BoxParams b{{}, p.out};
  if (!make_tensor_map(&b.map, p.in, false, 16, 64, 128, 8)) return Status::failed("no tensor map");
  Launch l{"shared_box", dim3(kClusterBlocks, 1, 1), dim3(32, 1, 1), 4096, nullptr};
  l.cluster = kClusterBlocks;
  return launch<&shared_box>(l, b);
}

// Four blocks of a cluster, each lane of which sends each block four words, its own too; sums of what has come, each
// sender's times a number of its own.
__global__ void sends(const Registers p) {
  constexpr unsigned kBlocks = 4;
  Shared shared;
  uint32_t* parts = shared.take<uint32_t>(kBlocks * 128);
  uint64_t* landed = shared.take<uint64_t>(1);
  const unsigned rank = rank_in_cluster(kBlocks), lane = threadIdx.x;
  if (lane == 0) {
    init_arrivals(landed);
    fence_arrivals();
    expect_bytes(landed, kBlocks * 512);
  }
  arrive_in_cluster();
  wait_for_cluster();
  for (unsigned block = 0; block < kBlocks; ++block)
    send16(parts + rank * 128 + lane * 4, load16(p.in + (rank * 128 + (lane + 5 * block) % 32 * 4)), landed, block);
  wait_for_phase(landed, 0);
  uint32_t sums[4] = {};
  for (unsigned from = 0; from < kBlocks; ++from)
    for (unsigned i = 0; i < 4; ++i) sums[i] += parts[from * 128 + (lane ^ 1) * 4 + i] * (2 * from + 1);
  p.out[rank * 64 + lane] = sums[0] + 3 * sums[1];
  p.out[rank * 64 + 32 + lane] = sums[2] + 3 * sums[3];
}

Status run_sends(const Registers& p) {
  Launch l{"sends", dim3(4, 1, 1), dim3(32, 1, 1), 2064, nullptr};
  l.cluster = 4;
  return launch<&sends>(l, p);
}

constexpr int kPrimitives = 12;

template <int kWhich = 0>
Status run_one(int which, const Registers& p) {
  if (which == kPrimitives) return run_warpgroup<__half, 128>(p);
  if (which == kPrimitives + 1) return run_warpgroup<__half, 256>(p);
  if (which == kPrimitives + 2) return run_warpgroup<__nv_bfloat16, 128>(p);
  if (which == kPrimitives + 3) return run_warpgroup<__nv_bfloat16, 256>(p);
  if (which == kPrimitives + 4) return run_box<false>(p);
  if (which == kPrimitives + 5) return run_warpgroup<__half, 128, true>(p);
  if (which == kPrimitives + 6) return run_warpgroup<__half, 256, true>(p);
  if (which == kPrimitives + 7) return run_warpgroup<__nv_bfloat16, 128, true>(p);
  if (which == kPrimitives + 8) return run_warpgroup<__nv_bfloat16, 256, true>(p);
  if (which == kPrimitives + 9) return run_integers<128>(p);
  if (which == kPrimitives + 10) return run_box<true>(p);
  if (which == kPrimitives + 11) return run_shared_box(p);
  if (which == kPrimitives + 12) return run_sends(p);
  if (which == kPrimitives + 13) return run_integers<256>(p);
  if (which == kPrimitives + 14) return run_integers<160>(p);
  if constexpr (kWhich + 1 < kPrimitives)
    if (which != kWhich) return run_one<kWhich + 1>(which, p);
  return launch<&primitive<kWhich>>({"primitive", dim3(1, 1, 1), dim3(32, 1, 1), 1024, nullptr}, p);
}

}  // namespace

// 0, or 1 if it could not run. in: 512 words, out: 256.
extern "C" __attribute__((visibility("default"))) int run_primitive(int which, const uint32_t* in, uint32_t* out) {
#if defined(LORA_KERNELS_EMULATION)
  return run_one(which, {in, out}).ok() ? 0 : 1;
#else
  uint32_t *device_in = nullptr, *device_out = nullptr;
  bool good = cudaMalloc(&device_in, 2048) == cudaSuccess && cudaMalloc(&device_out, 1024) == cudaSuccess &&
              cudaMemcpy(device_in, in, 2048, cudaMemcpyHostToDevice) == cudaSuccess &&
              cudaMemcpy(device_out, out, 1024, cudaMemcpyHostToDevice) == cudaSuccess &&
              run_one(which, {device_in, device_out}).ok() &&
              cudaMemcpy(out, device_out, 1024, cudaMemcpyDeviceToHost) == cudaSuccess;
  cudaFree(device_in);
  cudaFree(device_out);
  return good ? 0 : 1;
#endif
}
