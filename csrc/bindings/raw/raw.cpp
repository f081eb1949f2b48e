// The operators on addresses, without torch: for PyCUDA, CuPy, cuda-python, numpy, and whatever else has pointers.
// Names are the contract's own; addresses are integers, and a stream is one too (0: the default stream). The caller
// keeps the memory alive until the stream has passed it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>

#include "lora_kernels/implementations.h"
#include "lora_kernels/int8_lora_linear.h"
#include "lora_kernels/kv_attention_step.h"
#include "lora_kernels/lora_linear.h"

namespace py = pybind11;
using namespace lora_kernels;

namespace {

void raise_if_failed(const Status& status) {
  if (!status.ok()) throw std::runtime_error(status.text);
}

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// On the CPU a call runs on the caller's thread.
Executor executor_of(uintptr_t stream) {
  Executor executor = serial_executor();
  executor.stream = pointer<void>(stream);
  return executor;
}

LoraBank bank_of(uintptr_t a, int64_t a_stride, uintptr_t b, int64_t b_stride_rank, int64_t b_stride_out,
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

}  // namespace

PYBIND11_MODULE(_raw, m) {
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
      .def_readwrite("wgmma", &CudaDevice::wgmma);
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

  plain<LoraShape>(m, "LoraShape")
      .def_readwrite("adapters", &LoraShape::adapters)
      .def_readwrite("total_rank", &LoraShape::total_rank)
      .def_readwrite("max_rank", &LoraShape::max_rank)
      .def_readwrite("groups", &LoraShape::groups)
      .def_readwrite("dtype", &LoraShape::dtype);
  plain<LoraLinearProblem>(m, "LoraLinearProblem")
      .def_readwrite("rows", &LoraLinearProblem::rows)
      .def_readwrite("in_features", &LoraLinearProblem::in_features)
      .def_readwrite("out_features", &LoraLinearProblem::out_features)
      .def_readwrite("dtype", &LoraLinearProblem::dtype)
      .def_readwrite("bias_dtype", &LoraLinearProblem::bias_dtype)
      .def_readwrite("has_bias", &LoraLinearProblem::has_bias)
      .def_readwrite("has_residual", &LoraLinearProblem::has_residual)
      .def_readwrite("activation", &LoraLinearProblem::activation)
      .def_readwrite("lora", &LoraLinearProblem::lora)
      .def_readwrite("dropout_p", &LoraLinearProblem::dropout_p)
      .def_readwrite("keeps_t", &LoraLinearProblem::keeps_t)
      .def_readwrite("allow_tf32", &LoraLinearProblem::allow_tf32)
      .def("__str__", [](const LoraLinearProblem& p) { return to_string(p); });
  plain<LoraLinearBackwardProblem>(m, "LoraLinearBackwardProblem")
      .def_readwrite("forward", &LoraLinearBackwardProblem::forward)
      .def_readwrite("needs_dx", &LoraLinearBackwardProblem::needs_dx)
      .def_readwrite("needs_dweight", &LoraLinearBackwardProblem::needs_dweight)
      .def_readwrite("needs_dbias", &LoraLinearBackwardProblem::needs_dbias)
      .def_readwrite("needs_dlora", &LoraLinearBackwardProblem::needs_dlora)
      .def_readwrite("has_t", &LoraLinearBackwardProblem::has_t);
  m.def("kept_t_columns", &kept_t_columns, "The width of t, as run() hands it out with keeps_t.");

  // Of this operator plans alone, for predictions; torch and TensorRT run it.
  py::enum_<KvScales>(m, "KvScales")
      .value("none", KvScales::kNone)
      .value("per_position", KvScales::kPerPosition)
      .value("per_channel", KvScales::kPerChannel);
  py::enum_<KvSlots>(m, "KvSlots")
      .value("identity", KvSlots::kIdentity)
      .value("per_row", KvSlots::kPerRow)
      .value("per_position", KvSlots::kPerPosition);
  py::enum_<KvLayout>(m, "KvLayout").value("row_major", KvLayout::kRowMajor).value("blocked", KvLayout::kBlocked);
  plain<KvAttentionStepProblem>(m, "KvAttentionStepProblem")
      .def_readwrite("rows", &KvAttentionStepProblem::rows)
      .def_readwrite("tokens", &KvAttentionStepProblem::tokens)
      .def_readwrite("heads", &KvAttentionStepProblem::heads)
      .def_readwrite("head_size", &KvAttentionStepProblem::head_size)
      .def_readwrite("cache_rows", &KvAttentionStepProblem::cache_rows)
      .def_readwrite("capacity", &KvAttentionStepProblem::capacity)
      .def_readwrite("dtype", &KvAttentionStepProblem::dtype)
      .def_readwrite("cache_dtype", &KvAttentionStepProblem::cache_dtype)
      .def_readwrite("scales", &KvAttentionStepProblem::scales)
      .def_readwrite("slots", &KvAttentionStepProblem::slots)
      .def_readwrite("layout", &KvAttentionStepProblem::layout)
      .def_readwrite("append", &KvAttentionStepProblem::append);
  py::class_<KvAttentionStepPlan>(m, "KvAttentionStepPlan")
      .def_property_readonly("workspace_bytes", [](const KvAttentionStepPlan& p) { return workspace_bytes(p); })
      .def("__str__", [](const KvAttentionStepPlan& p) { return to_string(p); });
  m.def("plan", [](const KvAttentionStepProblem& problem, const DeviceInfo& device) {
    KvAttentionStepPlan chosen;
    raise_if_failed(plan(problem, device, &chosen));
    return chosen;
  });

  py::class_<LoraLinearPlan>(m, "LoraLinearPlan")
      .def_property_readonly("workspace_bytes", [](const LoraLinearPlan& p) { return workspace_bytes(p); })
      .def("__str__", [](const LoraLinearPlan& p) { return to_string(p); });
  py::class_<LoraLinearBackwardPlan>(m, "LoraLinearBackwardPlan")
      .def_property_readonly("workspace_bytes", [](const LoraLinearBackwardPlan& p) { return workspace_bytes(p); })
      .def("__str__", [](const LoraLinearBackwardPlan& p) { return to_string(p); });
  m.def("plan", [](const LoraLinearProblem& problem, const DeviceInfo& device) {
    LoraLinearPlan chosen;
    raise_if_failed(plan(problem, device, &chosen));
    return chosen;
  });
  m.def("plan", [](const LoraLinearBackwardProblem& problem, const DeviceInfo& device) {
    LoraLinearBackwardPlan chosen;
    raise_if_failed(plan(problem, device, &chosen));
    return chosen;
  });

  m.def(
      "run",
      [](const LoraLinearPlan& chosen, uintptr_t x, int64_t x_stride, uintptr_t weight, int64_t weight_stride,
         uintptr_t y, uintptr_t bias, uintptr_t residual, uintptr_t lora_a, int64_t a_stride, uintptr_t lora_b,
         int64_t b_stride_rank, int64_t b_stride_out, int64_t b_stride_block, uintptr_t scales, uintptr_t offsets,
         uintptr_t adapter_ids, uintptr_t t, uint64_t dropout_seed, uintptr_t dropout_seed_on_device,
         uintptr_t workspace, uintptr_t stream) {
        LoraLinearArgs args;
        args.x = pointer<void>(x);
        args.x_stride = x_stride;
        args.weight = pointer<void>(weight);
        args.weight_stride = weight_stride;
        args.bias = pointer<void>(bias);
        args.lora = bank_of(lora_a, a_stride, lora_b, b_stride_rank, b_stride_out, b_stride_block, scales, offsets,
                            adapter_ids);
        args.residual = pointer<void>(residual);
        args.y = pointer<void>(y);
        args.t = pointer<void>(t);
        args.dropout_seed = dropout_seed;
        args.dropout_seed_on_device = pointer<int64_t>(dropout_seed_on_device);
        args.workspace = pointer<void>(workspace);
        const py::gil_scoped_release released;
        raise_if_failed(run(chosen, args, executor_of(stream)));
      },
      py::arg("plan"), py::kw_only(), py::arg("x"), py::arg("x_stride"), py::arg("weight"), py::arg("weight_stride"),
      py::arg("y"), py::arg("bias") = 0, py::arg("residual") = 0, py::arg("lora_a") = 0, py::arg("a_stride") = 0,
      py::arg("lora_b") = 0, py::arg("b_stride_rank") = 0, py::arg("b_stride_out") = 0, py::arg("b_stride_block") = 0,
      py::arg("scales") = 0, py::arg("offsets") = 0, py::arg("adapter_ids") = 0, py::arg("t") = 0,
      py::arg("dropout_seed") = 0, py::arg("dropout_seed_on_device") = 0, py::arg("workspace") = 0,
      py::arg("stream") = 0, "lora_linear on addresses; strides count elements.");
  m.def(
      "run",
      [](const LoraLinearBackwardPlan& chosen, uintptr_t dy, uintptr_t x, int64_t x_stride, uintptr_t weight,
         int64_t weight_stride, uintptr_t lora_a, int64_t a_stride, uintptr_t lora_b, int64_t b_stride_rank,
         int64_t b_stride_out, int64_t b_stride_block, uintptr_t scales, uintptr_t offsets, uintptr_t adapter_ids,
         uintptr_t t, uint64_t dropout_seed, uintptr_t dropout_seed_on_device, uintptr_t dx, uintptr_t dweight,
         uintptr_t dbias, uintptr_t dlora_a, uintptr_t dlora_b, uintptr_t workspace, uintptr_t stream) {
        LoraLinearBackwardArgs args;
        args.dy = pointer<void>(dy);
        args.x = pointer<void>(x);
        args.x_stride = x_stride;
        args.weight = pointer<void>(weight);
        args.weight_stride = weight_stride;
        args.lora = bank_of(lora_a, a_stride, lora_b, b_stride_rank, b_stride_out, b_stride_block, scales, offsets,
                            adapter_ids);
        args.dropout_seed = dropout_seed;
        args.dropout_seed_on_device = pointer<int64_t>(dropout_seed_on_device);
        args.t = pointer<void>(t);
        args.dx = pointer<void>(dx);
        args.dweight = pointer<float>(dweight);
        args.dbias = pointer<float>(dbias);
        args.dlora_a = pointer<float>(dlora_a);
        args.dlora_b = pointer<float>(dlora_b);
        args.workspace = pointer<void>(workspace);
        const py::gil_scoped_release released;
        raise_if_failed(run(chosen, args, executor_of(stream)));
      },
      py::arg("plan"), py::kw_only(), py::arg("dy"), py::arg("x"), py::arg("x_stride"), py::arg("weight"),
      py::arg("weight_stride"), py::arg("lora_a") = 0, py::arg("a_stride") = 0, py::arg("lora_b") = 0,
      py::arg("b_stride_rank") = 0, py::arg("b_stride_out") = 0, py::arg("b_stride_block") = 0, py::arg("scales") = 0,
      py::arg("offsets") = 0, py::arg("adapter_ids") = 0, py::arg("t") = 0, py::arg("dropout_seed") = 0,
      py::arg("dropout_seed_on_device") = 0, py::arg("dx") = 0, py::arg("dweight") = 0, py::arg("dbias") = 0,
      py::arg("dlora_a") = 0, py::arg("dlora_b") = 0, py::arg("workspace") = 0, py::arg("stream") = 0,
      "The gradients of lora_linear on addresses.");

  // INT8: weights are packed in the CPU's memory, once, and copied to where they are used.
  plain<Int8LoraLinearProblem>(m, "Int8LoraLinearProblem")
      .def_readwrite("rows", &Int8LoraLinearProblem::rows)
      .def_readwrite("in_features", &Int8LoraLinearProblem::in_features)
      .def_readwrite("out_features", &Int8LoraLinearProblem::out_features)
      .def_readwrite("dtype", &Int8LoraLinearProblem::dtype)
      .def_readwrite("bias_dtype", &Int8LoraLinearProblem::bias_dtype)
      .def_readwrite("has_bias", &Int8LoraLinearProblem::has_bias)
      .def_readwrite("has_residual", &Int8LoraLinearProblem::has_residual)
      .def_readwrite("static_scale", &Int8LoraLinearProblem::static_scale)
      .def_readwrite("has_norm", &Int8LoraLinearProblem::has_norm)
      .def_readwrite("norm_dtype", &Int8LoraLinearProblem::norm_dtype)
      .def_readwrite("norm_eps", &Int8LoraLinearProblem::norm_eps)
      .def_readwrite("top_k", &Int8LoraLinearProblem::top_k)
      .def_readwrite("log_sum", &Int8LoraLinearProblem::log_sum)
      .def_readwrite("has_screen", &Int8LoraLinearProblem::has_screen)
      .def_readwrite("activation", &Int8LoraLinearProblem::activation)
      .def_readwrite("lora", &Int8LoraLinearProblem::lora)
      .def("__str__", [](const Int8LoraLinearProblem& p) { return to_string(p); });
  py::class_<Int8LoraLinearPlan>(m, "Int8LoraLinearPlan")
      .def_property_readonly("workspace_bytes", [](const Int8LoraLinearPlan& p) { return workspace_bytes(p); })
      .def("__str__", [](const Int8LoraLinearPlan& p) { return to_string(p); });
  m.def("plan", [](const Int8LoraLinearProblem& problem, const DeviceInfo& device) {
    Int8LoraLinearPlan chosen;
    raise_if_failed(plan(problem, device, &chosen));
    return chosen;
  });
  m.def(
      "run",
      [](const Int8LoraLinearPlan& chosen, uintptr_t x, int64_t x_stride, uintptr_t packed_weight, uintptr_t y,
         uintptr_t screen, uintptr_t bias, uintptr_t residual, uintptr_t lora_a, int64_t a_stride, uintptr_t lora_b,
         int64_t b_stride_rank, int64_t b_stride_out, int64_t b_stride_block, uintptr_t scales, uintptr_t offsets,
         uintptr_t adapter_ids, uintptr_t x_scale, float host_x_scale, uintptr_t norm_weight, uintptr_t norm_bias,
         uintptr_t top_columns, uintptr_t top_values, uintptr_t log_sum, uintptr_t workspace, uintptr_t stream) {
        Int8LoraLinearArgs args;
        args.x = pointer<void>(x);
        args.x_stride = x_stride;
        args.packed_weight = pointer<uint8_t>(packed_weight);
        args.screen = pointer<uint8_t>(screen);
        args.bias = pointer<void>(bias);
        args.lora = bank_of(lora_a, a_stride, lora_b, b_stride_rank, b_stride_out, b_stride_block, scales, offsets,
                            adapter_ids);
        args.x_scale = pointer<float>(x_scale);
        args.host_x_scale = host_x_scale;
        args.norm_weight = pointer<void>(norm_weight);
        args.norm_bias = pointer<void>(norm_bias);
        args.residual = pointer<void>(residual);
        args.y = pointer<void>(y);
        args.top_columns = pointer<int64_t>(top_columns);
        args.top_values = pointer<float>(top_values);
        args.log_sum = pointer<float>(log_sum);
        args.workspace = pointer<void>(workspace);
        const py::gil_scoped_release released;
        raise_if_failed(run(chosen, args, executor_of(stream)));
      },
      py::arg("plan"), py::kw_only(), py::arg("x"), py::arg("x_stride"), py::arg("packed_weight"), py::arg("y") = 0,
      py::arg("screen") = 0, py::arg("bias") = 0, py::arg("residual") = 0, py::arg("lora_a") = 0,
      py::arg("a_stride") = 0, py::arg("lora_b") = 0, py::arg("b_stride_rank") = 0, py::arg("b_stride_out") = 0,
      py::arg("b_stride_block") = 0, py::arg("scales") = 0, py::arg("offsets") = 0, py::arg("adapter_ids") = 0,
      py::arg("x_scale") = 0, py::arg("host_x_scale") = 0.0f, py::arg("norm_weight") = 0, py::arg("norm_bias") = 0,
      py::arg("top_columns") = 0, py::arg("top_values") = 0, py::arg("log_sum") = 0, py::arg("workspace") = 0,
      py::arg("stream") = 0, "int8_lora_linear on addresses; strides count elements.");
  m.def("int8_packed_bytes", &int8_packed_bytes, "The size of a packed weight of out_features, in_features.");
  m.def(
      "int8_pack",
      [](uintptr_t weight, uintptr_t scales, int64_t out_features, int64_t in_features, uintptr_t packed) {
        const py::gil_scoped_release released;
        int8_pack(pointer<int8_t>(weight), pointer<float>(scales), out_features, in_features, pointer<uint8_t>(packed));
      },
      py::kw_only(), py::arg("weight"), py::arg("scales"), py::arg("out_features"), py::arg("in_features"),
      py::arg("packed"),
      "A weight [out_features, in_features] in [-127, 127] and its fp32 scales, both in the CPU's memory, to "
      "int8_packed_bytes bytes there.");
}
