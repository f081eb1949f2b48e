// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): the counter-based generator
// behind LoRA dropout. The mask of element i depends on (seed, i) alone, so forward and backward, CPU and CUDA, draw
// the same mask without ever storing it.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define LORA_KERNELS_HOST_DEVICE __host__ __device__
#else
#define LORA_KERNELS_HOST_DEVICE
#endif

namespace lora_kernels {

struct Philox4 {
  uint32_t v[4];
};

// The four numbers of one counter block. Element i of a tensor uses philox(seed, i / 4).v[i % 4].
LORA_KERNELS_HOST_DEVICE inline Philox4 philox(uint64_t seed, uint64_t counter) {
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32), c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0, p1 = uint64_t{0xCD9E8D57u} * c2;
    const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    const uint32_t n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// An element is kept iff its number is at least this: P(kept) = 1 - p.
LORA_KERNELS_HOST_DEVICE inline uint32_t dropout_threshold(double p) { return static_cast<uint32_t>(p * 4294967296.0); }

}  // namespace lora_kernels
