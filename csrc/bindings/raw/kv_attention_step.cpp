// kv_attention_step on addresses.
#include "lora_kernels/kv_attention_step.h"

#include "raw.h"

namespace lora_kernels::raw {

void define_kv_attention_step(py::module_& m) {
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
      .def_readwrite("append", &KvAttentionStepProblem::append)
      .def_readwrite("weight_heads", &KvAttentionStepProblem::weight_heads)
      .def("__str__", [](const KvAttentionStepProblem& p) { return to_string(p); });
  define_plan<KvAttentionStepProblem, KvAttentionStepPlan>(m, "KvAttentionStepPlan");
  m.def(
      "run",
      [](const KvAttentionStepPlan& chosen, uintptr_t q, uintptr_t k_cache, uintptr_t v_cache, uintptr_t lengths,
         uintptr_t out, uintptr_t k, uintptr_t v, uintptr_t k_scales, uintptr_t v_scales, uintptr_t slots, float scale,
         const std::vector<int64_t>& weight_heads, uintptr_t weights, uintptr_t workspace, uintptr_t stream) {
        // The one operand that is not an address: its length is known here and nowhere below.
        const int64_t expected = chosen.problem.weight_heads, given = static_cast<int64_t>(weight_heads.size());
        if (given != expected)
          throw py::value_error("kv_attention_step: weight_heads: expected the " + std::to_string(expected) +
                                " heads of the plan's problem, got " + std::to_string(given));
        KvAttentionStepArgs args;
        args.q = pointer<void>(q);
        args.k = pointer<void>(k);
        args.v = pointer<void>(v);
        args.k_cache = pointer<void>(k_cache);
        args.v_cache = pointer<void>(v_cache);
        args.k_scales = pointer<float>(k_scales);
        args.v_scales = pointer<float>(v_scales);
        args.lengths = pointer<int32_t>(lengths);
        args.slots = pointer<int32_t>(slots);
        args.scale = scale;
        args.weight_heads = weight_heads.data();
        args.weights = pointer<float>(weights);
        args.out = pointer<void>(out);
        args.workspace = pointer<void>(workspace);
        const py::gil_scoped_release released;
        raise_if_failed(run(chosen, args, executor_of(stream)));
      },
      py::arg("plan"), py::kw_only(), py::arg("q"), py::arg("k_cache"), py::arg("v_cache"), py::arg("lengths"),
      py::arg("out"), py::arg("k") = 0, py::arg("v") = 0, py::arg("k_scales") = 0, py::arg("v_scales") = 0,
      py::arg("slots") = 0, py::arg("scale") = 1.0f, py::arg("weight_heads") = std::vector<int64_t>(),
      py::arg("weights") = 0, py::arg("workspace") = 0, py::arg("stream") = 0,
      "kv_attention_step on addresses; weight_heads is a list of heads.");
}

}  // namespace lora_kernels::raw
