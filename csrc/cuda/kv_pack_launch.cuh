// The launch of kv_pack for one type of k and v.
#pragma once

#include "cuda/kv_pack.cuh"
#include "cuda/kv_pack.h"
#include "cuda/sequence.h"

namespace lora_kernels::cuda {

template <class Q>
Status KvPackKernels<Q>::run(const KvPackPlan& plan, const KvPackArgs& args, void* stream) {
  const KvPackProblem& p = plan.problem;
  KvPackParams k;
  k.k = args.k;
  k.v = args.v;
  k.k_stride = args.k_stride;
  k.v_stride = args.v_stride;
  k.k_row_stride = args.k_row_stride;
  k.v_row_stride = args.v_row_stride;
  k.packed_k = args.packed_k;
  k.packed_v = args.packed_v;
  k.key_bytes = kv_key_bytes(p.positions, p.head_size);
  k.value_bytes = kv_value_bytes(p.positions, p.head_size);
  k.k_scales = args.k_scales;
  k.v_scales = args.v_scales;
  k.positions = static_cast<int>(p.positions);
  k.heads = static_cast<int>(p.heads);
  k.head_size = static_cast<int>(p.head_size);
  launching::Sequence s(stream);
  const dim3 grid(static_cast<unsigned>(p.cache_rows * p.heads), launching::tiles(p.head_size, kKvPackChannels), 2);
  s.run<&kv_pack_kernel<Q>>("kv_pack", grid, kKvPackThreads, kKvPackSharedBytes, k);
  return s.status();
}

}  // namespace lora_kernels::cuda
