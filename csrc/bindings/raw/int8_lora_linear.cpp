// int8_lora_linear on addresses.
#include "lora_kernels/int8_lora_linear.h"

#include "raw.h"

namespace lora_kernels::raw {

void define_int8_lora_linear(py::module_& m) {
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
  define_plan<Int8LoraLinearProblem, Int8LoraLinearPlan>(m, "Int8LoraLinearPlan");
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
  m.def(
      "int8_unpack",
      [](const DeviceInfo& device, uintptr_t packed, int64_t out_features, int64_t in_features, uintptr_t weight,
         uintptr_t scales, uintptr_t stream) {
        const auto* from = pointer<uint8_t>(packed);
        auto* to = pointer<int8_t>(weight);
        auto* to_scales = pointer<float>(scales);
        const py::gil_scoped_release released;
        if (device.cuda.arch)
          raise_if_failed(int8_unpack_cuda(from, out_features, in_features, to, to_scales, pointer<void>(stream)));
        else
          int8_unpack(from, out_features, in_features, to, to_scales);
      },
      py::arg("device"), py::kw_only(), py::arg("packed"), py::arg("out_features"), py::arg("in_features"),
      py::arg("weight"), py::arg("scales"), py::arg("stream") = 0,
      "The inverse of int8_pack, in the memory of `device`.");
  m.def("int8_screen_bytes", &int8_screen_bytes, "The size of the screen of a weight of out_features, in_features.");
  m.def(
      "int8_pack_screen",
      [](uintptr_t packed, int64_t out_features, int64_t in_features, uintptr_t screen) {
        const py::gil_scoped_release released;
        int8_pack_screen(pointer<uint8_t>(packed), out_features, in_features, pointer<uint8_t>(screen));
      },
      py::kw_only(), py::arg("packed"), py::arg("out_features"), py::arg("in_features"), py::arg("screen"),
      "The screen of a packed weight, both in the CPU's memory.");
}

}  // namespace lora_kernels::raw
