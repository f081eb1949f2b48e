// The device of an emulated library: an H100 as far as plans look.
#include "lora_kernels/device.h"

namespace lora_kernels {

Status cuda_device(int, DeviceInfo* device) {
  CudaDevice d;
  d.arch = 90;
  d.multiprocessors = 132;
  d.shared_bytes = 227 << 10;
  d.l2_bytes = 50 << 20;
  d.clock_hz = 1.755e9;
  d.memory_bytes_per_second = 3.35e12;
  d.wgmma = true;
  device->isa = kIsaCuda;
  device->cuda = d;
  return {};
}

}  // namespace lora_kernels
