"""The graphs as LibTorch runs them: our operators inside, caches written where they are.

`decode` is the step of `graphs.py` for any number of tokens. Its first call takes the prompt, over
caches of zeros; whoever runs it keeps them. So the decoder's weights are there once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from lora_speech.errors import ModelError
from lora_speech.export.companions import (
    adapted_linears,
    decoding_of,
    write_adapters,
    write_companions,
)
from lora_speech.export.folder import CtcDecoding, banks, read_adapters, read_decoding
from lora_speech.export.graph_decoding import Arrays, GraphRecognizer
from lora_speech.export.graph_inputs import example_inputs
from lora_speech.export.graphs import EncodeGraph, Graph, StepGraph
from lora_speech.export.operators import KernelOperators, Tensors
from lora_speech.export.target import Plan

INTERFACE = "graphs.json"
FEATURES = "features.safetensors"
TOKENS = "tokens.txt"

RunTensors = Callable[[str, list[torch.Tensor]], Sequence[torch.Tensor]]
"""Runs ``encode`` or ``decode`` over tensors in the order of its inputs."""


class InPlaceOperators(KernelOperators):
    """The operators of `lora_kernels` as they are: caches are no results, they are written."""

    def append(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        caches: Tensors,
        lengths: torch.Tensor,
        scale: float,
    ) -> tuple[torch.Tensor, ...]:
        """See `Operators`; the attention alone."""
        from lora_kernels import ops

        return ops.kv_attention_step(q, k, v, caches[0], caches[1], lengths, scale=scale)[:1]

    def fixed(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """See `Operators`."""
        from lora_kernels import ops

        lengths = q.new_zeros(q.shape[:1], dtype=torch.int32) + keys.shape[2]
        return ops.kv_attention_step(q, None, None, keys, values, lengths, scale=scale)[0]


class DecodeGraph(StepGraph):
    """Tokens [B, T] to the logits after them; then the caches have them too."""

    open_sizes = MappingProxyType({("tokens", 1): "tokens"})
    cache_dtype = adapter_dtype = torch.float32

    def __init__(self, whisper: Any, operators: Any, adapted: Iterable[str] = ()) -> None:
        super().__init__(whisper, operators, adapted)
        self.outputs = ("logits",)


GRAPHS = ("encode", "decode")


def torch_graphs(plan: Plan) -> dict[str, Graph]:
    """Both graphs of a plan's Whisper."""
    from lora_speech.export import torch_int8_graphs as int8

    adapted = adapted_linears(plan)
    whisper, operators = plan.model.model, InPlaceOperators()
    kinds: tuple[type[Graph], type[Graph]] = (EncodeGraph, DecodeGraph)
    if int8.has_int8_graphs(whisper):
        kinds = (int8.Int8EncodeGraph, int8.Int8DecodeGraph)
    graphs = (kind(whisper, operators, adapted).eval() for kind in kinds)
    return dict(zip(GRAPHS, graphs, strict=True))


def write_torch_companions(
    plan: Plan, graphs: dict[str, Graph], folder: Path, runtime: str
) -> None:
    """Write what a program without Python needs beside the graphs.

    ``graphs.json`` names the graphs' inputs, in order, the types of caches and adapters, and the
    sizes (K, N) of the linears whose adapters are inputs; ``features.safetensors`` holds the mel
    filters, ``tokens.txt`` the text of each token.
    """
    decode: Any = graphs["decode"]
    adapted = {name: graph for graph in graphs.values() for name in graph.adapted}
    interface = {
        "runtime": runtime,
        "inputs": {name: [*graph.inputs, *graph.adapter_inputs] for name, graph in graphs.items()},
        "cache_dtype": _name(decode.cache_dtype),
        "adapter_dtype": _name(decode.adapter_dtype),
        "adapted": {
            name: [graph.width(name, kind) for kind in ("lora_a", "lora_b")]
            for name, graph in sorted(adapted.items())
        },
    }
    (folder / INTERFACE).write_text(json.dumps(interface, indent=1) + "\n", encoding="utf-8")
    write_companions(plan, folder, decoding_of(plan))
    write_adapters(plan, folder)
    _write_features(plan, folder)
    _write_tokens(plan, folder)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _write_features(plan: Plan, folder: Path) -> None:
    from safetensors.numpy import save_file

    extractor = plan.model.processor.feature_extractor
    if getattr(extractor, "dither", 0.0) or getattr(extractor, "do_normalize", False):
        raise ModelError(
            "base: expected a feature extractor that neither dithers nor normalizes, got one that "
            "does; set both off in its preprocessor_config.json, as Whisper's own has it"
        )
    filters = np.ascontiguousarray(np.asarray(extractor.mel_filters, np.float32).T)
    save_file({"mel_filters": filters}, str(folder / FEATURES))


