"""Whisper as three graphs without state: encoder, prefill and step.

What a step needs of the past are inputs and outputs, adapters are inputs: whoever runs a graph
holds the caches and binds the adapters, and nothing but weights is inside.

====== ============================================== =======================================
graph  inputs, after them the adapters                outputs
====== ============================================== =======================================
encode features [B, mel bands, frames]                cross key, value of each decoder layer
prefill tokens [B, prompt], cross keys and values     logits [B, vocabulary], key and value caches
step   tokens [B, 1], lengths [B], the caches, cross  logits, the caches
====== ============================================== =======================================

Keys, values and caches are [B, heads, positions, head size]; `lengths` (int32) says how many
positions of a row's caches are filled before the call.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lora_speech.decoding.linear_parts import LinearParts, linear_parts
from lora_speech.decoding.recorded_parts import packed_once
from lora_speech.errors import ModelError
from lora_speech.export.operators import Bank, Operators, Tensors, attend


class Graph(nn.Module):
    """One of the three; `forward` takes its inputs and then the adapters, one list each.

    Attributes
    ----------
    inputs, outputs : tuple of str
        Names, in order, without the adapters.
    open_sizes : mapping
        By input and dimension, what its size is called, where a graph takes any; besides the first
        dimension of each, which is the batch.
    adapted : tuple of str
        The linears whose adapters are inputs: ``NAME.lora_a``, ``NAME.lora_b``, ``NAME.offsets``
        of each, and before them all, if there are any, ``adapter_ids`` [B].
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    open_sizes: Mapping[tuple[str, int], str] = MappingProxyType({})

    def __init__(self, model: Any, operators: Operators, adapted: Iterable[str] = ()) -> None:
        super().__init__()
        self.model = model
        self.operators = operators
        self._names = {module: name for name, module in model.named_modules()}
        own = {self._names[module] for module in self._linears()}
        self.adapted = tuple(name for name in adapted if name in own)

    @property
    def adapter_inputs(self) -> tuple[str, ...]:
        """Names of the inputs that are adapters, in order."""
        if not self.adapted:
            return ()
        kinds = ("lora_a", "lora_b", "offsets")
        return ("adapter_ids", *(f"{name}.{kind}" for name in self.adapted for kind in kinds))

    @property
    def dtype(self) -> torch.dtype:
        """Of features, caches and adapters."""
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    def width(self, linear: str, kind: str) -> int:
        """Columns of ``lora_a`` or ``lora_b`` of a linear."""
        module: Any = self.model.get_submodule(linear)
        inputs = getattr(module, "in_features", getattr(module, "in_channels", 0))
        outputs = getattr(module, "out_features", getattr(module, "out_channels", 0))
        return int(inputs if kind == "lora_a" else outputs)

    def sizes(self, batch: int, tokens: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of each input, for so many utterances and tokens (or frames)."""
        raise NotImplementedError

    def _linears(self) -> list[Any]:
        raise NotImplementedError

    def _bank(self, module: Any, adapters: Tensors) -> Bank | None:
        name = self._names[module]
        if name not in self.adapted:
            return None
        at = 1 + 3 * self.adapted.index(name)
        return adapters[at], adapters[at + 1], adapters[at + 2], adapters[0]

    def _linear(self, module: Any, x: torch.Tensor, adapters: Tensors, **more: Any) -> torch.Tensor:
        parts = self._parts(module)
        return self.operators.linear(x, parts, self._bank(module, adapters), **more)

    def _parts(self, module: Any) -> LinearParts:
        parts = linear_parts(module)
        if parts is None and isinstance(module, nn.Conv1d):  # pointwise: a linear over channels
            weight = module.weight.squeeze(-1)
            parts = LinearParts(weight, False, module.out_channels, module.bias)
        if parts is None:
            raise ModelError(
                f"{self._names[module]}: expected a linear layer of the base or of lora_kernels, "
                f"got {type(module).__name__}; export the model as load_for_serving gives it"
            )
        return parts


class EncodeGraph(Graph):
    """Features to the keys and values that the decoder's cross-attention reads."""

    def __init__(self, whisper: Any, operators: Operators, adapted: Iterable[str] = ()) -> None:
        super().__init__(whisper.model, operators, adapted)
        self.inputs = ("features",)
        self.outputs = cross_names(len(self.model.decoder.layers))

    def sizes(self, batch: int, tokens: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """See `Graph`."""
        config = self.model.config
        return [((batch, config.num_mel_bins, 2 * config.max_source_positions), self.dtype)]

    def _linears(self) -> list[Any]:
        encoder, decoder = self.model.encoder, self.model.decoder
        own = [
            linear
            for layer in encoder.layers
            for linear in (*_attention_linears(layer.self_attn), layer.fc1, layer.fc2)
        ]
        cross = [(layer.encoder_attn.k_proj, layer.encoder_attn.v_proj) for layer in decoder.layers]
        return own + [linear for pair in cross for linear in pair]

    def forward(self, inputs: Tensors, adapters: Tensors) -> tuple[torch.Tensor, ...]:
        """See the module's text."""
        encoder = self.model.encoder
        x = F.gelu(encoder.conv2(F.gelu(encoder.conv1(inputs[0]))))
        x = x.transpose(1, 2) + encoder.embed_positions.weight
        for layer in encoder.layers:
            attention = layer.self_attn
            heads, scale = attention.num_heads, attention.scaling
            y = layer.self_attn_layer_norm(x)
            q, k, v = (
                _heads(self._linear(linear, y, adapters), heads)
                for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            y = attend(q, k.transpose(1, 2), v.transpose(1, 2), scale, None)
            x = self._linear(attention.out_proj, y.flatten(2), adapters, residual=x)
            y = self._linear(layer.fc1, layer.final_layer_norm(x), adapters, activation="gelu")
            x = self._linear(layer.fc2, y, adapters, residual=x)
        x = encoder.layer_norm(x)
        found = []
        for layer in self.model.decoder.layers:
            attention = layer.encoder_attn
            for linear in (attention.k_proj, attention.v_proj):
                y = _heads(self._linear(linear, x, adapters), attention.num_heads)
                found.append(y.transpose(1, 2).contiguous())
        return tuple(found)


class _DecoderGraph(Graph):
    vocabulary: Any

    def __init__(self, whisper: Any, operators: Operators, adapted: Iterable[str] = ()) -> None:
        super().__init__(whisper.model, operators, adapted)
        self.proj_out = whisper.proj_out
        first = linear_parts(self._linears()[0])
        # Beside INT8 layers the vocabulary is INT8 too, as where this package decodes itself.
        packed = packed_once(self.proj_out) if first is not None and first.packed else None
        self.register_buffer("vocabulary", packed, persistent=False)
        self.capacity = int(whisper.config.max_target_positions)
        layers = len(self.model.decoder.layers)
        self.caches = cache_names("past", layers)
        self.cross = cross_names(layers)
        self.outputs = ("logits", *cache_names("present", layers))

    def sizes(self, batch: int, tokens: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """See `Graph`."""
        config = self.model.config
        heads = config.decoder_attention_heads
        cache = (batch, heads, self.capacity, config.d_model // heads)
        cross = (batch, heads, config.max_source_positions, config.d_model // heads)
        known = {
            "tokens": ((batch, tokens), torch.int64),
            "lengths": ((batch,), torch.int32),
            **dict.fromkeys(self.caches, (cache, self.dtype)),
            **dict.fromkeys(self.cross, (cross, self.dtype)),
        }
        return [known[name] for name in self.inputs]

    def _linears(self) -> list[Any]:
        return [
            linear
            for layer in self.model.decoder.layers
            for linear in (
                *_attention_linears(layer.self_attn),
                layer.encoder_attn.q_proj,
                layer.encoder_attn.out_proj,
                layer.fc1,
                layer.fc2,
            )
        ]

    def _decode(
        self, tokens: torch.Tensor, lengths: torch.Tensor, caches: Tensors, cross: Tensors,
        adapters: Tensors,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        decoder = self.model.decoder
        at = lengths.to(torch.int64)[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        x = decoder.embed_tokens(tokens) + decoder.embed_positions.weight[at]
        present: list[torch.Tensor] = []
        for index, layer in enumerate(decoder.layers):
            pair = slice(2 * index, 2 * index + 2)
            attention = layer.self_attn
            y = layer.self_attn_layer_norm(x)
            q, k, v = (
                _heads(self._linear(linear, y, adapters), attention.num_heads)
                for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            y, *new = self.operators.append(q, k, v, caches[pair], lengths, attention.scaling)
            present += new
            x = self._linear(attention.out_proj, y.flatten(2), adapters, residual=x)
            attention = layer.encoder_attn
            y = self._linear(attention.q_proj, layer.encoder_attn_layer_norm(x), adapters)
            keys, values = cross[pair]
            y = self.operators.fixed(
                _heads(y, attention.num_heads), keys, values, attention.scaling
            )
            x = self._linear(attention.out_proj, y.flatten(2), adapters, residual=x)
            y = self._linear(layer.fc1, layer.final_layer_norm(x), adapters, activation="gelu")
            x = self._linear(layer.fc2, y, adapters, residual=x)
        last = decoder.layer_norm(x[:, -1])
        packed = self.vocabulary is not None
        weight = self.vocabulary if packed else self.proj_out.weight
        words = LinearParts(weight, packed, self.proj_out.out_features, None)
        return (self.operators.linear(last, words, None), *present)


class PrefillGraph(_DecoderGraph):
    """A prompt to the logits after it and the caches that it fills."""

    open_sizes = MappingProxyType({("tokens", 1): "prompt"})

    def __init__(self, whisper: Any, operators: Operators, adapted: Iterable[str] = ()) -> None:
        super().__init__(whisper, operators, adapted)
        self.inputs = ("tokens", *self.cross)

    def forward(self, inputs: Tensors, adapters: Tensors) -> tuple[torch.Tensor, ...]:
        """See the module's text."""
        tokens, *cross = inputs
        heads, size = cross[0].shape[1], cross[0].shape[3]
        batch = tokens.shape[0]
        lengths = torch.zeros(batch, dtype=torch.int32, device=tokens.device)
        empty = cross[0].new_zeros(batch, heads, self.capacity, size)
        return self._decode(tokens, lengths, [empty] * len(cross), cross, adapters)


class StepGraph(_DecoderGraph):
    """A token to the logits after it, and the caches with it."""

    def __init__(self, whisper: Any, operators: Operators, adapted: Iterable[str] = ()) -> None:
        super().__init__(whisper, operators, adapted)
        self.inputs = ("tokens", "lengths", *self.caches, *self.cross)

    def forward(self, inputs: Tensors, adapters: Tensors) -> tuple[torch.Tensor, ...]:
        """See the module's text."""
        tokens, lengths, *rest = inputs
        half = len(self.caches)
        return self._decode(tokens, lengths, rest[:half], rest[half:], adapters)


def cross_names(layers: int) -> tuple[str, ...]:
    """Names of the keys and values of cross-attention."""
    return tuple(f"cross.{i}.{kind}" for i in range(layers) for kind in ("key", "value"))


def cache_names(prefix: str, layers: int) -> tuple[str, ...]:
    """Names of the caches of self-attention: `past` going in, `present` coming out."""
    return tuple(f"{prefix}.{i}.{kind}" for i in range(layers) for kind in ("key", "value"))


def _attention_linears(attention: Any) -> tuple[Any, ...]:
    return attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj


def _heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    return x.unflatten(-1, (heads, -1))
