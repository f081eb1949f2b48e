// What the plans of all operators take a machine to be.
#pragma once

#include <algorithm>

#include "lora_kernels/device.h"

namespace lora_kernels::cuda {

// What a kernel more on the same stream costs: the gap between dependent kernels. With an early start its blocks are
// resident when the one before ends. Vendors and papers report 1 to 3 and under 1.
constexpr double kLaunchUs = 2.5, kEarlyLaunchUs = 1.0;
// The part of the memory's peak that streams are expected to reach.
constexpr double kMemory = 0.85;
// What the first choice has to be beaten by: a little more than predictions err by.
constexpr double kWorthwhile = 0.97;
// From a load to its data on a busy device: bandwidth times this must be in flight, or memory idles.
constexpr double kLatencySeconds = 0.8e-6;
// A sum over the threads of a block, in clocks: two barriers, shuffles and shared memory.
constexpr double kBlockSum = 250;
// How much faster than memory L2 is taken to be, and what one multiprocessor gets of it: bytes per clock, at best 64.
constexpr double kL2 = 2.5, kL2BytesPerClock = 48;

// The part of the tensor cores' peak that tiles of these shapes are expected to reach.
constexpr double kLargeTiles = 0.75, kSmallTiles = 0.5;
// Of wgmma: operations of one multiprocessor per clock.
constexpr double kWgmmaFlopsPerClock = 4096, kWgmmaInt8PerClock = 8192;

// A device as predictions see it: what it does not say of itself is taken from a T4.
struct Machine {
  double multiprocessors, clock, operations, bytes;  // of one multiprocessor, and of the memory, per second
  double l2_bytes;                                   // of one multiprocessor, per second
  bool early;

  // Operations of one multiprocessor per clock.
  Machine(const CudaDevice& d, double operations_per_clock) {
    multiprocessors = d.multiprocessors > 0 ? d.multiprocessors : 40;
    clock = d.clock_hz > 0 ? d.clock_hz : 1.4e9;
    operations = operations_per_clock * clock;
    l2_bytes = kL2BytesPerClock * clock;
    bytes = kMemory * (d.memory_bytes_per_second > 0 ? d.memory_bytes_per_second : 320e9);
    early = d.arch >= 90;
  }
  double memory_us(double count) const { return count / bytes * 1e6; }
  // Blocks go to multiprocessors, so many to each, in turns; the last turn may be short.
  double turns(double blocks, double at_once = 1) const {
    return std::max(1.0, static_cast<double>(static_cast<int64_t>((blocks - 1) / (at_once * multiprocessors)) + 1));
  }
  // Tiles in turns, each through so much depth.
  double tiles_us(int64_t rows, int64_t columns, double depth, int64_t tile, double reached) const {
    return turns(tiles(rows, columns, tile)) * 2.0 * static_cast<double>(tile * tile) * depth / (operations * reached) *
           1e6;
  }
  // So many bytes from L2 by each of `blocks`, of which `at_once` share a multiprocessor.
  double l2_us(double blocks, double of_block, double at_once = 1) const {
    const double of_one = std::min(at_once, turns(blocks)) * of_block / l2_bytes * 1e6;
    return std::max(turns(blocks, at_once) * of_one, memory_us(blocks * of_block) / kL2);
  }
  double next_launch_us() const { return early ? kEarlyLaunchUs : kLaunchUs; }
  static double tiles(int64_t rows, int64_t columns, int64_t tile) {
    return static_cast<double>((rows + tile - 1) / tile) * static_cast<double>((columns + tile - 1) / tile);
  }
};

// Blocks of a cluster, of at most eight: those run in one group of multiprocessors, of which a part of a device, or a
// small one, has fewer than that. Where eight may not fit they are not asked for.
inline int most_cluster(const CudaDevice& device) {
  if (!device.clusters) return 1;
  return device.multiprocessors >= 64 ? 8 : device.multiprocessors >= 16 ? 4 : 1;
}

struct TiledTime {
  bool large;
  double us;
};

// The better of the two tile shapes; `depth_of(tile)` counts what every tile does besides the base. Few tiles have few
// bytes in flight: two steps of 16 KB in a large one, three of 8 KB in a small one.
template <class DepthOf>
TiledTime tiled(const Machine& machine, int64_t rows, int64_t columns, double bytes, const DepthOf& depth_of) {
  const auto time = [&](int tile, double reached, double in_flight) {
    const double busy =
        std::min(1.0, Machine::tiles(rows, columns, tile) * in_flight / (machine.bytes * kLatencySeconds));
    return std::max(machine.tiles_us(rows, columns, depth_of(tile), tile, reached), machine.memory_us(bytes) / busy);
  };
  const double large = time(128, kLargeTiles, 2 * 16384), small = time(64, kSmallTiles, 3 * 8192);
  return {large <= small, std::min(large, small) + kLaunchUs};
}

// The device as plans see it that leave wgmma out.
inline DeviceInfo without_wgmma(DeviceInfo device) {
  device.cuda.wgmma = false;
  return device;
}

}  // namespace lora_kernels::cuda
