"""`encode` and `decode` of an INT8 Whisper as this package computes it, to the same bits.

What `recorded_encoder` and `decoder_step` record, as graphs: convolutions are INT8 products over
rows of three frames, LayerNorm is the prologue of what follows it, and the keys and values of the
encoder's and of cross-attention are packed as INT8 (the latter are four tensors for each layer).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F

from lora_speech.decoding.decoder_step import DecoderParts
from lora_speech.decoding.linear_parts import linear_parts
from lora_speech.decoding.recorded_encoder import Convolution, EncoderParts
from lora_speech.decoding.recorded_parts import norm_of
from lora_speech.export.graphs import EncodeGraph, Graph, cache_names
from lora_speech.export.operators import Tensors
from lora_speech.export.torch_graphs import DecodeGraph

_KINDS = ("key", "value", "key_scales", "value_scales")


def packed_cross_names(layers: int) -> tuple[str, ...]:
    """Names of what `kv_pack` makes of cross-attention's keys and values."""
    return tuple(f"cross.{i}.{kind}" for i in range(layers) for kind in _KINDS)


def has_int8_graphs(whisper: Any) -> bool:
    """Whether all that these graphs take as INT8 is."""
    parts = EncoderParts.of(whisper.model.encoder), DecoderParts.of(whisper)
    return None not in parts


def _linear(
    graph: Graph, module: Any, x: torch.Tensor, adapters: Tensors, norm: Any = None, **more: Any
) -> torch.Tensor:
    from lora_kernels import ops

    parts, bank = linear_parts(module), graph._bank(module, adapters)
    assert parts is not None  # has_int8_graphs
    if bank is not None:
        more.update(lora_a=bank[0], lora_b=bank[1], offsets=bank[2], adapter_ids=bank[3])
    return ops.int8_lora_linear(
        x, parts.weight, parts.out_features, parts.bias, x_scale=parts.x_scale,
        norm=None if norm is None else norm_of(norm), **more,
    )  # fmt: skip


def _attend(q: torch.Tensor, packed: Tensors, positions: int, scale: float) -> torch.Tensor:
    from lora_kernels import ops

    lengths = q.new_zeros(q.shape[:1], dtype=torch.int32) + positions
    keys, values, k_scales, v_scales = packed
    return ops.kv_attention_step(
        q, None, None, keys, values, lengths, k_scales=k_scales, v_scales=v_scales, scale=scale
    )[0]


