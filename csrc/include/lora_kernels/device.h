// What a plan may know of the machine: plain data, so that plans can be made and tested for machines that are not here.
#pragma once

#include <cstdint>
#include <string>

namespace lora_kernels {

// Instruction sets of x86-64, as bits.
enum Isa : uint32_t {
  kIsaAvx2 = 1u << 0,        // AVX2, FMA and F16C
  kIsaAvx512 = 1u << 1,      // AVX-512 F, BW, DQ and VL
  kIsaAvx512Vnni = 1u << 2,  // vpdpbusd: four INT8 products and their sum per lane
  kIsaAvx512Bf16 = 1u << 3,  // vdpbf16ps: two bf16 products and their sum per lane
  kIsaAvxVnni = 1u << 4,     // vpdpbusd on 256 bits without AVX-512
  kIsaAmxInt8 = 1u << 5,
  kIsaAmxBf16 = 1u << 6,
};

struct DeviceInfo {
  // Whether vdpbf16ps does more per cycle than fp32 multiply-adds: twice as much on AMD's Zen 4 and 5, half as much on
  // Intel's Sapphire Rapids (measured: 96 against 200 GFLOP/s on one core).
  bool fast_bf16_dot = false;
  uint32_t isa = 0;            // Isa bits
  int threads = 1;             // how many tasks the executor runs at the same time
  int64_t l2_bytes = 1 << 20;  // per core
};

// The CPU that this process runs on; `threads` is left at 1, the caller knows its own pool.
DeviceInfo host_device();

// "avx2 avx512 avx512_vnni", or "none".
std::string isa_names(uint32_t isa);

}  // namespace lora_kernels
