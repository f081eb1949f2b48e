"""Executable specification of ``kv_attention_step``."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .int8_lora_linear import quantize_rows
from .kv_pack import kv_unpack


def _cache_rows(slots: torch.Tensor | None, row: int, capacity: int) -> torch.Tensor:
    """int64 [C]: the cache row in which each position of ``row`` lives."""
    if slots is None:
        return torch.full((capacity,), row, dtype=torch.int64)
    if slots.dim() == 1:
        return torch.full((capacity,), int(slots[row]), dtype=torch.int64)
    return slots[row].to(torch.int64).cpu()


def _append(
    new: torch.Tensor,
    cache: torch.Tensor,
    scales: torch.Tensor | None,
    cache_row: int,
    position: int,
) -> None:
    """Write one token's [H, D] vectors, quantized per head when the cache is int8."""
    if cache.dtype == torch.int8:
        if scales is None:
            raise ValueError("k_scales, v_scales: expected fp32 [S, H, C, 1] for an int8 cache")
        q, scale = quantize_rows(new)
        cache[cache_row, :, position] = q
        scales[cache_row, :, position, 0] = scale
    else:
        cache[cache_row, :, position] = new.to(cache.dtype)


def _gather(
    cache: torch.Tensor,
    scales: torch.Tensor | None,
    cache_rows: torch.Tensor,
    length: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """[H, length, D]: the valid positions of one row, dequantized."""
    positions = torch.arange(length, device=cache.device)
    where = cache_rows[:length].to(cache.device)
    values = cache[where, :, positions].to(dtype)  # [length, H, D]
    if cache.dtype == torch.int8 and scales is not None:
        # With D = 1 the scales of a channel end in 1 too, so C decides; where both are 1, both
        # readings are the same.
        per_position = scales.shape[2:] == (cache.shape[2], 1)
        factor = scales[where, :, positions] if per_position else scales[where, :, 0]
        values = values * factor.to(dtype)
    return values.transpose(0, 1)


def kv_attention_step(
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    lengths: torch.Tensor,
    *,
    k_scales: torch.Tensor | None = None,
    v_scales: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
    scale: float = 1.0,
    heads: Sequence[int] | None = None,
    compute_dtype: torch.dtype | None = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Append the new tokens to the cache, then attend: ``softmax(scale q Kᵀ) V``.

    Parameters
    ----------
    q
        [rows, T, H, D].
    k, v
        The shape of ``q`` (token t of row i is written at position lengths[i] + t, and attends
        to the positions up to its own), or None (nothing is appended, every token attends to
        the lengths[i] valid positions).
    k_cache, v_cache
        [S, H, C, D] fp32, fp16, bf16 or int8. Written in place when k and v are given. Or what
        :func:`lora_kernels.reference.kv_pack.kv_pack` made of them, with its scales.
    lengths
        int32 [rows], the valid positions before this call.
    k_scales, v_scales
        For int8 caches, fp32 [S, H, C, 1] (one per position; written in place by the append,
        by the formulas of :func:`lora_kernels.reference.int8_lora_linear.quantize_rows`) or
        [S, H, 1, D] (one per channel; nothing can be appended).
    slots
        int32 [rows]: row i lives in cache row slots[i]. int32 [rows, C]: position p of row i
        lives in cache row slots[i, p]. None: row i.
    scale
        Factor of the scores.
    heads
        The heads whose softmax weights are returned.
    compute_dtype
        Dtype of the attention; None: that of ``q``. What is appended is always rounded to the
        dtype of the cache first, as the operator does.

    Returns
    -------
    tuple of torch.Tensor
        out [rows, T, H, D] in ``compute_dtype`` (0 for a row with nothing to attend to), and
        weights [rows, len(heads), T, C], zero beyond the positions a token attends to; an empty
        tensor when ``heads`` is None.
    """
    dtype = compute_dtype or q.dtype
    if k_cache.dim() == 6:
        k_cache, v_cache = kv_unpack(k_cache, v_cache, q.shape[3])
    rows, tokens = q.shape[:2]
    capacity = k_cache.shape[2]
    appending = k is not None and v is not None
    if k is not None and v is not None:
        # Every row is written before any row attends: rows may share cache rows.
        for row in range(rows):
            cache_rows = _cache_rows(slots, row, capacity)
            for t in range(tokens):
                position = int(lengths[row]) + t
                cache_row = int(cache_rows[position])
                _append(k[row, t], k_cache, k_scales, cache_row, position)
                _append(v[row, t], v_cache, v_scales, cache_row, position)
    out = torch.zeros(q.shape, dtype=dtype, device=q.device)
    chosen = list(heads) if heads is not None else []
    weights = torch.zeros(rows, len(chosen), tokens, capacity, dtype=dtype, device=q.device)
    for row in range(rows):
        cache_rows = _cache_rows(slots, row, capacity)
        for t in range(tokens):
            visible = int(lengths[row]) + (t + 1 if appending else 0)
            if visible == 0:
                continue
            keys = _gather(k_cache, k_scales, cache_rows, visible, dtype)
            values = _gather(v_cache, v_scales, cache_rows, visible, dtype)
            scores = (keys @ q[row, t].to(dtype).unsqueeze(-1)).squeeze(-1) * scale
            probabilities = torch.softmax(scores, dim=-1)
            out[row, t] = (probabilities.unsqueeze(1) @ values).squeeze(1)
            if chosen:
                weights[row, :, t, :visible] = probabilities[chosen]
    return out, weights if heads is not None else weights.new_empty(0)