class Int8EncodeGraph(EncodeGraph):
    """Features to the packed keys and values that the decoder's cross-attention reads."""

    def __init__(self, whisper: Any, operators: Any, adapted: Iterable[str] = ()) -> None:
        super().__init__(whisper, operators, adapted)
        parts = EncoderParts.of(whisper.model.encoder)
        assert parts is not None
        self.convolutions = parts.convolutions
        for index, convolution in enumerate(parts.convolutions):
            self.register_buffer(f"convolution_{index}", convolution.weight, persistent=False)
        self.outputs = packed_cross_names(len(self.model.decoder.layers))

    def _convolve(
        self, index: int, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """A convolution of [B, frames, channels], and GELU."""
        from lora_kernels import ops

        of: Convolution = self.convolutions[index]
        rows = F.pad(x, (0, 0, 1, 1)).unfold(1, 3, of.stride).transpose(2, 3).flatten(2)
        weight = getattr(self, f"convolution_{index}")
        return ops.int8_lora_linear(
            rows, weight, of.out_channels, of.bias, activation="gelu", residual=residual
        )

    def forward(self, inputs: Tensors, adapters: Tensors) -> tuple[torch.Tensor, ...]:
        """See the module's text."""
        from lora_kernels import ops

        encoder = self.model.encoder
        positions = encoder.embed_positions.weight
        [features] = inputs
        x = self._convolve(0, features.transpose(1, 2))
        x = self._convolve(1, x, positions.repeat(x.shape[0], 1, 1))
        for layer in encoder.layers:
            attention, norm = layer.self_attn, layer.self_attn_layer_norm
            heads = attention.num_heads
            q, k, v = (
                _linear(self, linear, x, adapters, norm)
                for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            y = _attend(
                q.unflatten(-1, (heads, -1)), ops.kv_pack(k, v, heads), positions.shape[0],
                attention.scaling,
            )  # fmt: skip
            x = _linear(self, attention.out_proj, y.flatten(2), adapters, residual=x)
            y = _linear(self, layer.fc1, x, adapters, layer.final_layer_norm, activation="gelu")
            x = _linear(self, layer.fc2, y, adapters, residual=x)
        x = encoder.layer_norm(x)
        found: list[torch.Tensor] = []
        for layer in self.model.decoder.layers:
            attention = layer.encoder_attn
            k, v = (_linear(self, m, x, adapters) for m in (attention.k_proj, attention.v_proj))
            found += ops.kv_pack(k, v, attention.num_heads)
        return tuple(found)


class Int8DecodeGraph(DecodeGraph):
    """Tokens [B, T] to the logits after them; then the caches have them too."""

    cache_dtype = adapter_dtype = torch.bfloat16  # precise enough beside INT8 weights

    def __init__(self, whisper: Any, operators: Any, adapted: Iterable[str] = ()) -> None:
        super().__init__(whisper, operators, adapted)
        layers = len(self.model.decoder.layers)
        self.cross = packed_cross_names(layers)
        self.inputs = ("tokens", "lengths", *cache_names("past", layers), *self.cross)

    def sizes(self, batch: int, tokens: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """See `Graph`."""
        from lora_kernels import ops

        config = self.model.config
        heads, width = config.decoder_attention_heads, config.d_model
        encoded = torch.zeros(batch, config.max_source_positions, width)
        packed = [(tuple(t.shape), t.dtype) for t in ops.kv_pack(encoded, encoded, heads)]
        cache = ((batch, heads, self.capacity, width // heads), self.cache_dtype)
        known = {
            "tokens": ((batch, tokens), torch.int64),
            "lengths": ((batch,), torch.int32),
            **dict.fromkeys(self.caches, cache),
            **dict(zip(self.cross, packed * len(self.model.decoder.layers), strict=True)),
        }
        return [known[name] for name in self.inputs]

    def _decode(
        self, tokens: torch.Tensor, lengths: torch.Tensor, caches: Tensors, cross: Tensors,
        adapters: Tensors,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        from lora_kernels import ops

        decoder = self.model.decoder
        frames = self.model.encoder.embed_positions.weight.shape[0]
        at = lengths.to(torch.int64)[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        x = decoder.embed_tokens(tokens) + decoder.embed_positions.weight[at]
        for index, layer in enumerate(decoder.layers):
            attention = layer.self_attn
            q, k, v = (
                _linear(self, linear, x, adapters, layer.self_attn_layer_norm).unflatten(
                    -1, (attention.num_heads, -1)
                )
                for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            pair = caches[2 * index : 2 * index + 2]
            [y] = self.operators.append(q, k, v, pair, lengths, attention.scaling)
            x = _linear(self, attention.out_proj, y.flatten(2), adapters, residual=x)
            attention = layer.encoder_attn
            y = _linear(self, attention.q_proj, x, adapters, layer.encoder_attn_layer_norm)
            y = y.unflatten(-1, (attention.num_heads, -1))
            y = _attend(y, cross[4 * index : 4 * index + 4], frames, attention.scaling)
            x = _linear(self, attention.out_proj, y.flatten(2), adapters, residual=x)
            y = _linear(self, layer.fc1, x, adapters, layer.final_layer_norm, activation="gelu")
            x = _linear(self, layer.fc2, y, adapters, residual=x)
        words = self.proj_out.out_features
        norm = norm_of(decoder.layer_norm)
        return (ops.int8_lora_linear(x[:, -1], self.vocabulary, words, norm=norm),)
