// Boxes of a matrix, brought to shared memory by the tensor memory accelerator (sm_90 on), and barriers in shared
// memory that count their bytes, and threads that arrive. One thread asks; whoever waits on the barrier sees what has
// come, and so does wgmma. A box can be brought to all blocks of a cluster at once (cluster.h), for one reading of L2.
//
//   make_tensor_map  on the host: where a matrix of 16-bit elements lies, or planes of rows of bytes, one behind the
//                    other, and boxes of it 128 bytes wide; the map is a parameter of the kernel (__grid_constant__),
//                    so no memory is taken
//   init_arrivals    a barrier of one arrival, or so many, for each phase
//   expect_bytes     an arrival, and how many bytes the phase waits for besides
//   load_box         rows `row` on and columns `column` on, zeros beyond the matrix, in wgmma.h's 128-byte swizzle;
//                    share_box: to the same place of all blocks of the cluster, whose barriers in the same place each
//                    count its bytes
//   load_planes      the same of planes of bytes, and share_planes
//   wait_for_phase   until the phase of this parity is over
#pragma once

#include "cuda/primitives/cluster.h"
#include "cuda/primitives/shared.h"

#if !defined(LORA_KERNELS_EMULATION)
#include <cudaTypedefs.h>
#endif

namespace lora_kernels::cuda {

struct alignas(128) TensorMap {
  uint64_t opaque[16];
};

#if !defined(LORA_KERNELS_EMULATION)
namespace detail {

// A map of two or three dimensions, the innermost first, in boxes of 128 bytes of it.
inline bool encode_tensor_map(TensorMap* map, CUtensorMapDataType type, uint32_t rank, const void* data,
                              const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box) {
  using Encode = PFN_cuTensorMapEncodeTiled_v12000;
  static const Encode encode = [] {  // of the driver that is loaded: asked for once
    void* found = nullptr;
    cudaDriverEntryPointQueryResult state{};
#if CUDART_VERSION >= 12050
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &state);
#else
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &state);
#endif
    if (error != cudaSuccess) cudaGetLastError();
    return error == cudaSuccess && state == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(found) : nullptr;
  }();
  if (!encode) return false;
  static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) && alignof(TensorMap) >= alignof(CUtensorMap));
  const cuuint32_t steps[3] = {1, 1, 1};
  return encode(reinterpret_cast<CUtensorMap*>(map), type, rank, const_cast<void*>(data), sizes, strides, box, steps,
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace detail
#endif

// False where there can be none: an address or a stride that is no multiple of 16 bytes, an empty matrix, a driver that
// does not know them. The caller then copies by itself.
inline bool make_tensor_map(TensorMap* map, const void* data, bool bf16, int64_t rows, int64_t columns,
                            int64_t stride_bytes, int box_rows) {
  if (reinterpret_cast<uintptr_t>(data) % 16 || stride_bytes % 16 || rows <= 0 || columns <= 0) return false;
  if (stride_bytes >= int64_t{1} << 40) return false;
#if defined(LORA_KERNELS_EMULATION)
  static_cast<void>(bf16);
  const emulation::Box box{static_cast<const char*>(data), 1, rows, columns * 2, 0, stride_bytes, 1, box_rows, 0, 0, 0};
  static_assert(sizeof box <= sizeof map->opaque);
  memcpy(map->opaque, &box, sizeof box);
  return true;
#else
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(stride_bytes)};
  const cuuint32_t box[2] = {64, static_cast<cuuint32_t>(box_rows)};
  return detail::encode_tensor_map(map, bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
                                   data, sizes, strides, box);
#endif
}

// Bytes in planes of rows. A plane's stride is a multiple of its rows'.
struct BytePlanes {
  const void* data;
  int64_t planes, rows, row_bytes, plane_stride, stride;
};

inline bool make_tensor_map(TensorMap* map, const BytePlanes& m, int box_planes, int box_rows) {
  constexpr int64_t kMost = int64_t{1} << 40;
  if (m.planes <= 0 || m.rows <= 0 || m.row_bytes <= 0 || m.stride <= 0) return false;
  if (reinterpret_cast<uintptr_t>(m.data) % 16 || m.stride % 16 || m.plane_stride % m.stride) return false;
  if (m.stride >= kMost || m.plane_stride >= kMost) return false;
#if defined(LORA_KERNELS_EMULATION)
  const emulation::Box box{static_cast<const char*>(m.data),
                           m.planes,
                           m.rows,
                           m.row_bytes,
                           m.plane_stride,
                           m.stride,
                           box_planes,
                           box_rows,
                           0,
                           0,
                           0};
  memcpy(map->opaque, &box, sizeof box);
  return true;
#else
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(m.row_bytes), static_cast<cuuint64_t>(m.rows),
                               static_cast<cuuint64_t>(m.planes)};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(m.stride), static_cast<cuuint64_t>(m.plane_stride)};
  const cuuint32_t box[3] = {128, static_cast<cuuint32_t>(box_rows), static_cast<cuuint32_t>(box_planes)};
  return detail::encode_tensor_map(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 3, m.data, sizes, strides, box);
