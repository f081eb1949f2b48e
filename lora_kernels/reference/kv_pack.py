"""Executable specification of ``kv_pack``, and its inverse."""

from __future__ import annotations

import torch

from .int8_lora_linear import quantize_rows


def _padded(x: torch.Tensor, dim: int, multiple: int) -> torch.Tensor:
    """``x`` with zeros at the end of one dimension, up to a multiple."""
    shape = list(x.shape)
    shape[dim] = -x.shape[dim] % multiple
    return torch.cat((x, x.new_zeros(shape)), dim=dim)


def _quantized(states: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 [S, H, C, D] and fp32 [S, H, 1, D] of [S, C, H * D]."""
    by_channel = states.unflatten(-1, (heads, -1)).permute(0, 2, 3, 1)  # [S, H, D, C]
    q, scales = quantize_rows(by_channel)
    return q.transpose(2, 3), scales.unsqueeze(2)


def kv_pack(
    k: torch.Tensor, v: torch.Tensor, heads: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize by channel over the positions, and lay out in blocks.

    Parameters
    ----------
    k, v
        [S, C, H * D].
    heads
        H.

    Returns
    -------
    tuple of torch.Tensor
        packed_k int8 [S, H, ceil(C / 64), ceil(D / 4), 64, 4], packed_v int8
        [S, H, ceil(C / 4), ceil(D / 16) * 16, 4], k_scales and v_scales fp32 [S, H, 1, D], by the
        formulas of :func:`lora_kernels.reference.int8_lora_linear.quantize_rows` on each channel.
    """
    (q_k, k_scales), (q_v, v_scales) = _quantized(k, heads), _quantized(v, heads)
    blocks = _padded(_padded(q_k, 2, 64), 3, 4).unflatten(3, (-1, 4)).unflatten(2, (-1, 64))
    steps = _padded(_padded(q_v, 2, 4), 3, 16).unflatten(2, (-1, 4))
    return blocks.transpose(3, 4).contiguous(), steps.mT.contiguous(), k_scales, v_scales


def kv_unpack(
    packed_k: torch.Tensor, packed_v: torch.Tensor, head_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The integers of blocked caches in the order of positions.

    Parameters
    ----------
    packed_k, packed_v
        What :func:`kv_pack` returned.
    head_size
        D.

    Returns
    -------
    tuple of torch.Tensor
        int8 [S, H, C, D] each, C rounded up to a multiple of 4.
    """
    keys = packed_k.transpose(3, 4).flatten(4).flatten(2, 3)
    values = packed_v.mT.flatten(2, 3)
    positions = values.shape[2]
    return keys[:, :, :positions, :head_size], values[..., :head_size]
