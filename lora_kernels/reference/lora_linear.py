"""Executable specification of ``lora_linear``."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F

from .philox import dropout_keep_mask


def apply_activation(y: torch.Tensor, activation: str) -> torch.Tensor:
    """Apply ``none``, ``gelu`` (the erf form, Whisper's) or ``silu`` (Conformer's)."""
    if activation == "none":
        return y
    if activation == "gelu":
        return F.gelu(y)
    if activation == "silu":
        return F.silu(y)
    raise ValueError(
        f"activation: expected 'none', 'gelu' or 'silu', got {activation!r}; pass one of these"
    )


def lora_branch(
    x: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    *,
    scales: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    adapter_ids: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """The LoRA term ``s (drop(x) At) B`` of every row, with each row's own adapter.

    Parameters
    ----------
    x
        [M, K].
    lora_a, lora_b
        [R, K] and [R, N]: the rank rows of all adapters, one after another.
    scales, offsets, adapter_ids, dropout_p, dropout_seed
        As in :func:`lora_linear`.

    Returns
    -------
    torch.Tensor
        [M, N] in the dtype of ``x``, zero in the rows that use the base only.
    """
    rows, columns = x.shape
    if dropout_p > 0.0:
        if dropout_seed is None:
            raise ValueError("dropout_seed: expected an int64 tensor of one element, got None")
        keep = dropout_keep_mask(rows, columns, dropout_p, int(dropout_seed.reshape(-1)[0]))
        x = x * keep.to(x.device, x.dtype) / (1.0 - dropout_p)
    bounds = [0, lora_a.shape[0]] if offsets is None else [int(o) for o in offsets]
    if adapter_ids is None:
        row_ids = torch.zeros(rows, dtype=torch.int64, device=x.device)
    else:
        groups = max(adapter_ids.numel(), 1)
        row_ids = adapter_ids.to(torch.int64).repeat_interleave(rows // groups)
    result = x.new_zeros(rows, lora_b.shape[1])
    for index, (begin, end) in enumerate(pairwise(bounds)):
        members = (row_ids == index).nonzero().reshape(-1)
        if end == begin or members.numel() == 0:
            continue
        term = (x[members] @ lora_a[begin:end].T) @ lora_b[begin:end]
        if scales is not None:
            term = term * scales[index].to(x.dtype)
        result = result.index_add(0, members, term)
    return result


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    lora_a: torch.Tensor | None = None,
    lora_b: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    adapter_ids: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str = "none",
    dropout_p: float = 0.0,
    dropout_seed: torch.Tensor | None = None,
    compute_dtype: torch.dtype | None = torch.float64,
) -> torch.Tensor:
    """``act(x Wt + bias + s (drop(x) At) B) + residual``; its backward is autograd's.

    Parameters
    ----------
    x
        [..., K]; M is the number of its rows, ``numel(x) / K``.
    weight
        [N, K].
    bias
        [N] or None.
    lora_a, lora_b
        [R, K] and [R, N] (any strides): the rank rows of all adapters, one after another.
    scales
        fp32 [n], or None for 1 everywhere.
    offsets
        int32 [n + 1]: adapter i owns the rank rows offsets[i] .. offsets[i + 1] - 1. None: one
        adapter of all R rows.
    adapter_ids
        int32 [G], -1 = base only. Entry g names the adapter of rows g M/G .. (g + 1) M/G - 1.
        None: adapter 0 for all rows.
    residual
        [..., N] or None.
    activation
        ``none``, ``gelu`` or ``silu``.
    dropout_p, dropout_seed
        Dropout of the LoRA branch's input: probability in [0, 1) and an int64 tensor [1].
        See :func:`lora_kernels.reference.philox.dropout_keep_mask`.
    compute_dtype
        Every input is converted to this dtype first and the result keeps it. None: the dtype
        of ``x``, which is plain PyTorch in that precision.

    Returns
    -------
    torch.Tensor
        [..., N] in ``compute_dtype``.
    """
    dtype = compute_dtype or x.dtype
    rows = (x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)).to(dtype)  # K may be 0
    y = rows @ weight.to(dtype).T
    if bias is not None:
        y = y + bias.to(dtype)
    if lora_a is not None and lora_b is not None:
        y = y + lora_branch(
            rows,
            lora_a.to(dtype),
            lora_b.to(dtype),
            scales=scales,
            offsets=offsets,
            adapter_ids=adapter_ids,
            dropout_p=dropout_p,
            dropout_seed=dropout_seed,
        )
    y = apply_activation(y, activation).reshape(*x.shape[:-1], weight.shape[0])
    return y if residual is None else y + residual.to(dtype)