def _write_tokens(plan: Plan, folder: Path) -> None:
    """A line per token id: its bytes in hexadecimal, none for what is no text."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    from lora_speech.decoding.prompts import special_tokens

    tokenizer = plan.model.processor.tokenizer
    byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    added, special = tokenizer.added_tokens_decoder, set(tokenizer.all_special_ids)
    stamps = special_tokens(plan.model.model).first_timestamp
    count = int(plan.model.model.config.vocab_size)
    lines = []
    for token, text in enumerate(tokenizer.convert_ids_to_tokens(list(range(count)))):
        if text is None or token in special or (stamps is not None and token >= stamps):
            lines.append("")
        elif token in added:
            lines.append(text.encode().hex())
        else:
            lines.append(bytes(byte_of[letter] for letter in text).hex())
    (folder / TOKENS).write_text("\n".join(lines) + "\n", encoding="ascii")


def open_torch_graphs(folder: Path, run: RunTensors) -> GraphRecognizer:
    """The folder's graphs behind the loop of `graph_decoding`."""
    decoding = read_decoding(folder)
    assert not isinstance(decoding, CtcDecoding)  # which these targets refuse
    interface = json.loads((folder / INTERFACE).read_text(encoding="utf-8"))
    wanted = interface["inputs"]
    outputs = [name for name in wanted["decode"] if name.startswith("cross.")]
    caches = [name for name in wanted["decode"] if name.startswith("past.")]
    sizes = {name: (k, n) for name, (k, n) in interface["adapted"].items()}
    held = banks(read_adapters(folder, decoding.live), sizes)
    adapter_dtype = getattr(torch, interface["adapter_dtype"])
    bound = {
        name: torch.from_numpy(held[name]).to(adapter_dtype)
        for name in held
        if name.endswith(("lora_a", "lora_b"))
    }
    # numpy knows no bfloat16: those caches are arrays of its bits.
    bits = np.int16 if interface["cache_dtype"] == "bfloat16" else np.float32

    @torch.no_grad()
    def call(name: str, inputs: Arrays) -> Arrays:
        if name == "prefill":
            batch = inputs["tokens"].shape[0]
            shape = (batch, decoding.heads, decoding.positions, decoding.head_size)
            inputs = {
                **inputs,
                "lengths": np.zeros(batch, np.int32),
                **{cache: np.zeros(shape, bits) for cache in caches},
            }
        graph = "encode" if name == "encode" else "decode"
        # Arrays and tensors share their memory: the caches are written where they are.
        tensors = {
            key: bound[key] if key in bound else torch.from_numpy(inputs[key])
            for key in wanted[graph]
        }
        if bits is np.int16:
            tensors |= {key: tensors[key].view(torch.bfloat16) for key in caches if key in tensors}
        found = run(graph, list(tensors.values()))
        if graph == "encode":
            return {key: value.numpy() for key, value in zip(outputs, found, strict=True)}
        present = {cache.replace("past", "present"): inputs[cache] for cache in caches}
        return {"logits": found[0].numpy(), **present}

    return GraphRecognizer(decoding, call, held)


def transcribe_usage(folder: Path) -> str:
    """How the program in C++ is called."""
    return f"transcribe {folder} RECORDING.wav   # examples/cpp, docs/export_torch.md"


def flat_inputs(graph: Graph, adapter_dtype: Any) -> tuple[torch.Tensor, ...]:
    """Inputs of a graph, adapters after them, of the right shapes and types."""
    inputs, adapters = example_inputs(graph)
    cast = (t.to(adapter_dtype) if t.is_floating_point() else t for t in adapters)
    return (*inputs, *cast)
