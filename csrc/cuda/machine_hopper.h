// What tiles of 128 rows take on Hopper, in clocks of a multiprocessor, as far as it can be counted; nothing is
// measured.
//
// A tile is steps of 128 bytes of depth. A step takes what is longest: its products at the peak; what TMA writes to
// shared memory and what products and lanes read of it, at 128 bytes per clock; what comes to the multiprocessor; what
// L2 has to bring, of which two tiles of a cluster, one below the other, share those of the columns. Before the steps
// a tile starts, after them it has an end (conversion, the branch of INT8, activation, store): that is added where a
// block is alone on its multiprocessor. Where two share one, the end of one runs beside the steps of the other, as long
// as they are out of step: they start together, and nothing but chance sets them apart. In step all the way they would
// take n P + n / 2 (start + end of both) for n tiles of P clocks each.
#pragma once

#include <cmath>
#include <initializer_list>

#include "cuda/machine.h"

namespace lora_kernels::cuda {

// The part of the products' and of shared memory's peak that steps are taken to reach: there is a barrier in each.
constexpr double kStepsReached = 0.9;
constexpr double kSharedBytesPerClock = 128;
// Of L2, by each of all multiprocessors at once. A product by others (fast.cu, kernel 6: bf16 at 8192 x 8192 x 8192 on
// an H100 SXM in tiles of 192 x 192 that share no boxes, 96 FLOPs to a byte) came to 777 TFLOPS, which is 8.1 TB/s, or
// 35 bytes per clock of 132 multiprocessors at 1.755 GHz. It may be that L2 gives more; one multiprocessor
// alone gets more (kL2BytesPerClock).
constexpr double kL2OfAllPerClock = 35;
// What one multiprocessor can take, whether L2 brings it to it alone or to both of a cluster: taken from the width of
// its port. If the 35 above are what this way holds, clusters gain nothing.
constexpr double kArrivingPerClock = 64;
// From a load to its data in L2 on a busy device. A tile waits for it twice at its start (who its adapters are; the
// first boxes) and twice at its end (scales or bias; factors of the branch).
constexpr double kL2Clocks = 600;

// Instructions of an activation for each value, by the machine code: GELU 23, and of 16 bits 14; SiLU 13. Two of them
// are of the special function unit, which takes 16 lanes per clock beside the others, where 128 are issued: those two
// alone are 16, which is what binds where the others are fewer.
constexpr double activation_instructions(Activation activation, DType dtype) {
  return activation == Activation::kNone ? 0 : activation == Activation::kGelu && size_of(dtype) == 4 ? 23 : 16;
}

// A tile of 128 rows. Warps of a multiprocessor issue 128 lanes' instructions per clock, so that one for each value is
// as many clocks as there are columns.
struct HopperTile {
  int columns, together;  // tiles of a multiprocessor at a time
  int ahead;              // steps on their way while one is multiplied
  double read;            // bytes of a step that products and lanes read
  int cluster = 2;        // tiles of one
  double slower = 1;      // than by wgmma at the peak
  double fetched() const { return (128 + columns) * 128.0; }
  double of_l2() const { return (128 + columns / cluster) * 128.0; }
};

struct HopperWork {
  int64_t rows, columns;
  double bytes;       // of memory
  double steps;       // of 128 bytes of depth
  double value;       // instructions of the end for each value
  double branch = 0;  // clocks of the tensor cores behind the steps, for the 128 values of a column
  double waits = 0;   // of blocks that stay: clocks of an end besides its instructions
};

struct HopperTime {
  int columns;
  double us;
};

// The better of some tiles, and the first if they are alike.
inline HopperTime hopper_tiles(const CudaDevice& device, std::initializer_list<HopperTile> shapes,
                               const HopperWork& work) {
  const Machine machine(device, kWgmmaFlopsPerClock);
  HopperTime best{0, 0};
  for (const HopperTile& tile : shapes) {
    const int64_t rows = 128 * tile.cluster;
    const double count = static_cast<double>((work.rows + rows - 1) / rows * tile.cluster) *
                         static_cast<double>((work.columns + tile.columns - 1) / tile.columns);
    // Of each column 2 * 128 * 64 FLOPs of 16 bits, or twice as many operations of 8.
    const double products = 4.0 * tile.columns * tile.slower;
    const double shared = (tile.fetched() + tile.read) / kSharedBytesPerClock;
    const double step = std::max({products / kStepsReached, shared / kStepsReached, tile.fetched() / kArrivingPerClock,
                                  tile.of_l2() / kL2OfAllPerClock});
    const double steps = work.steps * step + work.branch * tile.columns;
    const double start = 2 * kL2Clocks, issued = work.value * tile.columns, end = 2 * kL2Clocks + issued;
    // Of the multiprocessor that has most of them.
    const double most = machine.turns(count), in_turns = machine.turns(count, tile.together) * (start + steps + end);
    const double clocks =
        tile.together == 1 ? in_turns : std::max({start + most * steps + end, start + steps + most * issued, in_turns});
    const double in_flight = tile.ahead * tile.of_l2();
    const double busy = std::min(1.0, count * in_flight / (machine.bytes * kLatencySeconds));
    const double us = std::max(clocks / machine.clock * 1e6, machine.memory_us(work.bytes) / busy) + kLaunchUs;
    if (best.columns == 0 || us < best.us) best = {tile.columns, us};
  }
  return best;
}

// Blocks that stay, one on each multiprocessor, and take tile after tile (int8_persistent.cuh): two of a cluster make
// tiles one beside the other, which share the rows of a step. Two warpgroups halve the columns of each. While one ends,
// alone, the other multiplies what is there already, alone as well and so in half of the time: it is taken to be behind
// by `apart` steps, and what the end takes longer is added to the steps. No barrier holds a block, and what the end
// reads first is in shared memory before it begins.
struct PersistentTile {
  int rows, columns;
  double read;   // bytes of a step that products and lanes read
  double apart;  // steps
};

inline double hopper_persistent(const CudaDevice& device, const PersistentTile& tile, const HopperWork& work) {
  const Machine machine(device, kWgmmaFlopsPerClock);
  const int64_t of_pair = 2 * tile.columns;
  const double pairs = static_cast<double>((work.rows + tile.rows - 1) / tile.rows) *
                       static_cast<double>((work.columns + of_pair - 1) / of_pair);
  const double values = static_cast<double>(tile.rows) * tile.columns, fetched = (tile.rows + tile.columns) * 128.0;
  const double of_l2 = (tile.rows / 2 + tile.columns) * 128.0;
  const double products = 2 * values * 128 / kWgmmaInt8PerClock;
  const double step = std::max({products / kStepsReached, (fetched + tile.read) / kSharedBytesPerClock / kStepsReached,
                                fetched / kArrivingPerClock, of_l2 / kL2OfAllPerClock});
  const double branch = work.branch * tile.columns * tile.rows / 128;
  // Of a warpgroup, whose four warps issue as much as all would: half of the values.
  const double end = values / 2 * work.value / 128 + branch / 2 + work.waits;
  const double seen = std::max(0.0, end - tile.apart * products / 2 / kStepsReached);
  const double turns = std::ceil(pairs / std::floor(machine.multiprocessors / 2));
  const double clocks = 2 * kL2Clocks + turns * (work.steps * step + branch / 2 + seen) + end;
  const double in_flight = 2 * std::min(pairs, machine.multiprocessors / 2) * 2 * of_l2;  // two steps of each block
  const double busy = std::min(1.0, in_flight / (machine.bytes * kLatencySeconds));
  return std::max(clocks / machine.clock * 1e6, machine.memory_us(work.bytes) / busy) + kLaunchUs;
}

// Tiles by mma.sync are taken to reach a part of the peak. Where this account says more of the large ones, that: so
// both kinds are compared alike. Eight warps read 64 rows of a and 32 of b each, three steps of half the depth are
// there, and of wgmma's products mma.sync makes 62 % in the same time.
inline TiledTime by_mma_on_hopper(const CudaDevice& device, TiledTime time, int together, const HopperWork& work) {
  if (device.arch == 90 && time.large)
    time.us = std::max(time.us, hopper_tiles(device, {{128, together, 1, 8 * 96 * 128.0, 1, 1 / 0.62}}, work).us);
  return time;
}

}  // namespace lora_kernels::cuda
