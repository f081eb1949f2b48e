// What the operators of the raw module share. Names are the contract's own; addresses are integers, and a stream is one
// too (0: the default stream). The caller keeps the memory alive until the stream has passed it.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "lora_kernels/device.h"
#include "lora_kernels/executor.h"
#include "lora_kernels/lora_bank.h"
#include "lora_kernels/status.h"

namespace lora_kernels::raw {

namespace py = pybind11;

inline void raise_if_failed(const Status& status) {
  if (!status.ok()) throw std::runtime_error(status.text);
}

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// On the CPU a call runs on the caller's thread.
inline Executor executor_of(uintptr_t stream) {
  Executor executor = serial_executor();
  executor.stream = pointer<void>(stream);
  return executor;
}

inline LoraBank bank_of(uintptr_t a, int64_t a_stride, uintptr_t b, int64_t b_stride_rank, int64_t b_stride_out,
                        int64_t b_stride_block, uintptr_t scales, uintptr_t offsets, uintptr_t adapter_ids) {
  LoraBank bank;
  bank.a = pointer<void>(a);
  bank.a_stride = a_stride;
  bank.b = pointer<void>(b);
  bank.b_stride_rank = b_stride_rank;
  bank.b_stride_out = b_stride_out;
  bank.b_stride_block = b_stride_block;
  bank.scales = pointer<float>(scales);
  bank.offsets = pointer<int32_t>(offsets);
  bank.adapter_ids = pointer<int32_t>(adapter_ids);
  return bank;
}

// A structure that is made from keywords, each of them one of its fields.
template <class T>
py::class_<T> plain(py::module_& m, const char* name) {
  py::class_<T> type(m, name);
  type.def(py::init([](const py::kwargs& fields) {
    T value;
    py::object object = py::cast(&value, py::return_value_policy::reference);
    for (const auto& field : fields) py::setattr(object, field.first, field.second);
    return value;
  }));
  return type;
}

// Its plan, which prints and says what memory it needs, and the function that makes it.
template <class Problem, class Plan>
void define_plan(py::module_& m, const char* name) {
  py::class_<Plan>(m, name)
      .def_property_readonly("workspace_bytes", [](const Plan& p) { return workspace_bytes(p); })
      .def("__str__", [](const Plan& p) { return to_string(p); });
  m.def("plan", [](const Problem& problem, const DeviceInfo& device) {
    Plan chosen;
    raise_if_failed(plan(problem, device, &chosen));
    return chosen;
  });
}

// One for each operator, in a file of its stem.
void define_lora_linear(py::module_& m);
void define_int8_lora_linear(py::module_& m);
void define_kv_attention_step(py::module_& m);
void define_kv_pack(py::module_& m);
void define_kv_relative_step(py::module_& m);

}  // namespace lora_kernels::raw
