// Neighbouring blocks of a grid that run together, each on a multiprocessor of its own where the scheduler heeds what
// it is asked for (sm_90 on; Launch::cluster), and what one may do in the shared memory of another: bring boxes there
// (tma.h, clusters of kClusterBlocks), send it sixteen bytes, and arrive at its barriers.
//
//   rank_in_cluster    which of its blocks this one is
//   send16             bytes out of registers, which a barrier of tma.h counts where they land
//   arrive             by one thread, at the barrier of tma.h in the same place of a block of the cluster, perhaps its
//                      own: to say that nothing here reads a place any more, which boxes may then fill; and to its own
//                      block, behind __syncwarp(), that what its warp has written there can be read
//   arrive_at_all      the same by a whole warp, for all of its threads, in every block
//   arrive_in_cluster  by all threads of all its blocks, and
//   wait_for_cluster   until all of them have. Before the first use of another block's shared memory, and before a
//                      block ends whose own may still be used.
//
// Blocks hand each other boxes and what they send, which tell the barrier themselves that they have come, and nothing
// else; so nothing here is of the scope of the cluster, where each arrival would be a fence of the whole device and
// each wait one of L1. What has to be in order is: barriers are made before anyone uses them (fence_arrivals of tma.h,
// and the wait for the cluster); reads of a place are over before the arrival (products that have been waited for,
// loads whose values were used, and a barrier of the block or the warp behind both); and boxes are asked for behind the
// wait. CUTLASS's barriers across clusters rest on the same.
#pragma once

#include "cuda/primitives/shared.h"

namespace lora_kernels::cuda {

constexpr unsigned kClusterBlocks = 2;
constexpr uint16_t kAllOfCluster = (1u << kClusterBlocks) - 1;

// Of a cluster of so many blocks: as Launch::cluster says.
__device__ inline unsigned rank_in_cluster(unsigned blocks = kClusterBlocks) { return blockIdx.x % blocks; }

// Sixteen bytes to `to`'s place in the shared memory of `block` of the cluster (perhaps its own); they count as bytes
// of the barrier in the same place as `barrier` there, which that block expects (expect_bytes) and waits for. Its
// threads read them behind wait_for_phase, without a fence or a barrier of another block: the bytes release to the
// cluster, and they lie in the memory of the multiprocessor that waits, where no cache is between (PTX has such a wait
// acquire from the cluster, which would be a fence of L1). The block that sends may end at once, the other not before
// it has waited. wgmma and boxes see them as they see stores: behind fence_proxy() of a thread that has waited.
__device__ inline void send16(void* to, const Vector& v, uint64_t* barrier, unsigned block) {
#if defined(LORA_KERNELS_EMULATION)
  emulation::send16(to, v.v, barrier, static_cast<int>(block));
#else
  if constexpr (kArch >= 90)
    asm volatile(
        "{\n.reg .b32 there, its;\nmapa.shared::cluster.u32 there, %0, %2;\nmapa.shared::cluster.u32 its, %1, %2;\n"
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [there], {%3, %4, %5, %6}, [its];\n}" ::"r"(
            shared_address(to)),
        "r"(shared_address(barrier)), "r"(block), "r"(v.v[0]), "r"(v.v[1]), "r"(v.v[2]), "r"(v.v[3])
        : "memory");
#endif
}

__device__ inline void arrive(uint64_t* barrier, unsigned block) {
#if defined(LORA_KERNELS_EMULATION)
  emulation::arrive(barrier, static_cast<int>(block));
#else
  if constexpr (kArch >= 90)
    asm volatile(
        "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(shared_address(barrier)),
        "r"(block)
        : "memory");
#endif
}

// By all threads of a warp behind a point at which they met (wait_products); nothing if not `there`, which is the same
// for all of them. Without a branch, so that it may stand between products that are in flight: ptxas would put those
// one after another.
__device__ inline void arrive_at_all(uint64_t* barrier, bool there LORA_KERNELS_CALLER) {
#if defined(LORA_KERNELS_EMULATION)
  emulation::collective(~0u, {"arrive_at_all", file, line}, nullptr, 0, [](emulation::Slot*, uint32_t) {}, true);
  const auto block = threadIdx.x % 32;
  if (there && block < kClusterBlocks) emulation::arrive(barrier, static_cast<int>(block));
#else
  if constexpr (kArch >= 90)
    asm volatile(
        "{\n.reg .b32 its;\n.reg .pred p;\nsetp.lt.u32 p, %1, %3;\nmapa.shared::cluster.u32 its, %0, %2;\n"
        "@p mbarrier.arrive.shared::cluster.b64 _, [its];\n}" ::"r"(shared_address(barrier)),
        "r"(threadIdx.x % 32), "r"(threadIdx.x % kClusterBlocks), "r"(there ? kClusterBlocks : 0)
        : "memory");
#endif
}

__device__ inline void arrive_in_cluster() {
#if defined(LORA_KERNELS_EMULATION)
  emulation::arrive_in_cluster();
#else
  if constexpr (kArch >= 90) asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}

__device__ inline void wait_for_cluster() {
#if defined(LORA_KERNELS_EMULATION)
  emulation::wait_for_cluster();
#else
  if constexpr (kArch >= 90) asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#endif
}

}  // namespace lora_kernels::cuda
