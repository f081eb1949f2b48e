// The launches of lora_linear for one storage type: a plan's kernels in order on one stream.
#pragma once

#include "cuda/dy_once.cuh"
#include "cuda/few_rows.cuh"
#include "cuda/gemm.cuh"
#include "cuda/gemm_wgmma.cuh"
#include "cuda/helpers.cuh"
#include "cuda/lora_linear_kernels.h"
#include "cuda/sequence.h"

namespace lora_kernels::cuda {
namespace launching {

template <class Args>
Dropout dropout_of(const LoraLinearProblem& p, const Args& args) {
  Dropout d;
  d.on = p.dropout_p > 0 && p.lora.present();
  d.seed = args.dropout_seed;
  d.seed_on_device = args.dropout_seed_on_device;
  d.threshold = dropout_threshold(p.dropout_p);
  return d;
}

inline float dropout_factor(const LoraLinearProblem& p) { return static_cast<float>(1.0 / (1.0 - p.dropout_p)); }

template <class T>
bool pairs_can_be_stored(const void* y, const void* residual, int64_t columns) {
  const auto even = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % (2 * sizeof(T)) == 0; };
  return columns % 2 == 0 && even(y) && even(residual);
}

template <class T>
void convert(Sequence* s, const Factor& from, int64_t rows, int64_t columns, void* to) {
  ConvertParams p{from, to, static_cast<int>(rows), static_cast<int>(columns)};
  s->run<&convert_factor<T>>("convert_factor", dim3(tiles(columns, 32), tiles(rows, 32), 1), 256, 32 * 33 * 4, p);
}

// t (or u) of all rows; by `beside` blocks, if there are more, which leave the product room.
template <class T>
void down_all(Sequence* s, const DownParams& p, int beside = 0) {
  const unsigned blocks = tiles(p.x.rows, kSkinnyRows);
  if constexpr (sizeof(T) == 2) {
    if (beside > 0) {
      const unsigned most = static_cast<unsigned>(beside);
      return s->run<&down_beside<T>>("down_beside", dim3(blocks < most ? blocks : most, 1, 1), kSkinnyThreads,
                                     kDownSharedBytes<2>, p, false, true);
    }
  }
  // Few rows with many adapters: the adapters of sixteen rows go to blocks of their own.
  unsigned slots = 1;
  if (p.routing.ids && blocks <= 8) slots = static_cast<unsigned>(p.routing.adapters < 16 ? p.routing.adapters : 16);
  const dim3 grid(blocks, slots, 1);
  if (p.routing.max_rank <= 16)
    s->run<&down<T, 2>>("down<16>", grid, kSkinnyThreads, kDownSharedBytes<2>, p);
  else
    s->run<&down<T, 4>>("down<32>", grid, kSkinnyThreads, kDownSharedBytes<4>, p);
}

template <class T, class Shape, Product kProduct>
void tiled(Sequence* s, const char* name, const GemmParams& p, bool early = false) {
  const unsigned blocks = tiles(p.rows, Shape::kRows) * tiles(p.columns, Shape::kColumns);
  s->run<&gemm<T, Shape, kProduct>>(name, dim3(blocks, 1, 1), Shape::kThreads,
                                    GemmLayout<T, Shape, kProduct>::kSharedBytes, p, early);
}

template <class T, int kColumns, Product kProduct>
void tiled_wgmma(Sequence* s, const char* name, const GemmParams& p, bool early = false) {
  using Shape = WgmmaShape<kColumns>;
  using Layout = WgmmaLayout<T, Shape, kProduct>;
  constexpr bool kBf16 = std::is_same_v<T, __nv_bfloat16>;
  const auto map = [&](TensorMap* to, const Matrix& m, int box_rows) {
    return make_tensor_map(to, m.data, kBf16, m.rows, m.columns, m.stride * static_cast<int64_t>(sizeof(T)), box_rows);
  };
  WgmmaParams w{};
  w.gemm = p;
  w.boxes = map(&w.a, p.a, Shape::kRows) && map(&w.b, p.b, Layout::kBBoxRows);
  const unsigned clusters = tiles(p.rows, kClusterBlocks * Shape::kRows) * tiles(p.columns, Shape::kColumns);
  s->run<&gemm_wgmma<T, Shape, kProduct>>(name, dim3(clusters * kClusterBlocks, 1, 1), Shape::kThreads,
                                          Layout::kSharedBytes, w, early, true, kClusterBlocks);
}

// dx by the tiles of the plan; with dropout the branch is masked.
template <class T>
void input_gradient(Sequence* s, const GemmParams& p, const CudaLoraLinearBackwardPlan& plan) {
  if constexpr (sizeof(T) == 2) {
    if (plan.wgmma_columns) {
      if (p.dropout.on && plan.wgmma_columns == 256)
        tiled_wgmma<T, 256, Product::kMaskedGradient>(s, "gemm_wgmma<masked dx, 128x256>", p);
      else if (p.dropout.on)
        tiled_wgmma<T, 128, Product::kMaskedGradient>(s, "gemm_wgmma<masked dx, 128x128>", p);
      else if (plan.wgmma_columns == 256)
        tiled_wgmma<T, 256, Product::kInputGradient>(s, "gemm_wgmma<dx, 128x256>", p);
      else
        tiled_wgmma<T, 128, Product::kInputGradient>(s, "gemm_wgmma<dx, 128x128>", p);
      return;
    }
  }
  if (p.dropout.on && plan.large_tiles)
    tiled<T, LargeShape, Product::kMaskedGradient>(s, "gemm<masked dx, 128x128>", p);
  else if (p.dropout.on)
    tiled<T, SmallShape, Product::kMaskedGradient>(s, "gemm<masked dx, 64x64>", p);
  else if (plan.large_tiles)
    tiled<T, LargeShape, Product::kInputGradient>(s, "gemm<dx, 128x128>", p);
  else
    tiled<T, SmallShape, Product::kInputGradient>(s, "gemm<dx, 64x64>", p);
}

// out [out_rows, columns] = sums over rows of at b, split among blocks and added in order.
template <class T, class Shape>
void row_sums(Sequence* s, const char* name, GemmParams p, int64_t out_rows, int most_rows, float* out, float* parts) {
  p.sums = p.splits > 1 ? parts : out;
  p.split_stride = out_rows * p.columns;
  const unsigned adapters = p.routing.adapters > 0 ? static_cast<unsigned>(p.routing.adapters) : 1;
  const dim3 grid(tiles(p.columns, Shape::kColumns), tiles(most_rows, Shape::kRows),
                  static_cast<unsigned>(p.splits) * adapters);
  s->run<&gemm<T, Shape, Product::kRowSums>>(name, grid, Shape::kThreads,
                                             GemmLayout<T, Shape, Product::kRowSums>::kSharedBytes, p);
  if (p.splits == 1) return;
  const AddPartsParams add{parts, out, p.splits, out_rows * p.columns};
  const unsigned blocks = tiles(add.count, 256);
  s->run<&add_parts<float>>("add_parts", dim3(blocks < 4096 ? blocks : 4096, 1, 1), 256, 0, add);
}

// u and dB from one reading of dy.
template <class T>
void dy_at_once(Sequence* s, const DyOnceParams& p, const CudaLoraLinearBackwardPlan& plan, const JoinPartsParams& to) {
  s->run<&dy_once<T>>("dy_once",
                      dim3(static_cast<unsigned>(plan.column_splits), static_cast<unsigned>(plan.row_splits), 1),
                      kDyOnceThreads, dy_once_bytes<T>(p.row_tiles, p.width), p);
  const int64_t results = int64_t{p.dy.rows} * p.width + int64_t{p.routing.max_rank} * p.dy.columns;
  const unsigned blocks = tiles(results, 256);
  s->run<&join_parts<T>>("join_parts", dim3(blocks < 4096 ? blocks : 4096, 1, 1), 256, 0, to);
}

template <class T, int kTiles>
void few(Sequence* s, const FewRowsParams& p, bool early) {
  const unsigned cluster = static_cast<unsigned>(p.cluster);
  const unsigned blocks = tiles(tiles(p.w.rows, kSkinnyRows), p.cluster) * cluster;
  s->run<&few_rows<T, kTiles>>("few_rows", dim3(blocks, static_cast<unsigned>(p.splits), 1), kSkinnyThreads,
                               few_rows_bytes<kTiles>(p.makes_t, p.cluster), p, early, false, cluster);
}

}  // namespace launching

