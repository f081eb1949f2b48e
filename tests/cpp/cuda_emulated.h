// What the C interfaces of the emulated kernels share.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "cuda/primitives/platform.h"
#include "lora_kernels/device.h"

namespace lora_kernels {

inline int answer(const std::string& text, char* message, int64_t size, int code) {
  std::snprintf(message, static_cast<size_t>(size), "%s", text.c_str());
  return code;
}

inline DeviceInfo device_of(int64_t arch) {
  DeviceInfo device;
  cuda_device(0, &device);
  device.cuda.arch = static_cast<int>(arch);
  device.cuda.clusters = arch >= 90 && cuda::kArch >= 90;
  return device;
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// Workspaces of calls whose last kernels have not run, and whether there may be such.
struct HeldCalls {
  bool on = false;
  std::vector<std::shared_ptr<void>> workspaces;
};
inline HeldCalls held_calls;

// Exactly as many bytes as the plan asks for, all of them NaN.
inline std::shared_ptr<void> workspace_of(int64_t bytes) {
  const auto size = static_cast<size_t>((bytes > 0 ? bytes : 1) + 255) / 256 * 256;
  std::shared_ptr<void> memory(std::aligned_alloc(256, size), Free());
  std::memset(memory.get(), 0xFF, size);
  if (held_calls.on) held_calls.workspaces.push_back(memory);
  return memory;
}

}  // namespace lora_kernels
