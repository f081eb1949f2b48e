// Shared memory, handed out piece by piece; every thread of a block makes the same calls.
#pragma once

#include "cuda/primitives/platform.h"

namespace lora_kernels::cuda {

class Shared {
#if defined(LORA_KERNELS_EMULATION)

 public:
  template <class T>
  T* take(int count) {
    size_t gap = 0;
    const size_t bytes = sizeof(T) * static_cast<size_t>(count);
    void* p = emulation::open_shared(used_, gaps_, bytes, &gap);
    used_ += (bytes + 15) / 16 * 16;
    gaps_ += gap;
    return static_cast<T*>(p);
  }

 private:
  size_t used_ = 0, gaps_ = 0;
#else

 public:
  __device__ Shared() {
    extern __shared__ __align__(1024) char memory[];
    next_ = memory;
  }
  template <class T>
  __device__ T* take(int count) {
    T* p = reinterpret_cast<T*>(next_);
    next_ += (sizeof(T) * count + 15) / 16 * 16;
    return p;
  }

 private:
  char* next_;
#endif
};

// A word of shared memory; the emulation refuses one that nothing has written.
__device__ inline uint32_t read_shared(const void* word) {
#if defined(LORA_KERNELS_EMULATION)
  emulation::expect_written(word, "a load");
#endif
  uint32_t bits;
  memcpy(&bits, __builtin_assume_aligned(word, 4), sizeof bits);
  return bits;
}

#if !defined(LORA_KERNELS_EMULATION)
__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
#endif

}  // namespace lora_kernels::cuda
