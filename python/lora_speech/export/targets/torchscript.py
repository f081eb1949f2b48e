"""TorchScript: one file with both graphs as methods, run by LibTorch without Python."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_speech.export.graph_decoding import GraphRecognizer
from lora_speech.export.graphs import Graph
from lora_speech.export.target import Plan, Say, Target
from lora_speech.export.torch_graphs import (
    flat_inputs,
    open_torch_graphs,
    torch_graphs,
    transcribe_usage,
    write_torch_companions,
)

MODEL = "model.ts"


class _Methods(nn.Module):
    """Both graphs over one Whisper, with inputs one by one."""

    def __init__(self, graphs: dict[str, Graph]) -> None:
        super().__init__()
        self.graphs = nn.ModuleDict(graphs)

    def encode(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self._run("encode", inputs)

    def decode(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self._run("decode", inputs)

    def _run(self, name: str, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        graph: Any = self.graphs[name]
        own = len(graph.inputs)
        return graph(inputs[:own], inputs[own:])


def _write(plan: Plan, folder: Path, say: Say) -> None:
    graphs = torch_graphs(plan)
    adapter_dtype = graphs["decode"].adapter_dtype
    examples = {name: flat_inputs(graph, adapter_dtype) for name, graph in graphs.items()}
    say("tracing")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that TorchScript is no longer developed
        # What tracing checks, a second run of it, would begin with caches that the first filled.
        traced = torch.jit.trace_module(_Methods(graphs).eval(), examples, check_trace=False)
        torch.jit.save(traced, str(folder / MODEL))
    write_torch_companions(plan, graphs, folder, "torchscript")


def _open(folder: Path) -> GraphRecognizer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.jit.load(str(folder / MODEL))

    def run(name: str, inputs: list[torch.Tensor]) -> Any:
        return getattr(model, name)(*inputs)

    return open_torch_graphs(folder, run)


TARGET = Target(
    name="torchscript",
    write=_write,
    open=_open,
    live=True,
    int8="ours",
    usage=transcribe_usage,
)
