"""Whisper's encoder under INT8, recorded once per call and run utterance by utterance.

All of it is operators of `lora_kernels` on buffers that are allocated once: the convolutions are
products over overlapping rows, attention is integer products with the softmax between them in
fp32, and the two products of a feed-forward block pass over a few rows at a time, so that the
wide rows between them stay in the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lora_speech.decoding.linear_parts import LinearParts, linear_parts
from lora_speech.decoding.recorded_parts import Norm, has_gelu, norm_of, packed_once, record_linear

HIDDEN_BYTES = 1 << 20
"""Of a feed-forward block's wide rows at a time and thread: half of a second-level cache."""


@dataclass(frozen=True)
class Convolution:
    """A convolution of kernel 3 and padding 1, as a product over rows of three frames."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    in_channels: int
    out_channels: int
    stride: int


@dataclass(frozen=True)
class EncoderLayer:
    """One encoder layer: its linears with INT8 weights, and its norms."""

    norms: tuple[Norm, Norm]
    q: LinearParts
    k: LinearParts
    v: LinearParts
    out: LinearParts
    fc1: LinearParts
    fc2: LinearParts
    heads: int
    scaling: float


@dataclass(frozen=True)
class EncoderParts:
    """What a recorded encoder of one Whisper is made of; positions are [frames, width]."""

    convolutions: tuple[Convolution, Convolution]
    positions: torch.Tensor
    layers: list[EncoderLayer]
    norm: Norm

    @classmethod
    def of(cls, encoder: Any) -> EncoderParts | None:
        """Take a Whisper's encoder apart; None unless all linears are INT8, with GELU."""
        layers = []
        for layer in encoder.layers:
            attention = layer.self_attn
            modules = {
                "q": attention.q_proj,
                "k": attention.k_proj,
                "v": attention.v_proj,
                "out": attention.out_proj,
                "fc1": layer.fc1,
                "fc2": layer.fc2,
            }
            parts: dict[str, Any] = {name: linear_parts(m) for name, m in modules.items()}
            if not has_gelu(layer) or any(p is None or not p.packed for p in parts.values()):
                return None
            norms = (norm_of(layer.self_attn_layer_norm), norm_of(layer.final_layer_norm))
            layers.append(
                EncoderLayer(norms, **parts, heads=attention.num_heads, scaling=attention.scaling)
            )
        convolutions = (_convolution(encoder.conv1), _convolution(encoder.conv2))
        if None in convolutions:
            return None
        return cls(
            convolutions,  # type: ignore[arg-type]
            encoder.embed_positions.weight,
            layers,
            norm_of(encoder.layer_norm),
        )


class RecordedEncoder:
    """An encoder for one utterance at a time.

    Parameters
    ----------
    parts : EncoderParts
    ids : Tensor or None
        int32 [1], the adapter of the utterance, read anew at every run; None: the base only.
    """

    def __init__(self, parts: EncoderParts, ids: torch.Tensor | None) -> None:
        from lora_kernels.ops import Composite, kv_pack

        self.norm = parts.norm
        self._composite = step = Composite()
        first, second = parts.convolutions
        frames, width = parts.positions.shape
        like = parts.positions
        self._features = like.new_zeros(frames * second.stride + 2, first.in_channels)
        middle = like.new_zeros(frames * second.stride + 2, width)
        self.x = x = like.new_empty(frames, width)

        def linear(
            x: torch.Tensor, part: LinearParts, out: torch.Tensor, **extra: Any
        ) -> torch.Tensor:
            return record_linear(step, x, part, ids, out, **extra)

        _convolve(step, first, self._features, middle[1:-1], None)
        _convolve(step, second, middle, x, parts.positions)
        q, k, v, attended = (torch.empty_like(x) for _ in range(4))
        lengths = torch.full((1,), frames, dtype=torch.int32)
        heads = parts.layers[0].heads
        packed = kv_pack(k[None], v[None], heads)
        shape = (1, frames, heads, width // heads)
        inner = max(layer.fc1.out_features for layer in parts.layers)
        rows = _rows_at_a_time(inner, frames)
        hidden = like.new_empty(rows, inner)
        for layer in parts.layers:
            before, after = layer.norms
            for part, out in ((layer.q, q), (layer.k, k), (layer.v, v)):
                linear(x, part, out, norm=before)
            step.kv_pack(k[None], v[None], heads, out=packed)
            keys, values, k_scales, v_scales = packed
            step.kv_attention_step(
                q.view(shape), None, None, keys, values, lengths, k_scales=k_scales,
                v_scales=v_scales, scale=layer.scaling, out=attended.view(shape),
            )  # fmt: skip
            linear(attended, layer.out, x, residual=x)
            for piece in x.split(rows):
                wide = hidden[: len(piece), : layer.fc1.out_features]
                linear(piece, layer.fc1, wide, norm=after, activation="gelu")
                linear(wide, layer.fc2, piece, residual=piece)

    def run(self, features: torch.Tensor) -> torch.Tensor:
        """Encode [1, mel bands, frames] to [1, positions, width]."""
        self._features[1:-1].copy_(features[0].t())
        self._composite.run()
        weight, bias, eps = self.norm
        return torch.layer_norm(self.x, self.x.shape[-1:], weight, bias, eps)[None]


def _rows_at_a_time(inner: int, frames: int) -> int:
    rows = max(48, HIDDEN_BYTES // (4 * inner) // 48 * 48) * torch.get_num_threads()
    pieces = max(1, round(frames / rows))
    return -(-frames // pieces)


def _convolve(
    step: Any,
    convolution: Convolution,
    padded: torch.Tensor,
    out: torch.Tensor,
    residual: torch.Tensor | None,
) -> None:
    """Record a convolution of `padded`, frames with one of zeros at either end, and GELU."""
    channels = convolution.in_channels
    rows = padded.as_strided((out.shape[0], 3 * channels), (convolution.stride * channels, 1))
    step.int8_lora_linear(
        rows, convolution.weight, convolution.out_channels, convolution.bias, activation="gelu",
        residual=residual, out=out,
    )  # fmt: skip


def _convolution(module: Any) -> Convolution | None:
    from lora_kernels.integrations.peft_layers import may_be_read

    if type(module) is not torch.nn.Conv1d or not may_be_read(module) or (
        module.kernel_size, module.padding, module.dilation, module.groups, module.padding_mode
    ) != ((3,), (1,), (1,), 1, "zeros"):  # fmt: skip
        return None

    def rows(weight: torch.Tensor) -> torch.Tensor:
        return weight.transpose(1, 2).flatten(1)  # [out, taps * in], as three frames lie in memory

    packed = packed_once(module, rows)
    return Convolution(
        packed, module.bias, module.in_channels, module.out_channels, module.stride[0]
    )
