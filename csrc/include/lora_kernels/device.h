// What a plan may know of the machine: plain data, so that plans can be made and tested for machines that are not here.
#pragma once

#include <cstdint>
#include <string>

#include "lora_kernels/status.h"

namespace lora_kernels {

// Instruction sets of x86-64, as bits.
enum Isa : uint32_t {
  kIsaAvx2 = 1u << 0,        // AVX2, FMA and F16C
  kIsaAvx512 = 1u << 1,      // AVX-512 F, BW, DQ and VL
  kIsaAvx512Vnni = 1u << 2,  // vpdpbusd: four INT8 products and their sum per lane
  kIsaAvx512Bf16 = 1u << 3,  // vdpbf16ps: two bf16 products and their sum per lane
  kIsaAvxVnni = 1u << 4,     // vpdpbusd on 256 bits without AVX-512
  kIsaAmxInt8 = 1u << 5,     // tdpbusd: 16 x 16 sums of 64 INT8 products each, in tile registers
  kIsaAmxBf16 = 1u << 6,     // tdpbf16ps: the same of 32 bf16 products
  kIsaCuda = 1u << 31,  // not of a CPU: the operands are in the memory of a CUDA device, described by DeviceInfo::cuda
};

// A CUDA device as plans see it. arch 0: there is none, the operands are in the CPU's memory. What is 0 or unknown
// besides is replaced by cautious values when a plan is made.
struct CudaDevice {
  int arch = 0;                        // compute capability times ten: 75, 80, 86, 89, 90, 100, 120
  int multiprocessors = 0;             //
  int64_t shared_bytes = 0;            // a block may have at most, opted in
  int64_t l2_bytes = 0;                //
  double clock_hz = 0;                 // of the multiprocessors
  double memory_bytes_per_second = 0;  // of the data sheet: clock times width
  bool wgmma = false;                  // sm_90, and this library has machine code for sm_90a
  bool clusters = false;               // sm_90 on, and this library has machine code that was made for it
};

struct DeviceInfo {
  // Whether vdpbf16ps does more per cycle than fp32 multiply-adds: twice as much on AMD's Zen 4 and 5, half as much on
  // Intel's Sapphire Rapids (measured: 96 against 200 GFLOP/s on one core).
  bool fast_bf16_dot = false;
  uint32_t isa = 0;  // Isa bits
  // errno where the operating system refuses this process the tile registers that AMX computes in; 0: it may use them,
  // or the CPU has none.
  int tile_refusal = 0;
  int threads = 1;             // how many tasks the executor runs at the same time
  int64_t l2_bytes = 1 << 20;  // per core
  CudaDevice cuda;             // of the operands; isa is then kIsaCuda alone
};

// The CUDA device `index` of this process; unsupported where there is none or the library was built without CUDA.
Status cuda_device(int index, DeviceInfo* device);

// A device that may not be here, for plans: the DeviceInfo of operands on it.
DeviceInfo on_cuda(const CudaDevice& device);

// The CPU that this process runs on; `threads` is left at 1, the caller knows its own pool. The first call asks the
// operating system for AMX's tile registers where there are any.
DeviceInfo host_device();

// "avx2 avx512 avx512_vnni", or "none".
std::string isa_names(uint32_t isa);

}  // namespace lora_kernels