#endif
}

// By one thread; others, and boxes, may use it after this thread's fence and a barrier of the block.
__device__ inline void init_arrivals(uint64_t* barrier, int count = 1) {
#if defined(LORA_KERNELS_EMULATION)
  emulation::init_arrivals(barrier, count);
#else
  if constexpr (kArch >= 90)
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
#endif
}

// Barriers that this thread has made are seen by the boxes that it asks for, and by other blocks of the cluster.
__device__ inline void fence_arrivals() {
#if !defined(LORA_KERNELS_EMULATION)
  if constexpr (kArch >= 90) {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
#endif
}

__device__ inline void expect_bytes(uint64_t* barrier, int bytes) {
#if defined(LORA_KERNELS_EMULATION)
  emulation::expect_bytes(barrier, bytes);
#else
  if constexpr (kArch >= 90)
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
#endif
}

namespace detail {

// With kShared to every block of the cluster. (PTX wants the mask of blocks in a register of 16 bits.)
template <bool kShared>
__device__ inline void load_box(void* to, const TensorMap& map, int row, int column, uint64_t* barrier) {
#if defined(LORA_KERNELS_EMULATION)
  emulation::Box box;
  memcpy(&box, map.opaque, sizeof box);
  box.row = row;
  box.column = column * 2;
  kShared ? emulation::share_box(to, box, barrier, kClusterBlocks) : emulation::load_box(to, box, barrier);
#else
  if constexpr (kArch >= 90 && kShared)
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
        "[%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(to)),
        "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier)), "h"(kAllOfCluster)
        : "memory");
  else if constexpr (kArch >= 90)
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            shared_address(to)),
        "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier))
        : "memory");
#endif
}

template <bool kShared>
__device__ inline void load_planes(void* to, const TensorMap& map, int plane, int row, int column, uint64_t* barrier) {
#if defined(LORA_KERNELS_EMULATION)
  emulation::Box box;
  memcpy(&box, map.opaque, sizeof box);
  box.plane = plane;
  box.row = row;
  box.column = column;
  kShared ? emulation::share_box(to, box, barrier, kClusterBlocks) : emulation::load_box(to, box, barrier);
#else
  if constexpr (kArch >= 90 && kShared)
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
        "[%1, {%2, %3, %4}], [%5], %6;" ::"r"(shared_address(to)),
        "l"(&map), "r"(column), "r"(row), "r"(plane), "r"(shared_address(barrier)), "h"(kAllOfCluster)
        : "memory");
  else if constexpr (kArch >= 90)
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::
            "r"(shared_address(to)),
        "l"(&map), "r"(column), "r"(row), "r"(plane), "r"(shared_address(barrier))
        : "memory");
#endif
}

}  // namespace detail

__device__ inline void load_box(void* to, const TensorMap& map, int row, int column, uint64_t* barrier) {
  detail::load_box<false>(to, map, row, column, barrier);
}
__device__ inline void share_box(void* to, const TensorMap& map, int row, int column, uint64_t* barrier) {
  detail::load_box<true>(to, map, row, column, barrier);
}

// From plane `plane` on.
__device__ inline void load_planes(void* to, const TensorMap& map, int plane, int row, int column, uint64_t* barrier) {
  detail::load_planes<false>(to, map, plane, row, column, barrier);
}
__device__ inline void share_planes(void* to, const TensorMap& map, int plane, int row, int column, uint64_t* barrier) {
  detail::load_planes<true>(to, map, plane, row, column, barrier);
}

__device__ inline void wait_for_phase(uint64_t* barrier, int parity) {
#if defined(LORA_KERNELS_EMULATION)
  emulation::wait_for_phase(barrier, parity);
#else
  if constexpr (kArch >= 90) {
    uint32_t over = 0;
    while (!over)
      asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                   : "=r"(over)
                   : "r"(shared_address(barrier)), "r"(parity)
                   : "memory");
  }
#endif
}

}  // namespace lora_kernels::cuda
