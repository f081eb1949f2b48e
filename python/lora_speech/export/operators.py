"""What exported graphs are made of: our operators, or torch's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from lora_speech.decoding.linear_parts import LinearParts

Tensors = Sequence[torch.Tensor]
Bank = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""A [R, K], B [R, N] with the scales in it, offsets [adapters + 1], adapter of each row."""


class Operators(Protocol):
    """What graphs are made of besides norms, convolutions and the encoder's attention."""

    def linear(
        self,
        x: torch.Tensor,
        parts: LinearParts,
        bank: Bank | None,
        residual: torch.Tensor | None = None,
        activation: str = "none",
    ) -> torch.Tensor:
        """act(x Wt + bias + (x At) B) + residual."""

    def append(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        caches: Tensors,
        lengths: torch.Tensor,
        scale: float,
    ) -> tuple[torch.Tensor, ...]:
        """Attention over a cache extended by k and v, and the cache as it is then.

        Without the cache where it was written in place.
        """

    def fixed(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Attention over all positions of keys and values."""


class KernelOperators:
    """The operators of `lora_kernels`, caches as results."""

    def linear(
        self,
        x: torch.Tensor,
        parts: LinearParts,
        bank: Bank | None,
        residual: torch.Tensor | None = None,
        activation: str = "none",
    ) -> torch.Tensor:
        """See `Operators`."""
        from lora_kernels import ops

        lora: dict[str, Any] = {}
        if bank is not None:
            a, b, offsets, ids = bank
            lora = dict(lora_a=a, lora_b=b, offsets=offsets, adapter_ids=ids)
        shared: dict[str, Any] = dict(residual=residual, activation=activation, **lora)
        if parts.packed:
            return ops.int8_lora_linear(
                x, parts.weight, parts.out_features, parts.bias, x_scale=parts.x_scale, **shared
            )
        return ops.lora_linear(x, parts.weight, parts.bias, **shared)

    def append(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        caches: Tensors,
        lengths: torch.Tensor,
        scale: float,
    ) -> tuple[torch.Tensor, ...]:
        """See `Operators`."""
        from lora_kernels.export import kv_attention_step

        keys, values = caches
        out, keys, values = kv_attention_step(q, k, v, keys, values, lengths, scale=scale)
        return out, keys, values

    def fixed(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """See `Operators`."""
        from lora_kernels.export import kv_attention_step

        rows = q.new_zeros(q.shape[:1], dtype=torch.int32)
        [out] = kv_attention_step(q, None, None, keys, values, rows + keys.shape[2], scale=scale)
        return out


class StandardOperators:
    """The same of torch's own operators, for converters that know no others."""

    def linear(
        self,
        x: torch.Tensor,
        parts: LinearParts,
        bank: Bank | None,
        residual: torch.Tensor | None = None,
        activation: str = "none",
    ) -> torch.Tensor:
        """See `Operators`; of a bank, rows take the rank rows of their own adapter."""
        y = F.linear(x, parts.weight, parts.bias)
        if bank is not None:
            a, b, offsets, ids = bank
            rank = torch.arange(a.shape[0], device=a.device)
            known = (ids >= 0).to(torch.int64)
            at = ids.to(torch.int64) * known
            begin, end = offsets[at].to(torch.int64), offsets[at + 1].to(torch.int64)
            own = (rank >= begin[:, None]) & (rank < end[:, None]) & (known[:, None] > 0)
            y = y + (F.linear(x, a) * own[:, None].to(x.dtype)) @ b
        if activation == "gelu":
            y = F.gelu(y)
        return y if residual is None else y + residual

    def append(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        caches: Tensors,
        lengths: torch.Tensor,
        scale: float,
    ) -> tuple[torch.Tensor, ...]:
        """See `Operators`; masks put tokens in their places, which all converters know."""
        places = torch.arange(caches[0].shape[2], device=q.device)
        at = lengths.to(torch.int64)[:, None] + torch.arange(q.shape[1], device=q.device)
        hit = (places == at[:, :, None]).to(q.dtype)  # [B, T, C]
        kept = (1 - hit.sum(1))[:, None, :, None]
        new = [
            cache * kept + (hit.transpose(1, 2)[:, None] @ states.transpose(1, 2))
            for cache, states in zip(caches, (k, v), strict=True)
        ]
        mask = torch.where(places <= at[:, :, None], 0.0, float("-inf"))[:, None]
        out = attend(q, new[0], new[1], scale, mask)
        return out, new[0], new[1]

    def fixed(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """See `Operators`."""
        return attend(q, keys, values, scale, None)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, mask: torch.Tensor | None
) -> torch.Tensor:
    """q [B, T, heads, head size] over k, v [B, heads, positions, head size]; a mask is added."""
    weights = (q.transpose(1, 2) * scale) @ k.transpose(-1, -2)
    weights = weights if mask is None else weights + mask
    return (weights.softmax(-1) @ v).transpose(1, 2)
