"""Executable specification of ``kv_relative_step``."""

from __future__ import annotations

import torch


def kv_relative_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    positions: torch.Tensor,
    bias_u: torch.Tensor,
    bias_v: torch.Tensor,
    lengths: torch.Tensor,
    *,
    left: int,
    counts: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """Append a chunk to rings of cached frames, then attend with relative positions.

    Shapes as :func:`lora_kernels.ops.kv_relative_step`; the caches are written in place. Every
    frame of a chunk attends to the chunk and to at most ``left`` frames before it (Dai et al.
    2019, arXiv:1901.02860, section 3.3).

    Returns
    -------
    torch.Tensor
        [rows, T, H, D] in ``dtype``, 0 for frames from ``counts`` on.
    """
    rows, tokens, _, _ = q.shape
    capacity = k_cache.shape[2]
    windows = []
    for row in range(rows):
        ring = row if slots is None else int(slots[row])
        count = tokens if counts is None else int(counts[row])
        length = int(lengths[row])
        for token in range(count):
            at = (length + token) % capacity
            k_cache[ring, :, at] = k[row, token].to(k_cache.dtype)
            v_cache[ring, :, at] = v[row, token].to(v_cache.dtype)
        windows.append((ring, count, length))

    out = torch.zeros(q.shape, dtype=dtype, device=q.device)
    for row, (ring, count, length) in enumerate(windows):
        frames = torch.arange(max(0, length - left), length + count, device=q.device)
        keys = k_cache[ring, :, frames % capacity].to(dtype)  # [H, frames, D]
        values = v_cache[ring, :, frames % capacity].to(dtype)
        for token in range(count):
            query = q[row, token].to(dtype)  # [H, D]
            distances = length + token - frames
            embedded = positions[left + tokens - 1 - distances].to(dtype)  # [frames, H, D]
            by_content = torch.einsum("hd,hfd->hf", query + bias_u.to(dtype), keys)
            by_position = torch.einsum("hd,fhd->hf", query + bias_v.to(dtype), embedded)
            weights = (scale * (by_content + by_position)).softmax(-1)
            out[row, token] = torch.einsum("hf,hfd->hd", weights, values)
    return out
