"""The three graphs as ONNX files that share one file of weights."""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lora_speech.export.companions import adapted_linears, decoding_of
from lora_speech.export.graphs import (
    EncodeGraph,
    Graph,
    KernelOperators,
    Operators,
    PrefillGraph,
    StepGraph,
)
from lora_speech.export.target import Plan, Say

GRAPHS: dict[str, type[Graph]] = {
    "encode": EncodeGraph,
    "prefill": PrefillGraph,
    "step": StepGraph,
}
WEIGHTS = "weights.bin"
OPSET = 18
_ALIGNMENT = 64  # bytes; runtimes that map the file want weights on a cache line
_INLINE = 1024  # bytes; what is smaller stays in the graph, where shape inference can read it


def make_graph(
    plan: Plan, name: str, operators: Operators | None = None, whisper: Any = None
) -> Graph:
    """One of the three graphs of a plan's Whisper, or of a copy of it in another type."""
    whisper = plan.model.model if whisper is None else whisper
    return GRAPHS[name](whisper, operators or KernelOperators(), adapted_linears(plan)).eval()


def example_inputs(
    plan: Plan, graph: Graph, batch: int = 2, prompt: int = 3
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Inputs of a graph, and its adapters, of the right shapes and types."""
    decoding = decoding_of(plan)
    head, dtype = (batch, decoding.heads), graph.dtype
    window = decoding.window_samples // decoding.hop_length
    tokens = 1 if isinstance(graph, StepGraph) else prompt
    shapes: dict[str, torch.Tensor] = {
        "features": torch.zeros(batch, decoding.mel_bands, window, dtype=dtype),
        "tokens": torch.ones(batch, tokens, dtype=torch.int64),
        "lengths": torch.full((batch,), prompt, dtype=torch.int32),
    }
    inputs = []
    for name in graph.inputs:
        positions = decoding.cross_positions if name.startswith("cross") else decoding.positions
        empty = torch.zeros(*head, positions, decoding.head_size, dtype=dtype)
        inputs.append(shapes.get(name, empty))
    adapters = []
    linears = dict(graph.model.named_modules())
    for name in graph.adapter_inputs:
        linear, _, kind = name.rpartition(".")
        if not linear:
            adapters.append(torch.zeros(batch, dtype=torch.int32))
        elif kind == "offsets":
            adapters.append(torch.tensor([0, 3, 5], dtype=torch.int32))
        else:
            module: Any = linears[linear]
            width = module.in_features if kind == "lora_a" else module.out_features
            adapters.append(torch.zeros(5, width, dtype=dtype))
    return inputs, adapters


def _dynamic(graph: Graph) -> tuple[list[Any], list[Any]]:
    """Which sizes stay open: the batch, the prompt, ranks and the number of adapters."""
    batch = torch.export.Dim("batch")
    prompt = torch.export.Dim("prompt")
    inputs: list[Any] = []
    for name in graph.inputs:
        sizes = {0: batch}
        if name == "tokens" and isinstance(graph, PrefillGraph):
            sizes[1] = prompt
        inputs.append(sizes)
    ranks = {name: torch.export.Dim(f"rank_{i}") for i, name in enumerate(graph.adapted)}
    bounds = torch.export.Dim("bounds")
    adapters: list[Any] = []
    for name in graph.adapter_inputs:
        linear, _, kind = name.rpartition(".")
        adapters.append(
            {0: batch if not linear else bounds if kind == "offsets" else ranks[linear]}
        )
    return inputs, adapters


def export_onnx(plan: Plan, graph: Graph) -> Any:
    """A graph as an `onnx_ir.Model`, our operators as nodes with bodies."""
    from lora_kernels import export

    inputs, adapters = example_inputs(plan, graph)
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            graph,
            (inputs, adapters),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=_dynamic(graph),
            input_names=[*graph.inputs, *graph.adapter_inputs],
            output_names=list(graph.outputs),
            custom_translation_table=export.translations(),
            verbose=False,
        )
    assert program is not None
    return export.finish(program.model)


def write_onnx(plan: Plan, folder: Path, say: Say, whisper: Any = None) -> None:
    """Write `encode.onnx`, `prefill.onnx`, `step.onnx` and the weights they share.

    Of the plan's Whisper, or of a copy of it in another type.
    """
    import onnx_ir as ir

    models = {}
    for name in GRAPHS:
        say(f"exporting {name}")
        models[name] = export_onnx(plan, make_graph(plan, name, whisper=whisper))
    say("writing the weights")
    _share_weights(models.values(), folder)
    for name, model in models.items():
        ir.save(model, folder / f"{name}.onnx")


def _share_weights(models: Any, folder: Path) -> None:
    """Move initializers to one file; equal ones of several graphs are there once."""
    import onnx_ir as ir

    places: dict[bytes, tuple[int, int]] = {}
    with open(folder / WEIGHTS, "wb") as file:
        for model in models:
            for value in model.graph.initializers.values():
                tensor = value.const_value
                if tensor is None or tensor.nbytes < _INLINE:
                    continue
                data = tensor.tobytes()
                key = hashlib.sha256(data).digest()
                if key not in places:
                    file.write(b"\0" * (-file.tell() % _ALIGNMENT))
                    places[key] = (file.tell(), len(data))
                    file.write(data)
                offset, length = places[key]
                value.const_value = ir.ExternalTensor(
                    WEIGHTS, offset, length, tensor.dtype,
                    name=value.name, shape=tensor.shape, base_dir=str(folder),
                )  # fmt: skip


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's own remarks off the terminal."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
