"""OpenVINO IR: an encoder, and a decoder that keeps its caches.

====== ============================================== =====================================
graph  inputs, after them the adapters                outputs
====== ============================================== =====================================
encode features [B, mel bands, frames]                cross key, value of each decoder layer
decode tokens [B, T], cross keys and values           logits [B, vocabulary] after the last
====== ============================================== =====================================

`decode` takes the prompt in one call and then each token; between calls its caches are states
(ReadValue, Assign), which ``InferRequest.reset_state`` empties. They grow, so nothing is spent on
positions that are not there, and OpenVINO's own fused attention takes the pattern.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from lora_speech.data.features import extract_features
from lora_speech.export.companions import decoding_of, write_adapters, write_companions
from lora_speech.export.folder import (
    Decoding,
    read_banks,
    read_decoding,
)
from lora_speech.export.graph_decoding import Arrays, GraphRecognizer
from lora_speech.export.graph_inputs import example_inputs, make_graphs
from lora_speech.export.graphs import Graph, StepGraph, cache_names
from lora_speech.export.operators import StandardOperators, Tensors
from lora_speech.export.target import Plan, Say, Target

EXACT = {"INFERENCE_PRECISION_HINT": "f32"}
"""Without it OpenVINO computes in bf16 where the processor does, faster and less exactly."""
GRAPHS = ("encode", "decode")
_CALIBRATION = 64
"""Calls of a graph that calibrate it at most; each holds caches, so more are not for free."""


class _GrowingCaches(StandardOperators):
    """Caches are as long as what is in them, in all rows alike."""

    def append(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        caches: Tensors,
        lengths: torch.Tensor,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `Operators`; caches end where `lengths` says."""
        keys, values = (
            torch.cat((cache, states.transpose(1, 2)), 2)
            for cache, states in zip(caches, (k, v), strict=True)
        )
        places = torch.arange(keys.shape[2], device=q.device)
        own = torch.arange(q.shape[1], device=q.device) + caches[0].shape[2]
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), keys, values, places <= own[:, None], scale=scale
        )
        return out.transpose(1, 2), keys, values


