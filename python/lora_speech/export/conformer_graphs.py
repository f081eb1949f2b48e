"""Conformers with a CTC head as graphs: a whole recording, and for Parakeet a streaming step.

========= ================================================= ====================================
graph     inputs, after them the adapters                   outputs
========= ================================================= ====================================
recognize features [B, ...], mask [B, frames], bool         logits [B, positions, vocabulary]
step      features [B, 8 + 8 C, mel bands], frames [B],     logits [B, C, vocabulary], the caches
          lengths [B], keys, values and convolution inputs
          of each layer
========= ================================================= ====================================

A step hears C positions of 8 frames each, and the 8 frames before them. `frames` (int32) says how
many of the 8 C are there (less than all only at the end), `lengths` (int32) how many positions went
before: 0 begins a recording. Within a step every position sees every other; behind it it sees as
many as the caches hold; ahead it sees nothing. So subsampling is that of the whole recording, the
attention is masked in chunks, and the depthwise convolutions see zeros in the place of what follows
a chunk (dynamic chunk convolution, Li et al. 2023, arXiv:2304.09325). One step over everything is
the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lora_speech.export.graphs import Graph
from lora_speech.export.operators import Operators, Tensors

SUBSAMPLING = 8
"""Frames per position, and frames that a step hears again: the subsampling reads 7 of them."""


class RecognizeGraph(Graph):
    """A whole recording at once, by the model's own forward pass."""

    open_sizes = MappingProxyType({("features", 1): "frames", ("mask", 1): "frames"})

    def __init__(
        self, model: Any, operators: Operators, adapted: Iterable[str], input_name: str
    ) -> None:
        super().__init__(model, operators, adapted)
        self.input_name = input_name
        self.inputs, self.outputs = ("features", "mask"), ("logits",)

    def sizes(self, batch: int, tokens: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """See `Graph`; a frame of a waveform is a sample."""
        encoder = getattr(self.model.config, "encoder_config", None)
        bands = () if encoder is None else (encoder.num_mel_bins,)
        frames = tokens * (4000 if encoder is None else 40)
        return [((batch, frames, *bands), self.dtype), ((batch, frames), torch.bool)]

    def _linears(self) -> list[Any]:
        kinds = (nn.Linear, nn.Conv1d)
        return [m for m in self.model.modules() if isinstance(m, kinds) or _is_ours(m)]

    def forward(self, inputs: Tensors, adapters: Tensors) -> tuple[torch.Tensor, ...]:
        """See the module's text."""
        features, mask = inputs
        with self._bound(adapters):
            found = self.model(**{self.input_name: features}, attention_mask=mask)
        return (found.logits,)

    @contextmanager
    def _bound(self, adapters: Tensors) -> Iterator[None]:
        """Let the adapted linears compute with adapters that are inputs."""
        modules = {name: module for module, name in self._names.items()}
        bound = [modules[name] for name in self.adapted]
        for module in bound:
            parts, bank = self._parts(module), self._bank(module, adapters)
            call = partial(self.operators.linear, parts=parts, bank=bank)
            module.forward = _over_channels(call) if _is_convolution(module) else call
        try:
            yield
        finally:
            for module in bound:
                del module.forward


def _is_convolution(module: nn.Module) -> bool:
    from lora_kernels.nn import Int8LoraPointwiseConv1d

    return isinstance(module, (nn.Conv1d, Int8LoraPointwiseConv1d))


def _over_channels(call: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A linear as the pointwise convolution that it is, over [B, channels, frames]."""
    return lambda x: call(x.transpose(1, 2)).transpose(1, 2)


def _is_ours(module: nn.Module) -> bool:
    from lora_kernels.nn import Int8LoraLinear

    return isinstance(module, Int8LoraLinear)


class ConformerStepGraph(Graph):
    """Parakeet's next positions, given what its layers keep of those before.

    Parameters
    ----------
    model : ParakeetForCTC
    operators : Operators
    adapted : iterable of str
        As in `Graph`.
    chunk, left : int
        Positions per step (C), and positions behind it that attention sees.
    """

    def __init__(
        self, model: Any, operators: Operators, adapted: Iterable[str], chunk: int, left: int
    ) -> None:
        super().__init__(model, operators, adapted)
        self.chunk, self.left = chunk, left
        config = model.config.encoder_config
        self.heads, self.head_size = (
            config.num_attention_heads,
            model.encoder.layers[0].self_attn.head_dim,
        )
        self.hidden, self.tail = config.hidden_size, (config.conv_kernel_size - 1) // 2
        kinds = ("key", "value", "conv")
        layers = range(len(model.encoder.layers))
        self.caches = tuple(f"past.{i}.{kind}" for i in layers for kind in kinds)
        self.inputs = ("features", "frames", "lengths", *self.caches)
        self.outputs = ("logits", *(f"present.{i}.{kind}" for i in layers for kind in kinds))

    def sizes(self, batch: int, tokens: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """See `Graph`."""
        bands = self.model.config.encoder_config.num_mel_bins
        features = (batch, SUBSAMPLING * (1 + self.chunk), bands)
        caches = [(self.cache_shape(name, batch), self.dtype) for name in self.caches]
        return [(features, self.dtype), *[((batch,), torch.int32)] * 2, *caches]

    def cache_shape(self, name: str, batch: int) -> tuple[int, ...]:
        """Of an input among `caches`; all zeros begin a recording."""
        if name.endswith("conv"):
            return (batch, self.tail, self.hidden)
        return (batch, self.heads, self.left, self.head_size)

    def _linears(self) -> list[Any]:
        return [
            linear
            for layer in self.model.encoder.layers
            for linear in (
                layer.feed_forward1.linear1,
                layer.feed_forward1.linear2,
                layer.self_attn.q_proj,
                layer.self_attn.k_proj,
                layer.self_attn.v_proj,
                layer.self_attn.o_proj,
                layer.conv.pointwise_conv1,
                layer.conv.pointwise_conv2,
                layer.feed_forward2.linear1,
                layer.feed_forward2.linear2,
            )
        ]

    def forward(self, inputs: Tensors, adapters: Tensors) -> tuple[torch.Tensor, ...]:
        """See the module's text."""
        features, frames, lengths, *caches = inputs
        encoder = self.model.encoder
        x, count = self._subsampled(features, frames, lengths)
        x = x * encoder.input_scale
        places = torch.arange(self.left + self.chunk, device=x.device)
        heard = (places < self.left + count[:, None]) & (places >= self.left - lengths[:, None])
        positions = self._positions(x)
        present: list[torch.Tensor] = []
        for index, layer in enumerate(encoder.layers):
            keys, values, before = caches[3 * index : 3 * index + 3]
            x = x + 0.5 * self._feed(layer.feed_forward1, layer.norm_feed_forward1(x), adapters)
            y, keys, values = self._attend(
                layer.self_attn, layer.norm_self_att(x), keys, values, heard, positions, adapters
            )
            x = x + y
            y, before = self._convolve(
                layer.conv, layer.norm_conv(x), before, heard[:, self.left :], adapters
            )
            x = x + y
            x = x + 0.5 * self._feed(layer.feed_forward2, layer.norm_feed_forward2(x), adapters)
            x = layer.norm_out(x)
            present += [keys, values, before]
        return (self.model.ctc_head(x), *present)

    def _subsampled(
        self, features: torch.Tensor, frames: torch.Tensor, lengths: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions [B, C, width] and how many of them are there; what is not is zero inside."""
        subsampling = self.model.encoder.subsampling
        begun, left, count = lengths[:, None] > 0, SUBSAMPLING, frames
        x = features[:, None]
        for layer in subsampling.layers:
            x = layer(x)
            if not isinstance(layer, nn.Conv2d):
                continue
            if layer.stride != (1, 1):
                left, count = left // 2, (count + 1) // 2
            at = torch.arange(x.shape[2], device=x.device)
            there = (at < left + count[:, None]) & ((at >= left) | begun)
            x = x * there[:, None, :, None].to(x.dtype)
        x = x[:, :, 1:]  # the position before this chunk lacks what went before it
        return subsampling.linear(x.transpose(1, 2).flatten(2)), count

    def _positions(self, x: torch.Tensor) -> torch.Tensor:
        """Embeddings of the distances between queries and keys, from the largest on."""
        distances = torch.arange(self.left + self.chunk - 1, -self.chunk, -1, device=x.device)
        angles = distances[:, None].float() * self.model.encoder.encode_positions.inv_freq.float()
        return torch.stack([angles.sin(), angles.cos()], -1).flatten(1).to(x.dtype)

    def _feed(self, module: Any, x: torch.Tensor, adapters: Tensors) -> torch.Tensor:
        y = module.activation(self._linear(module.linear1, x, adapters))
        return self._linear(module.linear2, y, adapters)

    def _attend(
        self,
        module: Any,
        x: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        heard: torch.Tensor,
        positions: torch.Tensor,
        adapters: Tensors,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Attention with relative positions (Dai et al. 2019, arXiv:1901.02860, section 3.3)."""
        q, k, v = (
            self._linear(linear, x, adapters).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
            for linear in (module.q_proj, module.k_proj, module.v_proj)
        )
        keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        relative = module.relative_k_proj(positions).unflatten(-1, (self.heads, self.head_size))
        by_distance = (q + module.bias_v[:, None]) @ relative.permute(1, 2, 0)
        # Query i and key j are left + i - j apart, which is column chunk - 1 - i + j.
        i = torch.arange(self.chunk, device=x.device)[:, None]
        columns = self.chunk - 1 - i + torch.arange(self.left + self.chunk, device=x.device)
        by_distance = by_distance.gather(-1, columns.expand(*q.shape[:2], -1, -1))
        scores = (q + module.bias_u[:, None]) @ keys.transpose(-1, -2) + by_distance
        scores = scores * module.scaling
        lowest = torch.finfo(x.dtype).min
        weights = scores.masked_fill(~heard[:, None, None], lowest).softmax(-1)
        y = (weights @ values).transpose(1, 2).flatten(2)
        kept = slice(self.chunk, None)
        return self._linear(module.o_proj, y, adapters), keys[:, :, kept], values[:, :, kept]

    def _convolve(
        self, module: Any, x: torch.Tensor, before: torch.Tensor, there: torch.Tensor,
        adapters: Tensors,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        x = F.glu(self._linear(module.pointwise_conv1, x, adapters), dim=-1)
        x = torch.cat([before, x * there[:, :, None].to(x.dtype)], 1)
        deep = module.depthwise_conv
        y = F.pad(x.transpose(1, 2), (0, self.tail))
        y = F.conv1d(y, deep.weight, deep.bias, groups=deep.groups)
        y = module.activation(module.norm(y)).transpose(1, 2)
        return self._linear(module.pointwise_conv2, y, adapters), x[:, self.chunk :]
