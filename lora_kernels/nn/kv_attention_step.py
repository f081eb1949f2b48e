"""Multi-head attention of a decoder that steps over a cache with ``kv_attention_step``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..errors import LoraKernelsError
from .kv_cache import MINIMUM_CAPACITY, KVCache


class KVCacheAttention(nn.Module):
    """Multi-head attention of a decoder over a :class:`KVCache`.

    Parameters
    ----------
    q_proj, k_proj, v_proj, out_proj
        The projections (linear layers, LoraLinear or Int8LoraLinear), shared with the model.
    heads
        Number of heads.
    scale
        Factor of the scores; None for ``head_size ** -0.5``.
    max_positions
        Number of positions the model has, or None.
    """

    def __init__(
        self,
        q_proj: nn.Module,
        k_proj: nn.Module,
        v_proj: nn.Module,
        out_proj: nn.Module,
        heads: int,
        *,
        scale: float | None = None,
        max_positions: int | None = None,
    ) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = q_proj, k_proj, v_proj, out_proj
        features = int(q_proj.out_features)  # type: ignore[arg-type]
        if features % heads:
            raise LoraKernelsError(
                f"heads: expected a divisor of q_proj's {features} outputs, got {heads}; pass the "
                "model's number of heads"
            )
        self.heads = heads
        self.head_size = features // heads
        self.scale = self.head_size**-0.5 if scale is None else scale
        self.max_positions = max_positions

    @classmethod
    def from_attention(
        cls, attention: nn.Module, *, max_positions: int | None = None
    ) -> KVCacheAttention:
        """Share the projections of an attention module with Whisper's attribute names."""
        return cls(
            attention.q_proj,  # type: ignore[arg-type]
            attention.k_proj,  # type: ignore[arg-type]
            attention.v_proj,  # type: ignore[arg-type]
            attention.out_proj,  # type: ignore[arg-type]
            int(attention.num_heads),  # type: ignore[arg-type]
            scale=float(attention.scaling),  # type: ignore[arg-type]
            max_positions=max_positions,
        )

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, T, H * D] as [rows, T, H, D]."""
        return x.reshape(*x.shape[:2], self.heads, self.head_size)

    def new_cache(
        self,
        rows: int,
        *,
        capacity: int = MINIMUM_CAPACITY,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> KVCache:
        """An empty self-attention cache for ``rows`` hypotheses."""
        return KVCache(
            rows,
            self.heads,
            self.head_size,
            capacity=capacity,
            dtype=dtype,
            device=device,
            max_positions=self.max_positions,
        )

    def cross_cache(
        self, states: torch.Tensor, *, beams: int = 1, dtype: torch.dtype | None = None
    ) -> KVCache:
        """The fixed cache of cross-attention, computed once per utterance.

        Parameters
        ----------
        states
            [utterances, frames, K], the encoder's output.
        beams
            Hypotheses per utterance; they share their utterance's keys and values.
        dtype
            Storage (int8 halves or quarters the bytes read per step); None keeps the dtype.
        """
        keys = self._split(self.k_proj(states)).transpose(1, 2)
        values = self._split(self.v_proj(states)).transpose(1, 2)
        cache = KVCache.from_states(keys, values, fixed=True, dtype=dtype)
        if beams > 1:
            cache.repeat_interleave(beams)
        return cache

    def forward(
        self, x: torch.Tensor, cache: KVCache, heads: Sequence[int] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One step: project, append to a growing cache, attend, project.

        Parameters
        ----------
        x
            [rows, T, K], the new tokens.
        cache
            A growing cache for self-attention, a fixed one for cross-attention.
        heads
            Heads whose softmax weights are returned.

        Returns
        -------
        tuple of torch.Tensor
            [rows, T, N] and the chosen heads' weights, fp32 [rows, len(heads), T, capacity].
        """
        q = self._split(self.q_proj(x))
        k = v = None
        if not cache.fixed:
            k, v = self._split(self.k_proj(x)), self._split(self.v_proj(x))
        out, weights = cache.step(q, k, v, scale=self.scale, heads=heads)
        return self.out_proj(out.flatten(2)), weights
