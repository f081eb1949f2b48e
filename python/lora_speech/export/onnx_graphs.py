"""Graphs as ONNX files that share one file of weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lora_speech.export.graph_inputs import example_inputs, open_dimensions
from lora_speech.export.graphs import Graph
from lora_speech.export.quiet import quiet
from lora_speech.export.target import Say

WEIGHTS = "weights.bin"
OPSET = 18
_ALIGNMENT = 64  # bytes; runtimes that map the file want weights on a cache line
_INLINE = 1024  # bytes; what is smaller stays in the graph, where shape inference can read it


def export_onnx(graph: Graph) -> Any:
    """A graph as an `onnx_ir.Model`, our operators as nodes with bodies."""
    from lora_kernels import export

    # A size of the example that is not open is the size: a step takes one token.
    inputs, adapters = example_inputs(graph, tokens=3 if graph.open_sizes else 1)
    with torch.no_grad(), quiet("torch.onnx"):
        program = torch.onnx.export(
            graph,
            (inputs, adapters),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=open_dimensions(graph),
            input_names=[*graph.inputs, *graph.adapter_inputs],
            output_names=list(graph.outputs),
            custom_translation_table=export.translations(),
            verbose=False,
        )
    assert program is not None
    return export.finish(program.model)


def write_onnx(graphs: Mapping[str, Graph], folder: Path, say: Say) -> None:
    """Write `NAME.onnx` of each graph and the weights they share."""
    import onnx_ir as ir

    models = {}
    for name, graph in graphs.items():
        say(f"exporting {name}")
        models[name] = export_onnx(graph)
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
