// The launches of int8_lora_linear for one storage type: a plan's kernels in order on one stream.
#pragma once

#include "cuda/helpers.cuh"
#include "cuda/int8_gemm.cuh"
#include "cuda/int8_lora_linear.h"
#include "cuda/int8_persistent.cuh"
#include "cuda/int8_skinny.cuh"
#include "cuda/int8_topk.cuh"
#include "cuda/int8_wgmma.cuh"
#include "cuda/sequence.h"

namespace lora_kernels::cuda {
namespace launching {

inline Int8Epilogue int8_epilogue(const Int8LoraLinearProblem& p, const Int8LoraLinearArgs& args, float* y) {
  Int8Epilogue out;
  out.wide = p.top_k > 0;
  out.e.bias = p.has_bias ? args.bias : nullptr;
  out.e.bias_type = p.bias_dtype;
  out.e.activation = p.activation;
  out.e.residual = p.has_residual ? args.residual : nullptr;
  out.e.y = out.wide ? y : args.y;
  out.e.columns = static_cast<int>(p.out_features);
  out.eights = p.out_features % 8 == 0 && reinterpret_cast<uintptr_t>(out.e.y) % 16 == 0;
  return out;
}

inline UpFactor up_factor(const LoraShape& shape, const LoraBank& bank) {
  const int64_t block = bank.b_stride_block ? bank.b_stride_block : kLoraBlockColumns * bank.b_stride_out;
  return {bank.b, bank.b_stride_rank, bank.b_stride_out, block, shape.dtype};
}

// What the rows' kernel reads and writes; A as it is.
template <class T>
Int8RowsParams rows_params(const Int8LoraLinearPlan& plan, const Int8LoraLinearArgs& args, const Int8Workspace& w) {
  const Int8LoraLinearProblem& p = plan.problem;
  Int8RowsParams rows;
  rows.x = matrix<T>(args.x, args.x_stride, p.rows, p.in_features);
  rows.norm_weight = p.has_norm ? args.norm_weight : nullptr;
  rows.norm_bias = args.norm_bias;
  rows.norm_type = p.norm_dtype;
  rows.norm_eps = p.norm_eps;
  rows.x_scale = p.static_scale ? args.x_scale : nullptr;
  rows.host_x_scale = p.static_scale ? args.host_x_scale : 0;
  rows.q = w.q;
  rows.q_stride = w.q_stride;
  rows.scales = w.scales;
  rows.t = w.t;
  rows.staged_bytes = plan.cuda.staged_bytes;
  rows.rows_of_block = plan.cuda.rows_of_block;
  rows.t_stride = t_stride(p.lora);
  if (p.lora.present() && p.in_features > 0) {
    rows.routing = routing_of(p.lora, args.lora, p.rows);
    rows.a = matrix<T>(args.lora.a, args.lora.a_stride, p.lora.total_rank, p.in_features);
  }
  rows.staged_a_bytes = rows.a.aligned ? plan.cuda.staged_a_bytes : 0;
  return rows;
}

inline PackedWeight packed_weight(const Int8LoraLinearProblem& p, const Int8LoraLinearArgs& args) {
  return {args.packed_weight, int8_block_bytes(p.in_features),
          static_cast<int>(int8_padded_depth(p.in_features) / kInt8StepDepth), static_cast<int>(p.out_features)};
}

// Of few rows; where blocks make these for themselves, they lie in shared memory.
inline Int8FewRowsParams few_rows_params(const Int8LoraLinearPlan& plan, const Int8LoraLinearArgs& args,
                                         const Int8RowsParams& rows, const Int8Workspace& w) {
  const Int8LoraLinearProblem& p = plan.problem;
  Int8FewRowsParams out{rows,
                        packed_weight(p, args),
                        {rows.t, rows.t_stride, up_factor(p.lora, args.lora), rows.routing},
                        int8_epilogue(p, args, w.y),
                        plan.cuda.splits,
                        w.sums};
  out.cluster = plan.cuda.cluster;
  if (plan.cuda.path == CudaInt8LoraLinearPath::kFused) {
    out.rows.q_stride = int8_shared_row(round_up(p.in_features, kInt8Step));
    out.rows.rows_of_block = kInt8Rows;
    out.staged_w = plan.cuda.staged_w;
  }
  return out;
}

// Of shared memory, for what is staged: int8_staged() of the plan.
inline int64_t staged_bytes(const Int8RowsParams& p, int tiles) {
  if (!p.staged_bytes) return 0;
  const int64_t norm_size = p.norm_weight ? static_cast<int64_t>(size_of(p.norm_type)) : 0;
  return std::min(p.x.rows, p.rows_of_block) * int64_t{p.staged_bytes} + 2 * round_up(p.x.columns * norm_size, 16) +
         8 * tiles * p.staged_a_bytes;
}
template <class T>
size_t fused_bytes(const Int8LoraLinearPlan& plan, const Int8FewRowsParams& params) {
  const Int8LoraLinearProblem& p = plan.problem;
  const int64_t steps = tiles(p.in_features, kInt8Step), of_block = tiles(steps, params.cluster);
  return static_cast<size_t>(int8_fused_bytes(p.rows, p.in_features, t_stride(p.lora), sizeof(T), params.cluster) +
                             staged_bytes(params.rows, 2) +
                             (params.staged_w ? of_block * kInt8Step * kInt8FewColumns : 0));
}

// False, and nothing launched, where the driver knows no tensor maps.
template <class T>
bool int8_tiled_wgmma(Sequence* s, const CudaInt8LoraLinearPlan& plan, const Int8GemmParams& p) {
  Int8WgmmaParams w{};
  w.gemm = p;
  const auto run = [&](auto shape, auto kernel, const char* name, unsigned clusters, size_t shared) {
    using Shape = decltype(shape);
    if (!make_int8_maps(&w, Shape::kBoxRows, Shape::kBoxBlocks)) return false;
    s->run<decltype(kernel)::value>(name, dim3(clusters * kClusterBlocks, 1, 1), Shape::kThreads, shared, w,
                                    plan.early_start, false, kClusterBlocks);
    return true;
  };
  if constexpr (sizeof(T) == 2) {
    // y and a residual may be views, which begin in the midst of a word: then the small tiles make y.
    const auto begin = reinterpret_cast<uintptr_t>(p.epilogue.e.y) | reinterpret_cast<uintptr_t>(p.epilogue.e.residual);
    const auto staying = [&](auto rows, const char* name) {
      using Shape = Int8PersistentShape<decltype(rows)::value>;
      using Pair = Int8PersistentPair<Shape>;
      constexpr auto kKernel = &int8_persistent<T, Shape::kRows>;
      const unsigned pairs = tiles(p.rows, Pair::kRows) * tiles(p.w.columns, Pair::kColumns);
      const unsigned most = std::max(1u, static_cast<unsigned>(plan.resident) / kClusterBlocks);
      return run(Shape(), std::integral_constant<decltype(kKernel), kKernel>(), name, std::min(pairs, most),
                 Int8PersistentBlock<T, Shape>::kSharedBytes);
    };
    if (begin % 4 == 0 && plan.wgmma_rows > Int8WgmmaShape::kRows)
      return plan.wgmma_rows == kInt8PersistentRows
                 ? staying(std::integral_constant<int, kInt8PersistentRows>(), "int8_persistent<256x128>")
                 : staying(std::integral_constant<int, kInt8PersistentMostRows>(), "int8_persistent<320x128>");
  }
  using Shape = Int8WgmmaShape;
  return run(Shape(), std::integral_constant<decltype(&int8_wgmma<T>), &int8_wgmma<T>>(), "int8_wgmma<128x128>",
             tiles(p.rows, kClusterBlocks * Shape::kRows) * tiles(p.w.columns, Shape::kColumns),
             Int8WgmmaLayout<T>::kSharedBytes);
}

template <class T>
void int8_rows_all(Sequence* s, const Int8RowsParams& p, bool early) {
  const dim3 grid(tiles(p.x.rows, p.rows_of_block), 1, 1);
  const auto bytes = [&](int tiles) { return static_cast<size_t>(int8_rows_bytes(tiles) + staged_bytes(p, tiles)); };
  if (p.routing.max_rank <= 16)
    s->run<&int8_rows<T, 2>>("int8_rows<16>", grid, kInt8Threads, bytes(2), p, early);
  else
    s->run<&int8_rows<T, 4>>("int8_rows<32>", grid, kInt8Threads, bytes(4), p, early);
}

template <class T>
void int8_choose(Sequence* s, const Int8LoraLinearPlan& plan, const Int8LoraLinearArgs& args, const Int8Workspace& w) {
  const Int8LoraLinearProblem& problem = plan.problem;
  TopParams p;
  p.y = w.y;
  p.columns = static_cast<int>(problem.out_features);
  p.parts = static_cast<int>(tiles(problem.out_features, kTopColumns));
  p.k = static_cast<int>(problem.top_k);
  p.values = w.top_values;
  p.places = w.top_places;
  p.exponents = problem.log_sum ? w.exponents : nullptr;
  p.top_columns = args.top_columns;
  p.top_values = args.top_values;
  p.log_sum = problem.log_sum ? args.log_sum : nullptr;
  const bool early = plan.cuda.early_start;
  const unsigned rows = static_cast<unsigned>(problem.rows);
  s->run<&top_parts<T>>("top_parts", dim3(static_cast<unsigned>(p.parts), rows, 1), kTopThreads, kTopSharedBytes, p,
                        early);
  s->run<&top_merge<T>>("top_merge", dim3(rows, 1, 1), 32, 0, p, early);
}

}  // namespace launching

template <class T>
Status Int8LoraLinearKernels<T>::forward(const Int8LoraLinearPlan& plan, const Int8LoraLinearArgs& args, void* stream) {
  using namespace launching;
  using Path = CudaInt8LoraLinearPath;
  const Int8LoraLinearProblem& problem = plan.problem;
  const CudaInt8LoraLinearPlan& chosen = plan.cuda;
  const int64_t M = problem.rows, N = problem.out_features, K = problem.in_features, R = problem.lora.total_rank;
  Workspace memory{static_cast<char*>(args.workspace)};
  const Int8Workspace w(memory, plan);
  Sequence s(stream);

  Int8RowsParams rows = rows_params<T>(plan, args, w);
  if (chosen.convert_a) {
    const ConvertParams p{
        {args.lora.a, args.lora.a_stride, 1, problem.lora.dtype}, w.a, static_cast<int>(R), static_cast<int>(K)};
    s.run<&convert_factor<T>>("convert_factor", dim3(tiles(K, 32), tiles(R, 32), 1), 256, 32 * 33 * 4, p);
    rows.a = matrix<T>(w.a, K, R, K);
    rows.staged_a_bytes = rows.a.aligned ? chosen.staged_a_bytes : 0;
  }

  if (chosen.path == Path::kTiled) {
    // Not early itself: the product, which starts while it runs, reads w before it waits.
    int8_rows_all<T>(&s, rows, false);
    Int8GemmParams p;
    p.q = w.q;
    p.q_stride = w.q_stride;
    p.scales = w.scales;
    p.w = packed_weight(problem, args);
    p.rows = static_cast<int>(M);
    p.t = matrix<T>(w.t, rows.t_stride, M, problem.lora.max_rank);
    p.up = up_factor(problem.lora, args.lora);
    p.routing = rows.routing;
    p.epilogue = int8_epilogue(problem, args, w.y);
    const auto tiled = [&](auto shape, auto kernel, const char* name) {
      using Shape = decltype(shape);
      const dim3 grid(tiles(M, Shape::kRows) * tiles(N, Shape::kColumns), 1, 1);
      s.run<decltype(kernel)::value>(name, grid, Shape::kThreads, Int8GemmLayout<T, Shape>::kSharedBytes, p,
                                     chosen.early_start);
    };
    const bool launched = chosen.wgmma_rows && int8_tiled_wgmma<T>(&s, chosen, p);
    if (!launched && chosen.large_tiles)
      tiled(LargeShape(), std::integral_constant<decltype(&int8_gemm<T, LargeShape>), &int8_gemm<T, LargeShape>>(),
            "int8_gemm<128x128>");
    else if (!launched)
      tiled(SmallShape(), std::integral_constant<decltype(&int8_gemm<T, SmallShape>), &int8_gemm<T, SmallShape>>(),
            "int8_gemm<64x64>");
  } else {
    const unsigned cluster = static_cast<unsigned>(chosen.cluster);
    const dim3 grid(tiles(N, kInt8FewColumns) * cluster, static_cast<unsigned>(chosen.splits), 1);
    const Int8FewRowsParams p = few_rows_params(plan, args, rows, w);
    if (chosen.path == Path::kFused) {
      s.run<&int8_few_rows<T, 1, true>>("int8_few_rows<fused>", grid, kInt8Threads, fused_bytes<T>(plan, p), p,
                                        chosen.early_start, false, cluster);
    } else {
      int8_rows_all<T>(&s, rows, chosen.early_start);
      const auto bytes = [&](int tiles) {
        return static_cast<size_t>(int8_part_bytes(tiles) + int8_exchanged_bytes(M, 0, chosen.cluster));
      };
      if (M <= 16)
        s.run<&int8_few_rows<T, 1, false>>("int8_few_rows<16>", grid, kInt8Threads, bytes(1), p, chosen.early_start,
                                           false, cluster);
      else
        s.run<&int8_few_rows<T, 2, false>>("int8_few_rows<32>", grid, kInt8Threads, bytes(2), p, chosen.early_start,
                                           false, cluster);
    }
    if (p.splits > 1)
      s.run<&int8_combine<T>>("int8_combine", dim3(tiles(M * N, 256), 1, 1), 256, 0, p, chosen.early_start);
  }
  if (problem.top_k) int8_choose<float>(&s, plan, args, w);
  return s.status();
}

template <class T>
Status Int8LoraLinearKernels<T>::forward_together(const Int8LoraLinearPlan* const* plans,
                                                  const Int8LoraLinearArgs* const* args, int count, void* stream) {
  using namespace launching;
  Sequence s(stream);
  Int8Together p;
  size_t shared = 0;
  for (int i = 0; i < count; ++i) {
    Workspace none;
    const Int8Workspace w(none, *plans[i]);
    p.of[i] = few_rows_params(*plans[i], *args[i], rows_params<T>(*plans[i], *args[i], w), w);
    shared = std::max(shared, fused_bytes<T>(*plans[i], p.of[i]));
  }
  const unsigned cluster = static_cast<unsigned>(plans[0]->cuda.cluster);
  const dim3 grid(tiles(plans[0]->problem.out_features, kInt8FewColumns) * cluster, 1, static_cast<unsigned>(count));
  s.run<&int8_together<T>>("int8_together", grid, kInt8Threads, shared, p, plans[0]->cuda.early_start, false, cluster);
  return s.status();
}

}  // namespace lora_kernels::cuda