template <class T>
Status LoraLinearKernels<T>::forward(const LoraLinearPlan& plan, const LoraLinearArgs& args, void* stream) {
  using namespace launching;
  const LoraLinearProblem& problem = plan.problem;
  const int64_t M = problem.rows, N = problem.out_features, K = problem.in_features, R = problem.lora.total_rank;
  Workspace memory{static_cast<char*>(args.workspace)};
  const ForwardWorkspace w(memory, plan);
  Sequence s(stream);
  const bool lora = plan.cuda.path != CudaLoraLinearPath::kBase && problem.lora.present() && K > 0;
  const bool precise = !problem.allow_tf32;
  void* t = problem.keeps_t ? args.t : w.t;
  const int64_t stride = problem.keeps_t ? kept_t_columns(problem.lora) : t_stride(problem.lora);

  Routing routing;
  Matrix a;
  Factor up;
  if (lora) {
    routing = routing_of(problem.lora, args.lora, M);
    up = {args.lora.b, args.lora.b_stride_rank, args.lora.b_stride_out, problem.lora.dtype};
    a = matrix<T>(args.lora.a, args.lora.a_stride, R, K);
    if (plan.cuda.convert_a) {
      convert<T>(&s, {args.lora.a, args.lora.a_stride, 1, problem.lora.dtype}, R, K, w.a);
      a = matrix<T>(w.a, K, R, K);
    }
  }
  const Matrix x = matrix<T>(args.x, args.x_stride, M, K), weight = matrix<T>(args.weight, args.weight_stride, N, K);
  Epilogue epilogue;
  epilogue.bias = problem.has_bias ? args.bias : nullptr;
  epilogue.bias_type = problem.bias_dtype;
  epilogue.activation = problem.activation;
  epilogue.residual = problem.has_residual ? args.residual : nullptr;
  epilogue.y = args.y;
  epilogue.columns = static_cast<int>(N);
  epilogue.pairs = pairs_can_be_stored<T>(args.y, epilogue.residual, N);

  const bool separate = lora && plan.cuda.path != CudaLoraLinearPath::kInTile && !plan.cuda.t_in_blocks;
  if (separate) {
    DownParams p;
    p.x = x;
    p.a = a;
    p.routing = routing;
    p.dropout = dropout_of(problem, args);
    p.factor = dropout_factor(problem);
    p.t = t;
    p.t_stride = stride;
    p.precise = precise;
    down_all<T>(&s, p, plan.cuda.t_blocks);
  }
  const bool early = separate && plan.cuda.early_start;

  if (plan.cuda.path == CudaLoraLinearPath::kFewRows) {
    FewRowsParams p;
    p.w = weight;
    p.x = x;
    p.branch = {t, stride, up, routing};
    p.epilogue = epilogue;
    p.splits = plan.cuda.splits;
    p.sums = w.sums;
    p.precise = precise;
    p.makes_t = lora && plan.cuda.t_in_blocks;
    p.cluster = p.makes_t ? plan.cuda.cluster : 1;
    p.a = a;
    if (M <= 8)
      few<T, 1>(&s, p, early);
    else if (M <= 16)
      few<T, 2>(&s, p, early);
    else
      few<T, 4>(&s, p, early);
    if (p.splits > 1) {
      const CombineParams c{w.sums, p.splits, static_cast<int>(M), p.branch, epilogue};
      s.run<&combine<T>>("combine", dim3(tiles(M * N, 256), 1, 1), 256, 0, c);
    }
    return s.status();
  }

  GemmParams p;
  p.a = x;
  p.b = weight;
  p.rows = static_cast<int>(M);
  p.columns = static_cast<int>(N);
  p.depth = static_cast<int>(K);
  p.precise = precise;
  p.t = matrix<T>(t, stride, M, problem.lora.max_rank);
  p.up = up;
  p.down = a;
  p.routing = routing;
  p.epilogue = epilogue;
  const bool in_tile = lora && plan.cuda.path == CudaLoraLinearPath::kInTile;
  if constexpr (sizeof(T) == 2) {
    if (plan.cuda.wgmma_columns) {
      if (plan.cuda.wgmma_columns == 256)
        tiled_wgmma<T, 256, Product::kForward>(&s, "gemm_wgmma<128x256>", p, early);
      else
        tiled_wgmma<T, 128, Product::kForward>(&s, "gemm_wgmma<128x128>", p, early);
      return s.status();
    }
  }
  if (in_tile && plan.cuda.large_tiles)
    tiled<T, LargeShape, Product::kInTile>(&s, "gemm<in tile, 128x128>", p, false);
  else if (in_tile)
    tiled<T, SmallShape, Product::kInTile>(&s, "gemm<in tile, 64x64>", p, false);
  else if (plan.cuda.large_tiles)
    tiled<T, LargeShape, Product::kForward>(&s, "gemm<forward, 128x128>", p, early);
  else
    tiled<T, SmallShape, Product::kForward>(&s, "gemm<forward, 64x64>", p, early);
  return s.status();
}

