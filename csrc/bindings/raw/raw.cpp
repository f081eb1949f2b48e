// The operators on addresses, without torch: for PyCUDA, CuPy, cuda-python, numpy, and whatever else has pointers.
#include "raw.h"

#include "lora_kernels/implementations.h"
#include "lora_kernels/types.h"

PYBIND11_MODULE(_raw, m) {
  using namespace lora_kernels;
  using namespace lora_kernels::raw;
  m.doc() = "lora_kernels on addresses and streams, without torch";

  py::enum_<DType>(m, "DType")
      .value("float32", DType::kFloat32)
      .value("float16", DType::kFloat16)
      .value("bfloat16", DType::kBFloat16)
      .value("int8", DType::kInt8);
  py::enum_<Activation>(m, "Activation")
      .value("none", Activation::kNone)
      .value("gelu", Activation::kGelu)
      .value("silu", Activation::kSilu);

  plain<CudaDevice>(m, "CudaDevice")
      .def_readwrite("arch", &CudaDevice::arch)
      .def_readwrite("multiprocessors", &CudaDevice::multiprocessors)
      .def_readwrite("shared_bytes", &CudaDevice::shared_bytes)
      .def_readwrite("l2_bytes", &CudaDevice::l2_bytes)
      .def_readwrite("clock_hz", &CudaDevice::clock_hz)
      .def_readwrite("memory_bytes_per_second", &CudaDevice::memory_bytes_per_second)
      .def_readwrite("wgmma", &CudaDevice::wgmma)
      .def_readwrite("clusters", &CudaDevice::clusters);
  py::class_<DeviceInfo>(m, "DeviceInfo").def_readonly("cuda", &DeviceInfo::cuda);
  m.def("host_device", &host_device, "The CPU of this process.");
  m.def("on_cuda", &on_cuda, "A CUDA device by its description, for plans.");
  m.def(
      "cuda_device",
      [](int index) {
        DeviceInfo device;
        raise_if_failed(cuda_device(index, &device));
        return device;
      },
      py::arg("index") = 0, "A CUDA device of this process.");
  m.def("force_implementation", [](const std::string& name) { raise_if_failed(force_implementation(name)); });

  define_lora_linear(m);
  define_int8_lora_linear(m);
  define_kv_attention_step(m);
  define_kv_pack(m);
  define_kv_relative_step(m);
}
