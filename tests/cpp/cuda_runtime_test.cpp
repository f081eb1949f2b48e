// What is said where the CUDA runtime refuses, with a runtime of this file's own in its place: no device is needed.
#include <map>

#include "check.h"
#include "cuda/device.cu"
#include "cuda/primitives/launch.h"

using namespace lora_kernels;

namespace {

// What this runtime's only device, index 0, says of itself; it cannot be asked for what is not here.
std::map<cudaDeviceAttr, int> attributes;

void everything_is_said() {
  attributes = {{cudaDevAttrComputeCapabilityMajor, 8}, {cudaDevAttrComputeCapabilityMinor, 7},
                {cudaDevAttrMultiProcessorCount, 16},   {cudaDevAttrMaxSharedMemoryPerBlockOptin, 163 << 10},
                {cudaDevAttrL2CacheSize, 4 << 20},      {cudaDevAttrClockRate, 1300000},
                {cudaDevAttrMemoryClockRate, 3200000},  {cudaDevAttrGlobalMemoryBusWidth, 256}};
}

void test_what_a_plan_needs_is_fatal() {
  int index = 0;
  for (const cudaDeviceAttr needed : {cudaDevAttrComputeCapabilityMajor, cudaDevAttrComputeCapabilityMinor,
                                      cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin}) {
    everything_is_said();
    attributes.erase(needed);
    DeviceInfo device;
    const Status refused = cuda_device(index++, &device);
    check(refused.code == StatusCode::kUnsupported && contains(refused.text, "cudaErrorInvalidValue"),
          "without attribute " + std::to_string(needed) + ": " + refused.text);
  }
}

// Each call asks another index: what a device has said is remembered.
void test_what_a_plan_can_do_without_is_not() {
  everything_is_said();
  DeviceInfo all;
  check(cuda_device(10, &all).ok() && all.cuda.arch == 87 && all.cuda.multiprocessors == 16 &&
            all.cuda.shared_bytes == 163 << 10 && all.cuda.l2_bytes == 4 << 20 && all.cuda.clock_hz == 1.3e9 &&
            all.cuda.memory_bytes_per_second == 2e3 * 3200000 * 256 / 8,
        "a device that says everything");
  for (const cudaDeviceAttr unknown :
       {cudaDevAttrL2CacheSize, cudaDevAttrClockRate, cudaDevAttrMemoryClockRate, cudaDevAttrGlobalMemoryBusWidth})
    attributes.erase(unknown);
  DeviceInfo some;
  const Status asked = cuda_device(11, &some);
  check(asked.ok(), asked.text);
  check(some.cuda.arch == 87 && some.cuda.multiprocessors == 16 && some.cuda.shared_bytes == 163 << 10,
        "what plans need is there");
  check(some.cuda.l2_bytes == 0 && some.cuda.clock_hz == 0 && some.cuda.memory_bytes_per_second == 0,
        "0 stands for unknown");
}

void test_which_machine_code_has_clusters() {
  const struct {
    const char* built_for;
    int arch;
    bool has;
  } cases[] = {
      {"75-real/80", 90, false},
      {"75-real/80/90a-real/120", 90, true},
      {"90a-real", 100, false},
      {"90a-real", 80, false},
      {"90", 90, true},
      {"80/90", 120, true},
      {"80/90-real", 120, false},
      {"80/100-real", 103, true},
      {"80/100-real", 120, false},
      {"75-real/80/120", 121, true},
      {"75-real/80/120", 100, false},
      {"100f-real", 103, true},
      {"80/100f", 120, false},
      {"100f", 103, true},
      {"90-virtual", 100, true},
      {"90a", 100, false},
      {"unknown", 90, false},
      {"", 90, false},
  };
  for (const auto& c : cases)
    check(made_for_clusters(c.built_for, c.arch) == c.has,
          std::string(c.built_for) + " on " + std::to_string(c.arch) + ": expected " + (c.has ? "clusters" : "none"));
  everything_is_said();
  attributes[cudaDevAttrComputeCapabilityMajor] = 9, attributes[cudaDevAttrComputeCapabilityMinor] = 0;
  DeviceInfo hopper;
  check(cuda_device(12, &hopper).ok() && hopper.cuda.arch == 90 && !hopper.cuda.clusters,
        "a library for sm_75 and sm_80 has none on sm_90");
}

std::string text_of(cudaError_t error) {
  return cuda::not_launched({"gemm", dim3(3, 2, 1), dim3(128, 1, 1), 1024, nullptr}, error).text;
}

void test_a_launch_without_machine_code_names_the_way_out() {
  everything_is_said();
  const std::string launch =
      "kernel gemm could not be launched with 3x2x1 blocks of 128 threads and 1024 bytes of "
      "shared memory: ";
  const std::string plain = text_of(cudaErrorInvalidValue);
  check(plain == launch + "cudaErrorInvalidValue, of a test", plain);
  cuda::Launch pairs{"gemm_wgmma", dim3(4, 1, 1), dim3(256, 1, 1), 1024, nullptr};
  pairs.cluster = 2;
  const std::string clusters = cuda::not_launched(pairs, cudaErrorInvalidValue).text;
  check(contains(clusters, "1024 bytes of shared memory, in clusters of 2: cudaErrorInvalidValue"), clusters);
  const std::string none = text_of(cudaErrorNoKernelImageForDevice);
  check(none == launch +
                    "cudaErrorNoKernelImageForDevice, of a test; this library was built with "
                    "CMAKE_CUDA_ARCHITECTURES=75-real/80: rebuild with -DCMAKE_CUDA_ARCHITECTURES=87, or move "
                    "the operands to the CPU",
        none);
  attributes[cudaDevAttrComputeCapabilityMajor] = 9;
  attributes[cudaDevAttrComputeCapabilityMinor] = 0;
  const std::string hopper = text_of(cudaErrorNoKernelImageForDevice);
  check(contains(hopper, "rebuild with -DCMAKE_CUDA_ARCHITECTURES=90a,"), hopper);
  attributes.clear();
  const std::string silent = text_of(cudaErrorNoKernelImageForDevice);
  check(contains(silent, "rebuild with -DCMAKE_CUDA_ARCHITECTURES=<the device's>,"), silent);
}

}  // namespace

DeviceInfo lora_kernels::on_cuda(const CudaDevice& cuda) {
  DeviceInfo device;
  device.cuda = cuda;
  return device;
}

extern "C" {
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = -1;  // the runtime promises nothing of it where it fails
  const auto known = attributes.find(attribute);
  if (known == attributes.end()) return cudaErrorInvalidValue;
  *value = known->second;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorNoKernelImageForDevice ? "cudaErrorNoKernelImageForDevice" : "cudaErrorInvalidValue";
}
const char* cudaGetErrorString(cudaError_t) { return "of a test"; }
}

int main() {
  test_what_a_plan_needs_is_fatal();
  test_what_a_plan_can_do_without_is_not();
  test_which_machine_code_has_clusters();
  test_a_launch_without_machine_code_names_the_way_out();
  if (failures == 0) std::printf("all checks passed\n");
  return failures != 0;
}
