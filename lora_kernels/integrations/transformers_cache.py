"""A layer of transformers' caches that keeps its keys and values in a :class:`KVCache`.

This module imports transformers; it is loaded when a transformers model steps for the first time.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from ..nn.kv_cache import KVCache


class KVCacheLayer(DynamicLayer):  # type: ignore[misc]
    """A ``DynamicLayer`` written in place, whose beams are reordered by index.

    ``keys`` and ``values`` are what transformers expects, [rows, heads, length, head_size]; they
    are gathered on demand, which only code outside of the cached step asks for.
    """

    def __init__(self, cache: KVCache, dtype: torch.dtype) -> None:
        # The base class assigns keys and values, which are computed here.
        self.cache = cache
        self.is_initialized = True
        self.dtype, self.device = dtype, cache.keys.device

    @classmethod
    def from_layer(cls, layer: DynamicLayer, *, fixed: bool, packed: bool = False) -> KVCacheLayer:
        """Take over what a DynamicLayer holds; a fixed one is not copied, or packed in int8."""
        assert layer.keys is not None, "an initialized layer"
        assert layer.values is not None, "an initialized layer"
        cache = KVCache.from_states(layer.keys, layer.values, fixed=fixed)
        if fixed:
            cache.share_equal_rows()
        if packed:
            cache.pack()
        return cls(cache, layer.keys.dtype)

    @property
    def keys(self) -> torch.Tensor:  # type: ignore[override]
        """[rows, heads, length, head_size]."""
        return self.cache.gather()[0].to(self.dtype)

    @property
    def values(self) -> torch.Tensor:  # type: ignore[override]
        """[rows, heads, length, head_size]."""
        return self.cache.gather()[1].to(self.dtype)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the cache exists from the beginning."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [rows, heads, T, head_size] without attending; returns all keys and values."""
        self.cache.append(key_states, value_states)
        return self.cache.gather()

    def get_seq_length(self) -> int:
        """Number of valid positions."""
        return self.cache.length

    def reset(self) -> None:
        """Forget every position."""
        self.cache.crop(0)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Beam search's permutation of the rows."""
        self.cache.reorder(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` positions (transformers passes a negative)."""
        if tokens_to_remove > 0:
            raise ValueError(
                "tokens_to_remove: expected zero or a negative number, got "
                f"{tokens_to_remove}; pass minus the number of tokens to forget"
            )
        self.cache.crop(max(self.cache.length + tokens_to_remove, 0))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self.cache.repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the given rows."""
        self.cache.select(indices)

    def offload(self) -> None:
        """Move to the CPU."""
        self.cache.to("cpu")

    def prefetch(self) -> None:
        """Move back to the layer's device."""
        self.cache.to(self.device)
