"""AOTInductor: both graphs compiled ahead of time, run by LibTorch without Python."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_speech.errors import SpeechError
from lora_speech.export.graph_decoding import GraphRecognizer
from lora_speech.export.graphs import Graph
from lora_speech.export.quiet import quiet
from lora_speech.export.target import Plan, Say, Target
from lora_speech.export.torch_graphs import (
    GRAPHS,
    flat_inputs,
    open_torch_graphs,
    torch_graphs,
    transcribe_usage,
    write_torch_companions,
)

_OPTIONS = {
    # What calls the kernels is a small part of the time; its compilation is most of the compiler's.
    "aot_inductor.compile_wrapper_opt_level": "O0",
}


class _Flat(nn.Module):
    """A graph with inputs one by one."""

    def __init__(self, over: Graph) -> None:
        super().__init__()
        self.over = over

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        own = len(self.over.inputs)
        found: tuple[torch.Tensor, ...] = self.over(inputs[:own], inputs[own:])
        return found


def _open_sizes(graph: Graph) -> tuple[dict[int, Any], ...]:
    """Which sizes are found out at run time: the batch, the tokens, ranks, the adapters."""
    dynamic = torch.export.Dim.DYNAMIC
    sizes = {name: {0: dynamic} for name in (*graph.inputs, *graph.adapter_inputs)}
    for name, dimension in graph.open_sizes:
        sizes[name][dimension] = dynamic
    return tuple(sizes.values())


def _ready(options: Mapping[str, str]) -> None:
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        raise SpeechError(
            "--to aoti: expected a C++ compiler, which AOTInductor calls, got neither g++ nor "
            "clang++; install one (apt install g++), or export with --to torchscript"
        )


def _write(plan: Plan, folder: Path, say: Say) -> None:
    from torch.fx.experimental import _config

    shapes: Any = _config
    graphs = torch_graphs(plan)
    adapter_dtype = graphs["decode"].adapter_dtype
    for name, graph in graphs.items():
        inputs, sizes = flat_inputs(graph, adapter_dtype), _open_sizes(graph)
        say(f"compiling {name}")
        # Oblivious: what is 1 (a token, a batch, a rank) is compiled as any other size.
        with torch.no_grad(), quiet("torch._inductor"), shapes.patch(backed_size_oblivious=True):
            program = torch.export.export(
                _Flat(graph).eval(), inputs, dynamic_shapes=(sizes,), strict=False
            )
            torch._inductor.aoti_compile_and_package(
                program, package_path=str(folder / f"{name}.pt2"), inductor_configs=_OPTIONS
            )
    write_torch_companions(plan, graphs, folder, "aoti")


def _open(folder: Path) -> GraphRecognizer:
    with quiet("torch._inductor"):
        packages = {
            name: torch._inductor.aoti_load_package(str(folder / f"{name}.pt2")) for name in GRAPHS
        }

    def run(name: str, inputs: list[torch.Tensor]) -> Any:
        found = packages[name](*inputs)
        return [found] if isinstance(found, torch.Tensor) else found

    return open_torch_graphs(folder, run)


TARGET = Target(
    name="aoti",
    write=_write,
    open=_open,
    live=True,
    int8="ours",
    ready=_ready,
    usage=transcribe_usage,
)
