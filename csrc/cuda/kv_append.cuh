// New tokens' k and v to the cache, where the kernel that attends cannot do it beside: INT8 caches with a scale per
// position (every block that reads a new vector would have to quantize it), caches of another type than k and v, and
// long prompts. A warp takes a vector; bytes: k and v once, their copies once.
//   INT8: q = clamp(rint(x * (127 / amax)), -127, 127), scale = amax / 127, by the CPU's expressions: the same bits. A
//   vector of zeros, or one so small that 127 / amax overflows, gives 0 and scale 0; one that is not finite 0 and NaN.
#pragma once

#include "cuda/kv_rows.cuh"
#include "cuda/numbers.h"
#include "cuda/primitives/launch.h"

namespace lora_kernels::cuda {

struct KvAppendParams {
  KvRows rows;
  const void *k = nullptr, *v = nullptr;           // [rows, T, H, D]
  void *k_cache = nullptr, *v_cache = nullptr;     // [S, H, C, D]
  float *k_scales = nullptr, *v_scales = nullptr;  // [S, H, C], of INT8
  int heads = 0, head_size = 0;
};

// Grid (rows * T * H / kKvWarps, k or v).
template <class Q, class S>
__global__ void __launch_bounds__(kKvThreads) kv_append(const KvAppendParams p) {
  let_next_kernel_start();
  wait_for_kernel_before();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const int64_t n = int64_t{blockIdx.x} * kKvWarps + thread / 32;
  if (n >= static_cast<int64_t>(p.rows.rows) * p.rows.tokens * p.heads) return;
  const int head = static_cast<int>(n % p.heads), query = static_cast<int>(n / p.heads);
  const int row = query / p.rows.tokens, length = p.rows.length(row);
  if (length < 0) return;
  const int position = length + query % p.rows.tokens, cache_row = p.rows.cache_row(row, position);
  if (cache_row < 0) return;
  const bool keys = blockIdx.y == 0;
  const Q* from = static_cast<const Q*>(keys ? p.k : p.v) + n * p.head_size;
  const int64_t at = (static_cast<int64_t>(cache_row) * p.heads + head) * p.rows.capacity + position;
  S* to = static_cast<S*>(keys ? p.k_cache : p.v_cache) + at * p.head_size;
  if constexpr (std::is_same_v<S, int8_t>) {
    uint32_t bits = 0;  // as bits, infinities and NaNs are the largest
    for (int d = lane; d < p.head_size; d += 32) bits = max(bits, __float_as_uint(to_float(from[d])) & 0x7FFFFFFFu);
    for (int by = 16; by > 0; by /= 2) bits = max(bits, __shfl_xor_sync(~0u, bits, by));
    const float most = __uint_as_float(bits), inverse = 127.0f / most;
    const bool finite = bits < 0x7F800000u, fits = finite && inverse <= 3.4028235e38f;
    for (int d = lane; d < p.head_size; d += 32)
      to[d] = fits ? static_cast<S>(fminf(fmaxf(rintf(to_float(from[d]) * inverse), -127.0f), 127.0f)) : S{0};
    if (lane == 0) (keys ? p.k_scales : p.v_scales)[at] = fits ? most / 127.0f : finite ? 0.0f : not_a_number();
  } else {
    for (int d = lane; d < p.head_size; d += 32) to[d] = from_float<S>(to_float(from[d]));
  }
}

}  // namespace lora_kernels::cuda
