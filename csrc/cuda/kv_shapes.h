// Sizes that the plans and the kernels of kv_attention_step, kv_relative_step and kv_pack share.
#pragma once

#include <cstdint>

#include "lora_kernels/types.h"

namespace lora_kernels::cuda {

// Four warps share the positions of a block. Each keeps sums of its own for all queries of the block, so more of them
// would make the merge at the end longer, and fewer leave less in flight.
constexpr int kKvThreads = 128, kKvWarps = kKvThreads / 32;
// Queries of a block: the rows of one tensor-core product, each once (16 bits) or twice, as two halves (blocked INT8).
constexpr int kKvQueries = 16, kKvBlockedQueries = 8;
// Positions that a warp takes at a time.
constexpr int kKvTile = 16, kKvBlockedTile = 32;
// Channels of a head: sums of 64 are 32 registers of a lane, of 128 the most that leave room for K and V.
constexpr int kKvMostHeadSize = 128;
// Every block of a split takes a multiple of this: the same positions go to the same warp, whatever the length is.
constexpr int kKvSplitStep = kKvWarps * kKvBlockedTile;
// Positions of one block whose places in the cache are looked up beforehand, into shared memory.
constexpr int kKvMostPlaces = 4096;
// New tokens of a row that the block attending over them also appends: one product's queries.
constexpr int kKvMostAppended = kKvQueries;
// Bytes of K and V that all blocks at once have asked to come to L2, beside what is on its way to their registers:
// memory wants up to 6 MB on their way, and L2 holds 40 MB and more where it does.
constexpr int64_t kKvMostAsked = 8 << 20;
// Heads whose weights are returned: an array among the parameters of a kernel.
constexpr int kKvMostWeightHeads = 128;
constexpr int kKvFinishThreads = 256;

// Floats from query to query of a warp's sums in shared memory; 4 beyond, so that queries begin in other banks.
constexpr int kv_part_stride(int groups) { return 64 * groups + 4; }

// Whether a lane holds the queries in registers, which products over `groups` of 64 channels in elements of `element`
// bytes leave no room for beside sums, K and V; if not, the warps share them in so many bytes of shared memory.
constexpr bool kv_holds_queries(int groups, int element) { return groups * element < 4; }
constexpr int64_t kv_query_bytes(int groups, int element) {
  return kv_holds_queries(groups, element) ? 0 : int64_t{kKvQueries} * 64 * groups * element;
}

// Shared memory of a block: the list of queries, the places of the positions, the queries themselves, the sums of the
// warps with the largest score and the total of each. `groups`: of 64 channels.
constexpr int kKvListWords = 2 * kKvQueries + 2 * kKvWarps + 2;
constexpr int64_t kv_shared_bytes(int groups, int queries, int64_t places, int64_t query_bytes = 0) {
  return round_up(kKvListWords * 4, 16) + round_up(places * 4, 16) + query_bytes +
         int64_t{kKvWarps} * queries * (kv_part_stride(groups) + 2) * 4;
}

// Whether the blocks of a cluster may share out positions: heads of more than 64 channels in the order of positions
// leave them no register for it. Clusters are powers of two up to kKvMostCluster, which divide the queries of a list.
constexpr bool kv_shares(int groups, bool blocked) { return blocked || groups == 1; }
constexpr int kKvMostCluster = 8;
static_assert(kKvQueries % kKvMostCluster == 0 && kKvBlockedQueries % kKvMostCluster == 0);
// What a block of a cluster is sent, from each of them the sums of the queries that it finishes, and a barrier.
// As much for any size.
constexpr int64_t kv_exchange_bytes(int groups, int queries) {
  return 16 + int64_t{queries} * kv_part_stride(groups) * 4;
}

// kv_relative_step: the queries with one bias and with the other, and the sums of the warps, in whose place scores by
// distance wait for their frames before.
constexpr int kKvDistances = kKvQueries + kKvTile;  // of sixteen queries to a tile, and one more
constexpr int64_t kv_relative_shared_bytes(int groups, int element) {
  return 2 * kv_query_bytes(groups, element) + int64_t{kKvWarps} * kKvQueries * (kv_part_stride(groups) + 2) * 4;
}

// kv_pack: a block takes 64 channels of a head, and goes through its positions twice.
constexpr int kKvPackThreads = 256, kKvPackChannels = 64, kKvPackPositions = 64;
constexpr int64_t kKvPackSharedBytes =
    kKvPackThreads * 4 + kKvPackChannels * 4 + kKvPackPositions * (kKvPackChannels + 4);

}  // namespace lora_kernels::cuda
