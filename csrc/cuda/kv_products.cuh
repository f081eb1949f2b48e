// The tensor-core products that attention is made of, for whatever scores are: queries times eights of depth, and
// weights times V.
#pragma once

#include "cuda/kv_queries.cuh"

namespace lora_kernels::cuda {

// Scores of all queries with the vector whose eight c of depth is `eight`.
template <class T, int kGroups>
__device__ inline void kv_add_scores(float (&scores)[4], const KvQueries<T, kGroups>& queries, int c,
                                     const KvEight<T>& eight) {
#pragma unroll
  for (int s = 0; s < KvEight<T>::kSteps; ++s) {
    const uint32_t a[4] = {queries.word(0, c, 2 * s), queries.word(1, c, 2 * s), queries.word(0, c, 2 * s + 1),
                           queries.word(1, c, 2 * s + 1)};
    product<T>(scores, a, eight.w[2 * s], eight.w[2 * s + 1], true);
  }
}

// Sums of 64 channels from `first` on: channel 64 c + 8 n + j is column n of product j. Weights are as scores came, V
// of positions 2 t, 2 t + 1, 8 + 2 t and 8 + 2 t + 1.
template <class T, int kProducts>
__device__ inline void kv_add_values(float (&sums)[kProducts][4], int first, const float (&weights)[2][4],
                                     const KvEight<T> (&v)[4]) {
  const auto word = [](float one, float other) {
    return bits_of<T>(from_float<T>(one)) | bits_of<T>(from_float<T>(other)) << 16;
  };
  if constexpr (sizeof(T) == 2) {
    const uint32_t a[4] = {word(weights[0][0], weights[0][1]), word(weights[0][2], weights[0][3]),
                           word(weights[1][0], weights[1][1]), word(weights[1][2], weights[1][3])};
#pragma unroll
    for (int j = 0; j < 8; ++j)
      product<T>(sums[first + j], a, pair_of(v[0].w[j / 2], v[1].w[j / 2], j % 2),
                 pair_of(v[2].w[j / 2], v[3].w[j / 2], j % 2), true);
  } else {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const uint32_t a[4] = {__float_as_uint(weights[n][0]), __float_as_uint(weights[n][2]),
                             __float_as_uint(weights[n][1]), __float_as_uint(weights[n][3])};
#pragma unroll
      for (int j = 0; j < 8; ++j) product<T>(sums[first + j], a, v[2 * n].w[j], v[2 * n + 1].w[j], true);
    }
  }
}

}  // namespace lora_kernels::cuda
