"""One Whisper with random weights, three times over the same memory: ours, PEFT's, and as it is."""

from __future__ import annotations

import copy
import inspect
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from .case import Function, absent

# Where `lora_speech` is if this repository is not installed.
sys.path.append(str(Path(__file__).resolve().parents[2] / "python"))

RANK = 16
ADAPTER = "live"
# Linears of a decoder layer that have an adapter: all.
TARGETS = r".*decoder\.layers\.\d+\.(self_attn|encoder_attn)\.(q|k|v|out)_proj"
TARGETS += r"|.*decoder\.layers\.\d+\.fc[12]"
FACTOR = 0.5  # of B, beside A of 1 / sqrt(K): an adapter that changes what is said


@dataclass(frozen=True)
class Models:
    """The same base: INT8 with a live adapter; PEFT's layers with the same; 16 bits as it is."""

    ours: Any
    peft: Any  # None where PEFT is not installed
    plain: Any


def models(shape: Mapping[str, int], dtype: torch.dtype, device: str) -> Models:
    """Made once for all batch sizes; those of other sizes are let go."""
    sizes = tuple(sorted((name, size) for name, size in shape.items() if name != "rows"))
    return _models(sizes, dtype, device)


@lru_cache(maxsize=1)
def _models(sizes: tuple[tuple[str, int], ...], dtype: torch.dtype, device: str) -> Models:
    import lora_kernels as lk

    plain = _whisper(dict(sizes), dtype, device)
    adapter = _adapter(plain)
    ours = _sharing(plain)
    lk.quantize(ours)
    lk.add_adapter(ours, lk.Adapter.from_tensors(adapter, alpha=RANK), ADAPTER)
    return Models(ours, None if absent("peft") else _with_peft(_sharing(plain), adapter), plain)


def _whisper(s: Mapping[str, int], dtype: torch.dtype, device: str) -> Any:
    """Its encoder has one layer: a step never calls it."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=s["vocabulary"],
        d_model=s["width"],
        encoder_layers=1,
        decoder_layers=s["layers"],
        encoder_attention_heads=s["heads"],
        decoder_attention_heads=s["heads"],
        encoder_ffn_dim=s["inner"],
        decoder_ffn_dim=s["inner"],
        max_source_positions=s["frames"],
        max_target_positions=s["positions"],
        num_mel_bins=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    with torch.device(device):  # random numbers by the device: a billion of them
        model = WhisperForConditionalGeneration(config)
    return model.to(dtype).eval().requires_grad_(False)


def _sharing(model: Any) -> Any:
    """A copy with the same tensors."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _adapter(model: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A [rank, K] and B [N, rank] for each of the targets."""
    factors = {}
    for name, module in model.named_modules():
        if re.fullmatch(TARGETS, name):
            (n, k), like = module.weight.shape, module.weight
            a = torch.randn(RANK, k, device=like.device) / k**0.5
            b = torch.randn(n, RANK, device=like.device) * FACTOR / RANK**0.5
            factors[name] = a.to(like.dtype), b.to(like.dtype)
    return factors


def _with_peft(model: Any, adapter: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS)
    found = get_peft_model(model, config, autocast_adapter_dtype=False).eval()
    for name, (a, b) in adapter.items():
        layer = found.base_model.model.get_submodule(name)
        layer.lora_A["default"].weight.data = a
        layer.lora_B["default"].weight.data = b
    return found.requires_grad_(False)