template <class T>
Status LoraLinearKernels<T>::backward(const LoraLinearBackwardPlan& plan, const LoraLinearBackwardArgs& args,
                                      void* stream) {
  using namespace launching;
  const LoraLinearBackwardProblem& b = plan.problem;
  const LoraLinearProblem& problem = b.forward;
  const int64_t M = problem.rows, N = problem.out_features, K = problem.in_features, R = problem.lora.total_rank;
  Workspace memory{static_cast<char*>(args.workspace)};
  const BackwardWorkspace w(memory, plan);
  Sequence s(stream, plan.cuda.early_start);
  const bool lora = problem.lora.present() && (b.needs_dx || b.needs_dlora);
  const bool once = lora && b.needs_dlora && plan.cuda.dy_once;
  const int64_t stride = t_stride(problem.lora);
  const bool precise = !problem.allow_tf32;
  const Matrix x = matrix<T>(args.x, args.x_stride, M, K), dy = matrix<T>(args.dy, N, M, N);
  const bool has_t = t_is_there(b);
  const Matrix t = has_t ? matrix<T>(args.t, kept_t_columns(problem.lora), M, problem.lora.max_rank)
                         : matrix<T>(w.t, stride, M, problem.lora.max_rank);
  const Matrix u = matrix<T>(w.u, stride, M, problem.lora.max_rank);
  const Dropout dropout = dropout_of(problem, args);
  Routing routing;
  Matrix a;
  if (lora) {
    routing = routing_of(problem.lora, args.lora, M);
    a = matrix<T>(args.lora.a, args.lora.a_stride, R, K);
    if (w.a) {
      convert<T>(&s, {args.lora.a, args.lora.a_stride, 1, problem.lora.dtype}, R, K, w.a);
      a = matrix<T>(w.a, K, R, K);
    }
    convert<T>(&s, {args.lora.b, args.lora.b_stride_rank, args.lora.b_stride_out, problem.lora.dtype}, R, N, w.b);
    DownParams p;
    p.routing = routing;
    p.factor = dropout_factor(problem);
    p.t_stride = stride;
    p.precise = precise;
    if (b.needs_dlora && !has_t) {
      p.x = x;
      p.a = a;
      p.dropout = dropout;
      p.t = w.t;
      down_all<T>(&s, p);
    }
    if (once) {
      DyOnceParams both;
      both.dy = dy;
      both.b = matrix<T>(w.b, N, R, N);
      both.t = t;
      both.routing = routing;
      both.row_tiles = plan.cuda.row_tiles;
      both.row_splits = plan.cuda.row_splits;
      both.column_splits = plan.cuda.column_splits;
      both.width = static_cast<int>(stride);
      both.u_parts = w.u_parts;
      both.b_parts = w.b_parts;
      both.precise = precise;
      dy_at_once<T>(&s, both, plan.cuda, {both, p.factor, w.u, stride, args.dlora_b});
    } else {
      p.x = dy;
      p.a = matrix<T>(w.b, N, R, N);
      p.dropout = Dropout();
      p.t = w.u;
      down_all<T>(&s, p);
    }
  }
  if (b.needs_dx) {
    GemmParams p;
    p.a = dy;
    p.b = matrix<T>(args.weight, args.weight_stride, N, K);
    p.rows = static_cast<int>(M);
    p.columns = static_cast<int>(K);
    p.depth = static_cast<int>(N);
    p.precise = precise;
    p.t = u;
    p.up_rows = a;
    p.routing = routing;
    p.dropout = dropout;
    p.epilogue.y = args.dx;
    p.epilogue.columns = static_cast<int>(K);
    p.epilogue.pairs = pairs_can_be_stored<T>(args.dx, nullptr, K);
    input_gradient<T>(&s, p, plan.cuda);
  }
  GemmParams p;
  p.depth = static_cast<int>(M);
  p.precise = precise;
  if (b.needs_dlora && lora) {
    p.routing = routing;
    if (!once) {
      p.a = t;
      p.b = dy;
      p.columns = static_cast<int>(N);
      p.splits = plan.cuda.b_splits;
      row_sums<T, SmallShape>(&s, "gemm<dB>", p, R, routing.max_rank, args.dlora_b, w.b_sums);
    }
    p.a = u;
    p.b = x;
    p.dropout = dropout;
    p.columns = static_cast<int>(K);
    p.splits = plan.cuda.a_splits;
    row_sums<T, SmallShape>(&s, "gemm<dA>", p, R, routing.max_rank, args.dlora_a, w.a_sums);
  }
  if (b.needs_dweight) {
    p.routing = Routing();
    p.dropout = Dropout();
    p.a = dy;
    p.b = x;
    p.rows = static_cast<int>(N);
    p.columns = static_cast<int>(K);
    p.splits = plan.cuda.w_splits;
    row_sums<T, LargeShape>(&s, "gemm<dW>", p, N, static_cast<int>(N), args.dweight, w.w_sums);
  }
  if (b.needs_dbias) {
    const ColumnSumsParams c{args.dy, args.dbias, M, static_cast<int>(N)};
    s.run<&column_sums<T>>("column_sums", dim3(tiles(N, 32), 1, 1), 256, 256 * 4, c);
  }
  return s.status();
}

}  // namespace lora_kernels::cuda