class _Flat(nn.Module):
    """A graph whose `forward` takes tensors one by one, as a tracer names them."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.inner = graph  # "graph" is a name that traced modules have
        self.inputs = tuple(name for name in graph.inputs if name != "lengths")
        self.names = (*self.inputs, *graph.adapter_inputs)
        self.outputs = graph.outputs
        self.caches = len(graph.caches) if isinstance(graph, StepGraph) else 0

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        inputs, adapters = list(tensors[: len(self.inputs)]), tensors[len(self.inputs) :]
        if self.caches:
            tokens, past = inputs[0], inputs[1]
            inputs.insert(1, torch.zeros_like(tokens[:, 0], dtype=torch.int32) + past.shape[2])
        found: tuple[torch.Tensor, ...] = self.inner(inputs, adapters)
        return found


def _convert(flat: _Flat) -> Any:
    """A graph as an `openvino.Model` without states; batch, tokens, past and ranks are open."""
    import openvino

    inputs, adapters = example_inputs(flat.inner, tokens=2)
    names = (*flat.inner.inputs, *flat.inner.adapter_inputs)
    examples = dict(zip(names, inputs + adapters, strict=True))
    if flat.caches:
        examples |= {n: x[:, :, :3].contiguous() for n, x in examples.items() if "past" in n}
    # Traced, not exported: a tracer keeps sizes open as they are, torch.export reasons about the
    # rank of every adapter, which takes it minutes.
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = openvino.convert_model(flat, example_input=tuple(examples[n] for n in flat.names))
    for name, port in zip(flat.names, model.inputs, strict=True):
        port.get_tensor().set_names({name})
        port.get_node().set_friendly_name(name)
        port.get_node().set_partial_shape(openvino.PartialShape(_open_shape(name, examples[name])))
    for name, port in zip(flat.outputs, model.outputs, strict=True):
        port.get_tensor().set_names({name})
    model.validate_nodes_and_infer_types()
    return model


def _open_shape(name: str, example: torch.Tensor) -> list[int]:
    """A shape with -1 for what may differ: rows, tokens, past positions, ranks."""
    sizes = list(example.shape)
    sizes[0] = -1
    if name == "tokens":
        sizes[1] = -1
    if name.startswith("past"):
        sizes[2] = -1
    return sizes


def _keep_caches(model: Any, layers: int) -> None:
    """Turn past and present into states, empty at first and as wide as the batch."""
    from openvino import opset13 as op
    from openvino import passes

    past, present = cache_names("past", layers), cache_names("present", layers)
    shapes = [model.input(name).get_partial_shape() for name in past]
    heads, size = shapes[0][1].get_length(), shapes[0][3].get_length()
    manager = passes.Manager()
    manager.register_pass(passes.MakeStateful(dict(zip(past, present, strict=True))))
    manager.run_passes(model)
    rows = op.gather(
        op.shape_of(model.input("tokens"), "i64"), np.array([0], np.int64), np.int64(0)
    )
    shape = op.concat([rows, op.constant(np.array([heads, 0, size], np.int64))], 0)
    empty = op.broadcast(op.constant(np.float32(0)), shape)
    for node in model.get_ops():
        if node.get_type_name() == "ReadValue":
            node.set_arguments([empty])
    model.validate_nodes_and_infer_types()


class _Runner:
    """Runs the graphs; what a step does not name keeps its value from the call before."""

    def __init__(self, models: Mapping[str, Any]) -> None:
        import openvino

        core = openvino.Core()
        # Compiling joins names: those that were given are in the models.
        self.inputs = {n: {p.get_any_name(): p for p in m.inputs} for n, m in models.items()}
        self.outputs = {n: [p.get_any_name() for p in m.outputs] for n, m in models.items()}
        self.requests = {
            name: core.compile_model(model, "CPU", EXACT).create_infer_request()
            for name, model in models.items()
        }
        self._bound: dict[str, Arrays] = {}

    def __call__(self, name: str, inputs: Arrays) -> Mapping[str, np.ndarray]:
        graph = "encode" if name == "encode" else "decode"
        request = self.requests[graph]
        if name == "step":
            feeds: Arrays = {"tokens": inputs["tokens"]}
        else:
            request.reset_state()
            feeds = {key: inputs[key] for key in self.inputs[graph]}
            self._bound[graph] = feeds  # OpenVINO reads their memory in every later step
        request.infer(feeds, share_inputs=True)
        found = (request.get_output_tensor(i).data for i in range(len(self.outputs[graph])))
        return dict(zip(self.outputs[graph], found, strict=True))


class _Recorder:
    """Runs graphs whose caches are inputs and outputs, and keeps what they were given."""

    def __init__(self, models: Mapping[str, Any], decoding: Decoding) -> None:
        self.runner = _Runner(models)
        shape = (1, decoding.heads, 0, decoding.head_size)
        self.empty = {n: np.zeros(shape, np.float32) for n in cache_names("past", decoding.layers)}
        self.calls: dict[str, list[Arrays]] = {name: [] for name in GRAPHS}

    def __call__(self, name: str, inputs: Arrays) -> Mapping[str, np.ndarray]:
        graph = "encode" if name == "encode" else "decode"
        given = {**self.empty, **inputs}
        feeds = {key: given[key] for key in self.runner.inputs[graph]}
        self.calls[graph].append(feeds)
        found = self.runner("encode" if name == "encode" else "prefill", feeds)
        return {key: value.copy() for key, value in found.items()}


def _quantized(plan: Plan, models: Mapping[str, Any], folder: Path, say: Say) -> dict[str, Any]:
    """INT8 weights and activations, calibrated by decoding the plan's samples."""
    import nncf

    decoding = decoding_of(plan)
    recorder = _Recorder(models, decoding)
    adapters = _adapters(folder, decoding, recorder.runner)
    recognizer = GraphRecognizer(decoding, recorder, adapters)
    for samples in plan.samples:
        features = extract_features(plan.model, [samples[: decoding.window_samples]])
        window = features[plan.model.family.features.input_name].numpy()
        for adapter in (None, *plan.live):
            recognizer.decode(window, decoding.prompt, decoding.max_new_tokens, adapter)
    nncf.set_log_level(logging.ERROR)
    found: dict[str, Any] = {}
    for name, model in models.items():
        say(f"quantizing {name}")
        calls = recorder.calls[name]
        chosen = calls[:: -(-len(calls) // _CALIBRATION)]
        # Adapters come later and differ from those that are here: their products stay in floating
        # point, as elsewhere in this package.
        ignored = nncf.IgnoredScope(names=_adapter_products(model))
        with redirect_stdout(StringIO()):  # its progress bars
            found[name] = nncf.quantize(
                model,
                nncf.Dataset(chosen),
                subset_size=len(chosen),
                model_type=nncf.ModelType.TRANSFORMER,
                ignored_scope=ignored,
            )
    return found


def _adapter_products(model: Any) -> list[str]:
    """Names of the products by matrices that are inputs."""
    found = []
    for node in model.get_ops():
        if node.get_type_name() != "MatMul":
            continue
        matrix = node.input_value(1).get_node()
        while matrix.get_type_name() in ("Convert", "Transpose"):
            matrix = matrix.input_value(0).get_node()
        if matrix.get_type_name() == "Parameter" and ".lora_" in matrix.get_friendly_name():
            found.append(node.get_friendly_name())
    return found


def _adapters(folder: Path, decoding: Decoding, runner: _Runner) -> dict[str, np.ndarray]:
    """The inputs that hold the adapters of a folder."""
    shapes = [
        (name, [-1 if size.is_dynamic else size.get_length() for size in port.get_partial_shape()])
        for ports in runner.inputs.values()
        for name, port in ports.items()
    ]
    return read_banks(folder, decoding.live, shapes)


def _write(plan: Plan, folder: Path, say: Say) -> None:
    import openvino

    graphs, decoding = make_graphs(plan, _GrowingCaches())
    assert isinstance(decoding, Decoding)
    write_adapters(plan, folder)
    write_companions(plan, folder, decoding)
    models = {}
    for name, graph in zip(GRAPHS, (graphs["encode"], graphs["step"]), strict=True):
        say(f"converting {name}")
        models[name] = _convert(_Flat(graph))
    if plan.int8:
        models = _quantized(plan, models, folder, say)
    _keep_caches(models["decode"], decoding.layers)
    for name, model in models.items():
        # fp32 as it is: in half precision it would be another model than torch's.
        openvino.save_model(model, folder / f"{name}.xml", compress_to_fp16=False)


def _open(folder: Path) -> GraphRecognizer:
    import openvino

    decoding, core = read_decoding(folder), openvino.Core()
    assert isinstance(decoding, Decoding)
    runner = _Runner({name: core.read_model(folder / f"{name}.xml") for name in GRAPHS})
    return GraphRecognizer(decoding, runner, _adapters(folder, decoding, runner))


def _usage(folder: Path) -> str:
    return (
        f"openvino.Core().compile_model('{folder}/decode.xml', 'CPU'), and encode.xml: inputs and "
        "outputs are explained in docs/export_openvino.md"
    )


TARGET = Target(
    name="openvino",
    write=_write,
    open=_open,
    live=True,
    int8="own",
    packages=("openvino", "nncf"),
    extra="openvino",
    usage=_usage,
)
