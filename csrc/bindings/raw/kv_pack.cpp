// kv_pack on addresses.
#include "lora_kernels/kv_pack.h"

#include "lora_kernels/kv_packing.h"
#include "raw.h"

namespace lora_kernels::raw {

void define_kv_pack(py::module_& m) {
  plain<KvPackProblem>(m, "KvPackProblem")
      .def_readwrite("cache_rows", &KvPackProblem::cache_rows)
      .def_readwrite("positions", &KvPackProblem::positions)
      .def_readwrite("heads", &KvPackProblem::heads)
      .def_readwrite("head_size", &KvPackProblem::head_size)
      .def_readwrite("dtype", &KvPackProblem::dtype)
      .def("__str__", [](const KvPackProblem& p) { return to_string(p); });
  define_plan<KvPackProblem, KvPackPlan>(m, "KvPackPlan");
  m.def(
      "run",
      [](const KvPackPlan& chosen, uintptr_t k, int64_t k_stride, int64_t k_row_stride, uintptr_t v, int64_t v_stride,
         int64_t v_row_stride, uintptr_t packed_k, uintptr_t packed_v, uintptr_t k_scales, uintptr_t v_scales,
         uintptr_t workspace, uintptr_t stream) {
        KvPackArgs args;
        args.k = pointer<void>(k);
        args.v = pointer<void>(v);
        args.k_stride = k_stride;
        args.v_stride = v_stride;
        args.k_row_stride = k_row_stride;
        args.v_row_stride = v_row_stride;
        args.packed_k = pointer<int8_t>(packed_k);
        args.packed_v = pointer<int8_t>(packed_v);
        args.k_scales = pointer<float>(k_scales);
        args.v_scales = pointer<float>(v_scales);
        args.workspace = pointer<void>(workspace);
        const py::gil_scoped_release released;
        raise_if_failed(run(chosen, args, executor_of(stream)));
      },
      py::arg("plan"), py::kw_only(), py::arg("k"), py::arg("k_stride"), py::arg("k_row_stride"), py::arg("v"),
      py::arg("v_stride"), py::arg("v_row_stride"), py::arg("packed_k"), py::arg("packed_v"), py::arg("k_scales"),
      py::arg("v_scales"), py::arg("workspace") = 0, py::arg("stream") = 0,
      "kv_pack on addresses; strides count elements.");
  m.def("kv_key_bytes", &kv_key_bytes, py::arg("positions"), py::arg("head_size"),
        "The size of the packed keys of one cache row and head.");
  m.def("kv_value_bytes", &kv_value_bytes, py::arg("positions"), py::arg("head_size"),
        "The size of the packed values of one cache row and head.");
}

}  // namespace lora_kernels::raw
