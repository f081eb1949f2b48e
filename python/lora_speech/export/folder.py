"""What stands beside exported graphs: how to decode, and the adapters as a runtime binds them.

`decoding.json` holds all that a program needs besides the graphs to turn recordings into tokens;
the processor's own files turn tokens into text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_speech.errors import ModelError
from lora_speech.export.target import Plan
from lora_speech.prompts import default_language, prompt_tokens, special_tokens, token_limit

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

    @classmethod
    def of(cls, plan: Plan) -> Decoding:
        """Of a Whisper."""
        whisper, extractor = plan.model.model, plan.model.processor.feature_extractor
        config, tokens = whisper.config, special_tokens(whisper)
        prompt = prompt_tokens(tokens, default_language(tokens))
        return cls(
            sampling_rate=int(extractor.sampling_rate),
            n_fft=int(extractor.n_fft),
            hop_length=int(extractor.hop_length),
            mel_bands=int(extractor.feature_size),
            window_samples=int(extractor.n_samples),
            prompt=prompt,
            end=tokens.end,
            suppressed=list(tokens.suppressed),
            suppressed_first=list(tokens.suppressed_first),
            max_new_tokens=token_limit(tokens, len(prompt), None),
            positions=tokens.max_positions,
            layers=int(config.decoder_layers),
            heads=int(config.decoder_attention_heads),
            head_size=int(config.d_model) // int(config.decoder_attention_heads),
            cross_positions=int(config.max_source_positions),
            live=list(plan.live),
            int8=plan.int8,
        )

    @classmethod
    def read(cls, folder: Path) -> Decoding:
        """From an exported folder.

        Raises
        ------
        ModelError
            It holds none.
        """
        path = folder / DECODING
        if not path.is_file():
            raise ModelError(
                f"{folder}: expected an exported model with {DECODING}, got none; name a folder "
                "that lora-speech export wrote"
            )
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def write_companions(plan: Plan, folder: Path) -> None:
    """Write `decoding.json` and the processor's files."""
    record = json.dumps(asdict(Decoding.of(plan)), indent=1)
    (folder / DECODING).write_text(record + "\n", encoding="utf-8")
    plan.model.processor.save_pretrained(folder)


def adapted_linears(plan: Plan) -> tuple[str, ...]:
    """Names, within `WhisperModel`, of the linears that any live adapter changes."""
    import lora_kernels as lk

    changed = {n for name in plan.live for n in lk.get_adapter(plan.model.model, name).layers}
    order = [name for name, _ in plan.model.model.named_modules() if name in changed]
    return tuple(name.removeprefix("model.") for name in order)


def write_adapters(plan: Plan, folder: Path) -> None:
    """Write `adapters/NAME.safetensors`: lora_a [r, K] and lora_b [r, N] of each linear.

    fp32; the scale is in lora_b.
    """
    from safetensors.numpy import save_file

    import lora_kernels as lk

    for name in plan.live:
        tensors: dict[str, np.ndarray] = {}
        for linear, layer in lk.get_adapter(plan.model.model, name).layers.items():
            key = linear.removeprefix("model.")
            b = layer.b_matrix.detach().float().t() * layer.scale
            tensors[f"{key}.lora_a"] = layer.a_matrix.detach().float().numpy().copy()
            tensors[f"{key}.lora_b"] = np.ascontiguousarray(b.numpy())
        (folder / ADAPTERS).mkdir(exist_ok=True)
        save_file(tensors, str(folder / ADAPTERS / f"{name}.safetensors"))


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
    """
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
