"""The graphs of a plan, and what an exporter asks of each: examples and open sizes."""

from __future__ import annotations

from typing import Any

import torch

from lora_speech.errors import ModelError
from lora_speech.export.companions import adapted_linears, ctc_decoding_of, decoding_of
from lora_speech.export.conformer_graphs import ConformerStepGraph, RecognizeGraph
from lora_speech.export.folder import CtcDecoding, Decoding
from lora_speech.export.graphs import EncodeGraph, Graph, PrefillGraph, StepGraph
from lora_speech.export.operators import KernelOperators, Operators
from lora_speech.export.target import Plan, whole_number

WHISPER_GRAPHS: dict[str, type[Graph]] = {
    "encode": EncodeGraph,
    "prefill": PrefillGraph,
    "step": StepGraph,
}


STEP_SIZES = {"chunk": 16, "left": 64}
"""Positions of a streaming step, and those that it sees behind it, where nothing else is asked."""


def make_graphs(
    plan: Plan, operators: Operators | None = None, model: Any = None
) -> tuple[dict[str, Graph], Decoding | CtcDecoding]:
    """All graphs of a plan's model by name, and how they are used.

    Parameters
    ----------
    plan : Plan
        What is exported.
    operators : Operators, optional
        What the graphs are made of; those of `lora_kernels` by default.
    model : torch.nn.Module, optional
        A copy of the plan's model in another type, to be used in its place.
    """
    model = plan.model.model if model is None else model
    operators, adapted = operators or KernelOperators(), adapted_linears(plan)
    family = plan.model.family
    if family.objective == "sequence":
        found = {name: kind(model, operators, adapted) for name, kind in WHISPER_GRAPHS.items()}
        _refuse_lost(adapted, found)
        return {name: graph.eval() for name, graph in found.items()}, decoding_of(plan)
    name = family.features.input_name
    graphs: dict[str, Graph] = {"recognize": RecognizeGraph(model, operators, adapted, name).eval()}
    step = None
    if hasattr(model.config, "encoder_config"):  # Parakeet; the other family hears waveforms
        sizes = {key: whole_number(plan.options, key, size) for key, size in STEP_SIZES.items()}
        step = ConformerStepGraph(model, operators, adapted, **sizes).eval()
        graphs["step"] = step
    _refuse_lost(adapted, graphs)
    return graphs, ctc_decoding_of(plan, step)


def _refuse_lost(adapted: tuple[str, ...], graphs: dict[str, Graph]) -> None:
    """An adapter's layer that a graph computes without it would be dropped in silence."""
    taken = {name for graph in graphs.values() for name in graph.adapted}
    if "step" in graphs and "recognize" in graphs:  # which both compute every layer
        taken = set(graphs["step"].adapted)
    lost = [name for name in adapted if name not in taken]
    if lost:
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        raise ModelError(
            f"adapter: expected layers that the exported graphs take adapters for, got "
            f"{', '.join(lost[:3])}{more}; merge the adapter (--merge) where no other layer "
            "shares their weights, or export it to peft, or train it without them"
        )


def example_inputs(
    graph: Graph, batch: int = 2, tokens: int = 3
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Inputs of a graph, and its adapters, of the right shapes and types."""
    inputs = [torch.ones(shape, dtype=dtype) for shape, dtype in graph.sizes(batch, tokens)]
    adapters = []
    for name in graph.adapter_inputs:
        linear, _, kind = name.rpartition(".")
        if not linear:
            adapters.append(torch.zeros(batch, dtype=torch.int32))
        elif kind == "offsets":
            adapters.append(torch.tensor([0, 3, 5], dtype=torch.int32))
        else:
            adapters.append(torch.zeros(5, graph.width(linear, kind), dtype=graph.dtype))
    return inputs, adapters


def open_dimensions(graph: Graph) -> tuple[list[Any], list[Any]]:
    """Sizes that stay open, as `torch.export` takes them.

    The batch, what a graph names, ranks, and the number of adapters.
    """
    named = {"batch": torch.export.Dim("batch"), "bounds": torch.export.Dim("bounds")}
    named |= {name: torch.export.Dim(name) for name in set(graph.open_sizes.values())}
    inputs: list[Any] = [{0: named["batch"]} for _ in graph.inputs]
    for (name, dimension), size in graph.open_sizes.items():
        inputs[graph.inputs.index(name)][dimension] = named[size]
    ranks = {name: torch.export.Dim(f"rank_{i}") for i, name in enumerate(graph.adapted)}
    adapters: list[Any] = []
    for name in graph.adapter_inputs:
        linear, _, kind = name.rpartition(".")
        first = named["bounds"] if kind == "offsets" else ranks.get(linear, named["batch"])
        adapters.append({0: first})
    return inputs, adapters
