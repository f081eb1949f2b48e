"""What stands beside exported graphs: how to decode, and the adapters as a runtime binds them.

`decoding.json` holds all that a program needs besides the graphs to turn features into tokens; the
processor's own files make features of recordings and text of tokens. What writes them is
`companions.py`: reading them needs no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_speech.errors import ModelError

DECODING = "decoding.json"
ADAPTERS = "adapters"


@dataclass(frozen=True)
class Decoding:
    """How a model's graphs are used, in plain numbers.

    Attributes
    ----------
    sampling_rate, n_fft, hop_length, mel_bands, window_samples : int
        Of the features: windows of `window_samples`, padded with zeros.
    prompt : list of int
        Tokens before the text: the start, a language if there are several, transcription.
    languages : dict
        Token per language code, which stands second in the prompt; empty for an English-only model.
    end : int
        The token after it.
    suppressed, suppressed_first : list of int
        Tokens never chosen, and never chosen first.
    max_new_tokens, positions, layers, heads, head_size, cross_positions : int
        Sizes of the decoder and its caches.
    live : list of str
        Adapters that lie beside the graphs.
    int8 : bool
        Whether layers are INT8.
    """

    sampling_rate: int
    n_fft: int
    hop_length: int
    mel_bands: int
    window_samples: int
    prompt: list[int]
    languages: dict[str, int]
    end: int
    suppressed: list[int]
    suppressed_first: list[int]
    max_new_tokens: int
    positions: int
    layers: int
    heads: int
    head_size: int
    cross_positions: int
    live: list[str]
    int8: bool
    objective: str = "sequence"


@dataclass(frozen=True)
class CtcDecoding:
    """How the graphs of a CTC model are used.

    Attributes
    ----------
    sampling_rate : int
        Of the recordings.
    blank : int
        The token between tokens.
    chunk, subsampling : int
        Positions of a step, and frames of a position; 0 where there is no step.
    caches : dict
        Shape of each cache of a step, for one utterance.
    live : list of str
        Adapters that lie beside the graphs.
    int8 : bool
        Whether layers are INT8.
    """

    sampling_rate: int
    blank: int
    chunk: int
    subsampling: int
    caches: dict[str, tuple[int, ...]]
    live: list[str]
    int8: bool
    objective: str = "ctc"


def read_decoding(folder: Path) -> Decoding | CtcDecoding:
    """How the graphs of an exported folder are used.

    Raises
    ------
    ModelError
        It is none.
    """
    path = folder / DECODING
    if not path.is_file():
        raise ModelError(
            f"{folder}: expected an exported model with {DECODING}, got none; name a folder "
            "that lora-speech export wrote"
        )
    fields = json.loads(path.read_text(encoding="utf-8"))
    kind = CtcDecoding if fields.get("objective") == "ctc" else Decoding
    found: Decoding | CtcDecoding = kind(**fields)
    return found


def read_adapters(folder: Path, live: Sequence[str]) -> dict[str, dict[str, np.ndarray]]:
    """Tensors of each adapter, as `write_adapters` wrote them."""
    from safetensors.numpy import load_file

    return {name: load_file(str(folder / ADAPTERS / f"{name}.safetensors")) for name in live}


def banks(
    adapters: Mapping[str, Mapping[str, np.ndarray]], sizes: Mapping[str, tuple[int, int]]
) -> dict[str, np.ndarray]:
    """Join adapters to what graphs take: ``NAME.lora_a``, ``NAME.lora_b`` and ``NAME.offsets``.

    Parameters
    ----------
    adapters : mapping
        Tensors by name, of each adapter; its place is its index.
    sizes : mapping
        (K, N) of each linear whose adapters are inputs.

    Returns
    -------
    dict
        fp32 [R, K], fp32 [R, N] and int32 [adapters + 1]. A linear that no adapter changes has one
        rank row of zeros, owned by none: runtimes differ about empty tensors.

    Raises
    ------
    ModelError
        An adapter has a linear that the graphs do not take, or another width.
    """
    for name, tensors in adapters.items():
        for key, tensor in tensors.items():
            linear, _, kind = key.rpartition(".")
            width = sizes.get(linear, (0, 0))[kind == "lora_b"]
            if linear not in sizes or tensor.ndim != 2 or tensor.shape[1] != width:
                expected = (
                    f"[rank, {width}]" if linear in sizes else "a linear that the graphs take"
                )
                raise ModelError(
                    f"adapter {name!r}: {key}: expected {expected}, got {list(tensor.shape)}; "
                    "export the adapter with a base of its own shape"
                )
    found: dict[str, Any] = {}
    for linear, (inputs, outputs) in sizes.items():
        a = [tensors.get(f"{linear}.lora_a") for tensors in adapters.values()]
        b = [tensors.get(f"{linear}.lora_b") for tensors in adapters.values()]
        ranks = [0 if matrix is None else matrix.shape[0] for matrix in a]
        spare = [np.zeros((1, inputs), np.float32)] * (not any(ranks))
        found[f"{linear}.lora_a"] = np.concatenate([m for m in a if m is not None] + spare)
        spare = [np.zeros((1, outputs), np.float32)] * (not any(ranks))
        found[f"{linear}.lora_b"] = np.concatenate([m for m in b if m is not None] + spare)
        found[f"{linear}.offsets"] = np.cumsum([0, *ranks], dtype=np.int32)
    return found


def input_sizes(names: Iterable[tuple[str, Sequence[Any]]]) -> dict[str, tuple[int, int]]:
    """(K, N) of each linear whose adapters are inputs, from names and shapes of inputs."""
    names = list(names)
    widths = {name: int(shape[1]) for name, shape in names if name.endswith(("lora_a", "lora_b"))}
    linears = {name.rpartition(".")[0] for name in widths}
    return {name: (widths[f"{name}.lora_a"], widths[f"{name}.lora_b"]) for name in sorted(linears)}


def read_banks(
    folder: Path,
    live: Sequence[str],
    inputs: Iterable[tuple[str, Sequence[Any]]] | None = None,
) -> dict[str, np.ndarray]:
    """The adapters of a folder, as its graphs take them.

    Parameters
    ----------
    folder : Path
    live : sequence of str
        Adapters in it.
    inputs : iterable of (str, shape), optional
        Of the graphs; left out, their sizes are those of the adapters.

    Returns
    -------
    dict
        See `banks`.
    """
    adapters = read_adapters(folder, live)
    if inputs is None:
        inputs = ((key, x.shape) for tensors in adapters.values() for key, x in tensors.items())
    return banks(adapters, input_sizes(inputs))
