// Prints how much dynamic shared memory each kernel takes: its name as cuda_check.py has it, a tab, bytes.
#include <cstdio>

#include "cuda/int8_lora_linear_launch.cuh"
#include "cuda/kv_attention_step_launch.cuh"
#include "cuda/kv_pack_launch.cuh"
#include "cuda/kv_relative_step_launch.cuh"
#include "cuda/lora_linear_launch.cuh"

using namespace lora_kernels::cuda;

template <class T, class S, Product P>
void gemm_of(const char* name) {
  std::printf("gemm<%s>\t%zu\n", name, GemmLayout<T, S, P>::kSharedBytes);
}
#define ALL(T, S)                                                          \
  gemm_of<T, S, Product::kForward>(#T ", " #S ", kForward");               \
  gemm_of<T, S, Product::kInTile>(#T ", " #S ", kInTile");                 \
  gemm_of<T, S, Product::kInputGradient>(#T ", " #S ", kInputGradient");   \
  gemm_of<T, S, Product::kMaskedGradient>(#T ", " #S ", kMaskedGradient"); \
  gemm_of<T, S, Product::kRowSums>(#T ", " #S ", kRowSums");
#define SKINNY(T)                                                        \
  std::printf("down<" #T ", 2>\t%zu\n", kDownSharedBytes<2>);            \
  std::printf("down<" #T ", 4>\t%zu\n", kDownSharedBytes<4>);            \
  std::printf("few_rows<" #T ", 1>\t%zu\n", few_rows_bytes<1>(true, 1)); \
  std::printf("few_rows<" #T ", 2>\t%zu\n", few_rows_bytes<2>(true, 1)); \
  std::printf("few_rows<" #T ", 4>\t%zu\n", few_rows_bytes<4>(true, 1));
#define SIZE(name, bytes) std::printf(name "\t%zu\n", static_cast<size_t>(bytes));
#define INT8(T)                                                                         \
  SIZE("dy_once<" #T ">", dy_once_bytes<T>(1, 16));                                     \
  SIZE("int8_rows<" #T ", 2>", int8_rows_bytes(2));                                     \
  SIZE("int8_rows<" #T ", 4>", int8_rows_bytes(4));                                     \
  SIZE("int8_few_rows<" #T ", 1, false>", int8_part_bytes(1));                          \
  SIZE("int8_few_rows<" #T ", 2, false>", int8_part_bytes(2));                          \
  SIZE("int8_few_rows<" #T ", 1, true>", int8_fused_bytes(16, 1280, 16, sizeof(T), 1)); \
  SIZE("int8_together<" #T ">", int8_fused_bytes(16, 1280, 16, sizeof(T), 1));          \
  INT8_GEMM(T, LargeShape) INT8_GEMM(T, SmallShape)
#define INT8_GEMM(T, S) SIZE("int8_gemm<" #T ", " #S ">", (Int8GemmLayout<T, S>::kSharedBytes));
#define KV_ATTEND(Q, S, G, PLACES, COUNT)                                                  \
  SIZE("kv_attend<" #Q ", " #S ", " #G ", " #PLACES ">",                                   \
       kv_shared_bytes(G, kKvQueries, COUNT, kv_query_bytes(G, sizeof(KvProduct<Q, S>))) + \
           (kv_shares(G, false) ? kv_exchange_bytes(G, kKvQueries) : 0));
#define KV_BLOCKED(Q, G)             \
  SIZE("kv_blocked<" #Q ", " #G ">", \
       kv_shared_bytes(G, kKvBlockedQueries, 0) + kv_exchange_bytes(G, kKvBlockedQueries));
#define KV_RELATIVE(Q, S, G) \
  SIZE("kv_relative<" #Q ", " #S ", " #G ">", kv_relative_shared_bytes(G, sizeof(KvProduct<Q, S>)));
#define KV_FRAMES(Q, S) KV_RELATIVE(Q, S, 1) KV_RELATIVE(Q, S, 2)
#define KV_CACHE(Q, S)                    \
  KV_ATTEND(Q, S, 1, false, 0)            \
  KV_ATTEND(Q, S, 2, false, 0)            \
  KV_ATTEND(Q, S, 1, true, kKvMostPlaces) \
  KV_ATTEND(Q, S, 2, true, kKvMostPlaces)
#define KV(Q)               \
  KV_CACHE(Q, Q);           \
  KV_CACHE(Q, signed char); \
  KV_BLOCKED(Q, 1) KV_BLOCKED(Q, 2) SIZE("kv_pack_kernel<" #Q ">", kKvPackSharedBytes);
#define WGMMA_OF(T, N, P) \
  SIZE("gemm_wgmma<" #T ", WgmmaShape<" #N ">, " #P ">", (WgmmaLayout<T, WgmmaShape<N>, Product::P>::kSharedBytes));
#define BESIDE(T) SIZE("down_beside<" #T ">", kDownSharedBytes<2>);
#define WGMMA(T, N)               \
  WGMMA_OF(T, N, kForward);       \
  WGMMA_OF(T, N, kInputGradient); \
  WGMMA_OF(T, N, kMaskedGradient);
#define INT8_WGMMA(T) SIZE("int8_wgmma<" #T ">", Int8WgmmaLayout<T>::kSharedBytes);
#define PERSISTENT(T, N) \
  SIZE("int8_persistent<" #T ", " #N ">", (Int8PersistentBlock<T, Int8PersistentShape<N>>::kSharedBytes));

int main() {
  BESIDE(__half);
  BESIDE(__nv_bfloat16);
  WGMMA(__half, 128);
  WGMMA(__half, 256);
  WGMMA(__nv_bfloat16, 128);
  WGMMA(__nv_bfloat16, 256);
  ALL(__half, LargeShape);
  ALL(__half, SmallShape);
  SKINNY(__half);
  ALL(__nv_bfloat16, LargeShape);
  ALL(__nv_bfloat16, SmallShape);
  SKINNY(__nv_bfloat16);
  ALL(float, LargeShape);
  ALL(float, SmallShape);
  SKINNY(float);
  INT8(__half);
  INT8(__nv_bfloat16);
  INT8(float);
  INT8_WGMMA(__half);
  INT8_WGMMA(__nv_bfloat16);
  INT8_WGMMA(float);
  PERSISTENT(__half, 256);
  PERSISTENT(__half, 320);
  PERSISTENT(__nv_bfloat16, 256);
  PERSISTENT(__nv_bfloat16, 320);
  KV(__half);
  KV(__nv_bfloat16);
  KV(float);
  KV_CACHE(float, __half);
  KV_CACHE(float, __nv_bfloat16);
  KV_FRAMES(__half, __half);
  KV_FRAMES(__nv_bfloat16, __nv_bfloat16);
  KV_FRAMES(float, float);
  KV_FRAMES(float, __half);
  KV_FRAMES(float, __nv_bfloat16);
  SIZE("kv_weights<float>", 2 * kKvFinishThreads / 32 * 4);
  std::printf("top_parts<float>\t%zu\n", kTopSharedBytes);
}
