// kv_relative_step on addresses.
#include "lora_kernels/kv_relative_step.h"

#include "raw.h"

namespace lora_kernels::raw {

void define_kv_relative_step(py::module_& m) {
  plain<KvRelativeStepProblem>(m, "KvRelativeStepProblem")
      .def_readwrite("rows", &KvRelativeStepProblem::rows)
      .def_readwrite("tokens", &KvRelativeStepProblem::tokens)
      .def_readwrite("heads", &KvRelativeStepProblem::heads)
      .def_readwrite("head_size", &KvRelativeStepProblem::head_size)
      .def_readwrite("cache_rows", &KvRelativeStepProblem::cache_rows)
      .def_readwrite("capacity", &KvRelativeStepProblem::capacity)
      .def_readwrite("left", &KvRelativeStepProblem::left)
      .def_readwrite("dtype", &KvRelativeStepProblem::dtype)
      .def_readwrite("cache_dtype", &KvRelativeStepProblem::cache_dtype)
      .def_readwrite("counts", &KvRelativeStepProblem::counts)
      .def_readwrite("slots", &KvRelativeStepProblem::slots)
      .def("__str__", [](const KvRelativeStepProblem& p) { return to_string(p); });
  define_plan<KvRelativeStepProblem, KvRelativeStepPlan>(m, "KvRelativeStepPlan");
  m.def(
      "run",
      [](const KvRelativeStepPlan& chosen, uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t k_cache, uintptr_t v_cache,
         uintptr_t positions, uintptr_t bias_u, uintptr_t bias_v, uintptr_t lengths, uintptr_t out, uintptr_t counts,
         uintptr_t slots, float scale, uintptr_t workspace, uintptr_t stream) {
        KvRelativeStepArgs args;
        args.q = pointer<void>(q);
        args.k = pointer<void>(k);
        args.v = pointer<void>(v);
        args.k_cache = pointer<void>(k_cache);
        args.v_cache = pointer<void>(v_cache);
        args.positions = pointer<void>(positions);
        args.bias_u = pointer<void>(bias_u);
        args.bias_v = pointer<void>(bias_v);
        args.lengths = pointer<int32_t>(lengths);
        args.counts = pointer<int32_t>(counts);
        args.slots = pointer<int32_t>(slots);
        args.scale = scale;
        args.out = pointer<void>(out);
        args.workspace = pointer<void>(workspace);
        const py::gil_scoped_release released;
        raise_if_failed(run(chosen, args, executor_of(stream)));
      },
      py::arg("plan"), py::kw_only(), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("k_cache"), py::arg("v_cache"),
      py::arg("positions"), py::arg("bias_u"), py::arg("bias_v"), py::arg("lengths"), py::arg("out"),
      py::arg("counts") = 0, py::arg("slots") = 0, py::arg("scale") = 1.0f, py::arg("workspace") = 0,
      py::arg("stream") = 0, "kv_relative_step on addresses.");
}

}  // namespace lora_kernels::raw
