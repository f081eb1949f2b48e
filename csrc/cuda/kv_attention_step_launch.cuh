// The launches of kv_attention_step for one type of q: a plan's kernels in order on one stream.
#pragma once

#include "cuda/kv_append.cuh"
#include "cuda/kv_attend.cuh"
#include "cuda/kv_attention_step.h"
#include "cuda/kv_blocked.cuh"
#include "cuda/sequence.h"

namespace lora_kernels::cuda {
namespace launching {

inline KvRows kv_rows_of(const KvAttentionStepProblem& p, const KvAttentionStepArgs& args) {
  KvRows rows;
  rows.lengths = args.lengths;
  rows.slots = args.slots;
  rows.kind = p.slots;
  rows.rows = static_cast<int>(p.rows);
  rows.tokens = static_cast<int>(p.tokens);
  rows.capacity = static_cast<int>(p.capacity);
  rows.cache_rows = static_cast<int>(p.cache_rows);
  rows.append = p.append;
  return rows;
}

// Vectors begin on 16 bytes (8 of INT8) and are whole eights.
inline bool kv_aligned(const KvAttentionStepProblem& p, const KvAttentionStepArgs& args) {
  bool aligned = p.head_size % 8 == 0;
  for (const void* at :
       {args.q, args.k, args.v, static_cast<const void*>(args.k_cache), static_cast<const void*>(args.v_cache)})
    aligned = aligned && reinterpret_cast<uintptr_t>(at) % 16 == 0;
  return aligned;
}

// Calls body(tag) with the type of the cache, of those that go with q.
template <class Q, class Body>
void with_cache_type(DType type, const Body& body) {
  if (type == DType::kInt8) return body(int8_t());
  if constexpr (std::is_same_v<Q, float>) {
    if (type == DType::kFloat16) return body(__half());
    if (type == DType::kBFloat16) return body(__nv_bfloat16());
  }
  body(Q());
}

inline int64_t kv_cluster_bytes(const CudaKvAttentionStepPlan& c, int queries) {
  return c.cluster > 1 ? kv_exchange_bytes(c.groups, queries) : 0;
}

template <class Q, class S, int kGroups, bool kPlaces>
void kv_attend_all(Sequence* s, const CudaKvAttentionStepPlan& c, dim3 grid, const KvAttendParams& p) {
  const int64_t shared = kv_shared_bytes(kGroups, kKvQueries, kPlaces ? c.split_positions : 0,
                                         kv_query_bytes(kGroups, sizeof(KvProduct<Q, S>))) +
                         kv_cluster_bytes(c, kKvQueries);
  s->run<&kv_attend<Q, S, kGroups, kPlaces>>("kv_attend", grid, kKvThreads, static_cast<size_t>(shared), p,
                                             c.early_start, false, static_cast<unsigned>(c.cluster));
}

}  // namespace launching

template <class Q>
Status KvAttentionStepKernels<Q>::run(const KvAttentionStepPlan& plan, const KvAttentionStepArgs& args, void* stream) {
  using namespace launching;
  const KvAttentionStepProblem& p = plan.problem;
  const CudaKvAttentionStepPlan& c = plan.cuda;
  Workspace memory{static_cast<char*>(args.workspace)};
  const KvWorkspace w(memory, plan);
  Sequence s(stream);
  const KvRows rows = kv_rows_of(p, args);
  const int64_t vectors = p.rows * p.tokens * p.heads;
  const bool apart = p.append && !c.fused;
  if (apart) {
    const KvAppendParams append{rows,
                                args.k,
                                args.v,
                                args.k_cache,
                                args.v_cache,
                                args.k_scales,
                                args.v_scales,
                                static_cast<int>(p.heads),
                                static_cast<int>(p.head_size)};
    with_cache_type<Q>(p.cache_dtype, [&](auto tag) {
      s.run<&kv_append<Q, decltype(tag)>>("kv_append", dim3(tiles(vectors, kKvWarps), 2, 1), kKvThreads, 0, append,
                                          c.early_start);
    });
  }
  KvResult result{
      args.out, w.parts, w.stats, c.splits, c.cluster, static_cast<int>(p.heads), static_cast<int>(p.head_size),
      vectors};
  KvWeights weights;
  weights.data = p.weight_heads > 0 ? args.weights : nullptr;
  weights.count = static_cast<int>(p.weight_heads);
  for (int i = 0; i < weights.count; ++i) weights.heads[i] = static_cast<int16_t>(args.weight_heads[i]);
  const int64_t units = c.grouped ? p.cache_rows : p.rows;
  const dim3 grid(static_cast<unsigned>(units * p.heads * c.splits), static_cast<unsigned>(c.chunks), 1);
  if (p.layout == KvLayout::kBlocked) {
    KvBlockedParams b;
    b.rows = rows;
    b.q = args.q;
    b.keys = static_cast<const int8_t*>(args.k_cache);
    b.values = static_cast<const int8_t*>(args.v_cache);
    b.key_bytes = kv_key_bytes(p.capacity, p.head_size);
    b.value_bytes = kv_value_bytes(p.capacity, p.head_size);
    b.key_steps = static_cast<int>(kv_key_steps(p.head_size));
    b.value_steps = static_cast<int>(kv_value_steps(p.capacity));
    b.value_channels = static_cast<int>(kv_value_channels(p.head_size));
    b.k_scales = args.k_scales;
    b.v_scales = args.v_scales;
    b.scale = args.scale * kLog2OfE;
    b.grouped = c.grouped;
    b.split_positions = c.split_positions;
    b.ask = c.ask;
    b.result = result;
    b.weights = weights;
    const auto shared =
        static_cast<size_t>(kv_shared_bytes(c.groups, kKvBlockedQueries, 0) + kv_cluster_bytes(c, kKvBlockedQueries));
    const auto cluster = static_cast<unsigned>(c.cluster);
    if (c.groups == 1)
      s.run<&kv_blocked<Q, 1>>("kv_blocked<64>", grid, kKvThreads, shared, b, c.early_start, false, cluster);
    else
      s.run<&kv_blocked<Q, 2>>("kv_blocked<128>", grid, kKvThreads, shared, b, c.early_start, false, cluster);
  } else {
    KvAttendParams a;
    a.rows = rows;
    a.q = args.q;
    a.k = c.fused ? args.k : nullptr;
    a.v = c.fused ? args.v : nullptr;
    a.k_cache = args.k_cache;
    a.v_cache = args.v_cache;
    a.k_scales = args.k_scales;
    a.v_scales = args.v_scales;
    a.scales = p.scales;
    a.scale = args.scale * kLog2OfE;
    a.grouped = c.grouped;
    a.aligned = kv_aligned(p, args);
    a.ask = c.ask;
    a.split_positions = c.split_positions;
    a.result = result;
    a.weights = weights;
    with_cache_type<Q>(p.cache_dtype, [&](auto tag) {
      using S = decltype(tag);
      if (c.groups == 1)
        c.places ? kv_attend_all<Q, S, 1, true>(&s, c, grid, a) : kv_attend_all<Q, S, 1, false>(&s, c, grid, a);
      else
        c.places ? kv_attend_all<Q, S, 2, true>(&s, c, grid, a) : kv_attend_all<Q, S, 2, false>(&s, c, grid, a);
    });
  }
  if (c.splits > c.cluster)
    s.run<&kv_combine<Q>>("kv_combine", dim3(tiles(vectors * p.head_size, kKvFinishThreads), 1, 1), kKvFinishThreads, 0,
                          KvCombineParams{rows, result}, c.early_start);
  if (weights.data)
    s.run<&kv_weights<float>>(
        "kv_weights", dim3(static_cast<unsigned>(p.rows * p.tokens), static_cast<unsigned>(weights.count), 1),
        kKvFinishThreads, 2 * kKvFinishThreads / 32 * 4, KvWeightsParams{rows, weights}, c.early_start);
  return s.status();
}

}  // namespace lora_kernels::cuda
