// Which implementations exist, which one is forced, and which have run.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "lora_kernels/device.h"
#include "lora_kernels/status.h"

namespace lora_kernels {

// Forces every operator to the implementation of this name ("generic", "avx2", "avx512"); "" lifts it. The environment
// variable LORA_KERNELS_FORCE sets the first value. An unknown name is an error; one that an operator or this CPU lacks
// is an error when that operator is planned, never a silent fallback.
Status force_implementation(const std::string& name);
std::string forced_implementation();

struct ImplementationReport {
  std::string op;          // "lora_linear"
  std::string name;        // "avx512"
  bool available = false;  // this CPU has what it needs
  bool selected = false;   // what a plan without special wishes takes
  std::string reason;      // why not available, or what it uses
  int64_t runs = 0;        // calls of run() so far in this process
};

// Every row of every table, in order of preference.
std::vector<ImplementationReport> implementations(const DeviceInfo& device);

}  // namespace lora_kernels
