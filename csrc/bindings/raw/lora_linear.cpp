// lora_linear and its gradients on addresses.
#include "lora_kernels/lora_linear.h"

#include "raw.h"

namespace lora_kernels::raw {

void define_lora_linear(py::module_& m) {
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
  define_plan<LoraLinearProblem, LoraLinearPlan>(m, "LoraLinearPlan");
  define_plan<LoraLinearBackwardProblem, LoraLinearBackwardPlan>(m, "LoraLinearBackwardPlan");

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
}

}  // namespace lora_kernels::raw
