"""LiteRT (TensorFlow Lite): one file with the signatures encode, prefill and step.

Shapes are fixed, as delegates want them: one row, the prompt of `decoding.json`, caches of all
positions, and the rank rows of the adapters that were exported. Signatures share their weights.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path

import numpy as np
import torch
from torch import nn

from lora_speech.errors import ModelError
from lora_speech.export.companions import write_adapters, write_companions
from lora_speech.export.folder import Decoding, read_banks, read_decoding
from lora_speech.export.graph_decoding import Arrays, GraphRecognizer
from lora_speech.export.graph_inputs import WHISPER_GRAPHS, example_inputs, make_graphs
from lora_speech.export.graphs import Graph, StepGraph, cache_names, cross_names
from lora_speech.export.operators import StandardOperators
from lora_speech.export.target import Plan, Say, Target

FILE = "model.tflite"


class _Named(nn.Module):
    """A graph from named tensors to named tensors, as signatures have them."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.inner = graph
        self.names = [signature_name(n) for n in (*graph.inputs, *graph.adapter_inputs)]

    def forward(self, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        given = [tensors[name] for name in self.names]
        count = len(self.inner.inputs)
        found = self.inner(given[:count], given[count:])
        return dict(zip(map(signature_name, self.inner.outputs), found, strict=True))


def signature_name(name: str) -> str:
    """What an input or output of a graph is called in a signature, where dots are not allowed."""
    return name.replace(".", "_")


def _inputs(graph: Graph, decoding: Decoding, folder: Path) -> dict[str, torch.Tensor]:
    """Inputs of a graph as the file takes them: one row, the adapters that are there."""
    tokens = 1 if isinstance(graph, StepGraph) else len(decoding.prompt)
    inputs, adapters = example_inputs(graph, batch=1, tokens=tokens)
    names = (*graph.inputs, *graph.adapter_inputs)
    found = dict(zip(names, inputs + adapters, strict=True))
    bank = read_banks(folder, decoding.live)
    return found | {n: torch.from_numpy(bank[n]) for n in found if n in bank}


def _write(plan: Plan, folder: Path, say: Say) -> None:
    import litert_torch

    graphs, decoding = make_graphs(plan, StandardOperators())
    assert isinstance(decoding, Decoding)
    write_adapters(plan, folder)
    write_companions(plan, folder, decoding)
    converter = litert_torch.Converter()
    for name, graph in graphs.items():
        inputs = _inputs(graph, decoding, folder)
        named = {signature_name(key): value for key, value in inputs.items()}
        converter.signature(name, _Named(graph).eval(), sample_kwargs=named)
    say("converting")
    with _quiet(), torch.no_grad():
        converter.convert().export(str(folder / FILE))
    if plan.int8:
        say("quantizing")
        _quantize(folder)


def _quantize(folder: Path) -> None:
    """INT8 weights with a scale per channel; activations are quantized as they come.

    Linears, convolutions and embeddings. Products by adapters, which are inputs, stay in floating
    point, and so do batched products: LiteRT (2.3) does not run all that the quantizer makes there.
    """
    from ai_edge_quantizer import qtyping, quantizer

    path, float_path = folder / FILE, folder / f"float.{FILE}"
    path.rename(float_path)
    kinds = qtyping.TFLOperationName
    with _quiet():
        quantize = quantizer.Quantizer(str(float_path))
        for kind in (kinds.FULLY_CONNECTED, kinds.CONV_2D, kinds.EMBEDDING_LOOKUP):
            quantize.add_dynamic_config(".*", kind, num_bits=8)
        quantize.quantize(
            serialize_to_path=path, enable_progress_bar=False, enable_progress_report=False
        )
    float_path.unlink()


class _Runner:
    """Runs the signatures of a file."""

    def __init__(self, path: Path, layers: int) -> None:
        from ai_edge_litert.interpreter import Interpreter

        self.interpreter = Interpreter(str(path), num_threads=torch.get_num_threads())
        self.runners = {
            name: self.interpreter.get_signature_runner(name) for name in WHISPER_GRAPHS
        }
        self.inputs = {name: r.get_input_details() for name, r in self.runners.items()}
        outputs = ("logits", *cross_names(layers), *cache_names("present", layers))
        self.outputs = {signature_name(name): name for name in outputs}

    def __call__(self, name: str, inputs: Arrays) -> Mapping[str, np.ndarray]:
        given = {signature_name(key): array for key, array in inputs.items()}
        feeds = {}
        for key, detail in self.inputs[name].items():
            shape = tuple(map(int, detail["shape"]))
            if given[key].shape != shape:
                raise ModelError(
                    f"{key}: expected shape {shape}, got {given[key].shape}; a LiteRT file takes "
                    "the sizes that it was exported with"
                )
            feeds[key] = given[key].astype(detail["dtype"], copy=False)
        found = self.runners[name](**feeds)
        return {self.outputs[key]: array for key, array in found.items()}


def _open(folder: Path) -> GraphRecognizer:
    decoding = read_decoding(folder)
    assert isinstance(decoding, Decoding)
    runner = _Runner(folder / FILE, decoding.layers)
    return GraphRecognizer(decoding, runner, read_banks(folder, decoding.live))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the converter's own remarks off the terminal."""
    import litert_torch

    shown, logger = litert_torch.config.show_progress, logging.getLogger()
    level = logger.level
    litert_torch.config.show_progress = False
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        litert_torch.config.show_progress = shown
        logger.setLevel(level)


def _usage(folder: Path) -> str:
    return (
        f"ai_edge_litert.interpreter.Interpreter('{folder}/{FILE}'): its signatures are explained "
        "in docs/export_litert.md"
    )


TARGET = Target(
    name="litert",
    write=_write,
    open=_open,
    live=True,
    int8="own",
    packages=("litert_torch", "ai_edge_quantizer", "ai_edge_litert"),
    extra="litert",
    usage=_usage,
)
