// The launch of kv_relative_step for one type of q.
#pragma once

#include "cuda/kv_relative_step.cuh"
#include "cuda/kv_relative_step.h"
#include "cuda/sequence.h"

namespace lora_kernels::cuda {
namespace launching {

// Vectors begin on 16 bytes and are whole eights.
inline bool kv_relative_aligned(const KvRelativeStepProblem& p, const KvRelativeStepArgs& args) {
  bool aligned = p.head_size % 8 == 0;
  for (const void* at : {args.q, args.k, args.v, static_cast<const void*>(args.k_cache),
                         static_cast<const void*>(args.v_cache), args.positions, args.bias_u, args.bias_v})
    aligned = aligned && reinterpret_cast<uintptr_t>(at) % 16 == 0;
  return aligned;
}

template <class Q, class S, int kGroups>
void kv_relative_of(Sequence* s, dim3 grid, const KvRelativeParams& p) {
  constexpr int64_t kShared = kv_relative_shared_bytes(kGroups, sizeof(KvProduct<Q, S>));
  s->run<&kv_relative<Q, S, kGroups>>("kv_relative", grid, kKvThreads, static_cast<size_t>(kShared), p);
}

}  // namespace launching

template <class Q>
Status KvRelativeStepKernels<Q>::run(const KvRelativeStepPlan& plan, const KvRelativeStepArgs& args, void* stream) {
  using namespace launching;
  const KvRelativeStepProblem& p = plan.problem;
  const CudaKvRelativeStepPlan& c = plan.cuda;
  KvRelativeParams k;
  k.q = args.q;
  k.k = args.k;
  k.v = args.v;
  k.k_cache = args.k_cache;
  k.v_cache = args.v_cache;
  k.positions = args.positions;
  k.bias_u = args.bias_u;
  k.bias_v = args.bias_v;
  k.lengths = args.lengths;
  k.counts = p.counts ? args.counts : nullptr;
  k.slots = p.slots ? args.slots : nullptr;
  k.tokens = static_cast<int>(p.tokens);
  k.capacity = static_cast<int>(p.capacity);
  k.cache_rows = static_cast<int>(p.cache_rows);
  k.left = static_cast<int>(p.left);
  k.scale = args.scale * kLog2OfE;
  k.aligned = kv_relative_aligned(p, args);
  k.result.out = args.out;
  k.result.heads = static_cast<int>(p.heads);
  k.result.head_size = static_cast<int>(p.head_size);
  Sequence s(stream);
  const dim3 grid(static_cast<unsigned>(p.rows * p.heads), static_cast<unsigned>(c.chunks), 1);
  const auto run = [&](auto cached) {
    using S = decltype(cached);
    c.groups == 1 ? kv_relative_of<Q, S, 1>(&s, grid, k) : kv_relative_of<Q, S, 2>(&s, grid, k);
  };
  if constexpr (std::is_same_v<Q, float>) {
    if (p.cache_dtype == DType::kFloat16)
      run(__half());
    else if (p.cache_dtype == DType::kBFloat16)
      run(__nv_bfloat16());
    else
      run(float());
  } else {
    run(Q());  // the cache's type is q's
  }
  return s.status();
}

}  // namespace lora_kernels::cuda