@dataclass(frozen=True)
class Batch:
    """What a step begins with: all positions but the last are in the caches.

    Attributes
    ----------
    tokens : Tensor
        int64 [rows, 1].
    encoded : Tensor
        [rows, frames, width].
    past : list of (keys, values)
        Per layer, [rows, heads, positions - 1, head size].
    """

    tokens: torch.Tensor
    encoded: torch.Tensor
    past: list[tuple[torch.Tensor, torch.Tensor]]

    @classmethod
    def of(cls, s: Mapping[str, int], dtype: torch.dtype, device: str) -> Batch:
        rows, heads, width = s["rows"], s["heads"], s["width"]
        before = (rows, heads, s["positions"] - 1, width // heads)
        past = [torch.randn(2, *before, device=device).to(dtype) for _ in range(s["layers"])]
        return cls(
            torch.randint(4, s["vocabulary"], (rows, 1), device=device),
            torch.randn(rows, s["frames"], width, device=device).to(dtype),
            [(keys, values) for keys, values in past],
        )

    @property
    def position(self) -> int:
        """Of the step's token."""
        return self.past[0][0].shape[2]


def our_step(model: Any, batch: Batch) -> Function:
    """A greedy step as `greedy_decode` takes it: on a GPU the replay of a CUDA graph."""
    from lora_speech.decoding.greedy import begin_decoding

    start = begin_decoding(
        model,
        None,
        encoded=batch.encoded,
        adapters=ADAPTER,
        language=None,
        task="transcribe",
        timestamps=False,
        max_new_tokens=batch.position,
    )
    for (keys, values), past in zip(start.steps.state.self_cache, batch.past, strict=True):
        keys[:, :, : batch.position] = past[0]
        values[:, :, : batch.position] = past[1]
    return lambda: start.steps.choose(batch.tokens, batch.position, True)


def _caches(model: Any, batch: Batch, make: Callable[[Any, int], Any]) -> tuple[Any, Any]:
    """Of self-attention, with the past in it, and of cross-attention, as the model projects it.

    `make` takes a configuration and how many positions there are.
    """
    config = copy.deepcopy(model.config)
    config.encoder_layers = config.decoder_layers  # by which a cache counts layers
    heads, frames = config.decoder_attention_heads, batch.encoded.shape[1]
    own, cross = make(config, batch.position + 1), make(config, frames)
    for index, layer in enumerate(model.model.decoder.layers):
        own.update(*batch.past[index], index)
        states = [
            project(batch.encoded).unflatten(2, (heads, -1)).transpose(1, 2).contiguous()
            for project in (layer.encoder_attn.k_proj, layer.encoder_attn.v_proj)
        ]
        cross.update(*states, index)
    return own, cross


def _call(model: Any, batch: Batch, cache: Any) -> Function:
    """The model's own forward for one token, and the likeliest next one."""
    from transformers.modeling_outputs import BaseModelOutput

    encoder = BaseModelOutput(last_hidden_state=batch.encoded)
    # The cache's name changed within transformers 5.
    names = inspect.signature(type(model).forward).parameters
    given = {"cache" if "cache" in names else "past_key_values": cache}

    def step() -> torch.Tensor:
        logits = model(
            encoder_outputs=encoder, decoder_input_ids=batch.tokens, use_cache=True, **given
        ).logits
        return logits[:, -1].argmax(-1)

    return step


def peft_step(peft: Any, batch: Batch) -> Function:
    """Eager, with the cache that `generate` takes by default."""
    from transformers import DynamicCache, EncoderDecoderCache

    model = peft.base_model.model
    own, cross = _caches(model, batch, lambda config, _: DynamicCache(config=config))
    step = _call(model, batch, EncoderDecoderCache(own, cross))

    def at_the_same_place() -> torch.Tensor:
        for layer, (keys, values) in zip(own.layers, batch.past, strict=True):
            layer.keys, layer.values = keys, values
        return step()

    return at_the_same_place


def static_step(plain: Any, batch: Batch, **how: Any) -> Function:
    """A static cache under torch.compile; the weights as they are, which is what merged ones cost.

    `how` goes to torch.compile; by default what `generate` takes, but without a graph break.
    """
    from transformers import EncoderDecoderCache, StaticCache

    own, cross = _caches(plain, batch, lambda config, most: StaticCache(config, most))
    step = _call(plain, batch, EncoderDecoderCache(own, cross))

    def at_the_same_place() -> torch.Tensor:
        chosen = step()
        for layer in own.layers:  # compiled, a part of the kernel that counts up
            layer.cumulative_length.sub_(1)
        return chosen

    torch._dynamo.reset()
    return torch.compile(at_the_same_place, **{"mode": "reduce-overhead", "fullgraph": True, **how})
