"""A model's linears as functions of (x, residual), bound straight to the fused operators.

Module calls, keyword handling and attribute look-ups cost more than a small projection at one row.
Here each linear is looked at once; what remains per call is one operator call whose epilogue does
bias, LoRA, activation and residual.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from lora_speech.decoding.adapter_rows import AdapterRows
from lora_speech.decoding.linear_parts import LinearParts, join_parts, linear_parts

Projection = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
"""`y = f(x, residual)`: x [rows, tokens, K], residual and y [rows, tokens, N]."""


def projection(
    module: Any,
    rows: AdapterRows,
    *,
    activation: str = "none",
    extra_bias: torch.Tensor | None = None,
) -> Projection:
    """Bind one linear.

    Parameters
    ----------
    module : torch.nn.Module
        `nn.Linear`, a `lora_kernels` linear, PEFT's LoRA linear, or anything callable.
    rows : AdapterRows
        Read at every call.
    activation : {"none", "gelu"}
        Applied before the residual is added.
    extra_bias : Tensor, optional
        [N], added to the module's own.

    Returns
    -------
    callable
        `y = f(x, residual)`.
    """
    parts = linear_parts(module)
    if parts is None:
        return _module_call(module, rows, activation, extra_bias)
    if extra_bias is not None:
        bias = extra_bias if parts.bias is None else parts.bias + extra_bias
        parts = replace(parts, bias=bias)
    return _operator_call(parts, rows, activation)


def joint_projection(
    modules: Sequence[Any], rows: AdapterRows, heads: int
) -> Callable[[torch.Tensor], tuple[torch.Tensor, ...]]:
    """Bind linears over the same input, e.g. q, k and v.

    Returns
    -------
    callable
        x [rows, tokens, K] to one contiguous [rows, tokens, heads, head size] per module.
    """
    all_parts = [linear_parts(module) for module in modules]
    joined = join_parts(modules, [p for p in all_parts if p is not None])
    if joined is None:
        calls = [projection(module, rows) for module in modules]

        def separate(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            batch, tokens = x.shape[0], x.shape[1]
            return tuple(call(x, None).view(batch, tokens, heads, -1) for call in calls)

        return separate

    call = _operator_call(joined, rows, "none")
    count = len(modules)
    size = joined.out_features // count // heads

    def joint(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        batch, tokens = x.shape[0], x.shape[1]
        y = call(x, None)
        if batch == tokens == 1:
            return y.view(count, 1, 1, heads, size).unbind(0)
        y = y.view(batch, tokens, count, heads, size).permute(2, 0, 1, 3, 4)
        return y.contiguous().unbind(0)

    return joint


def _operator_call(parts: LinearParts, rows: AdapterRows, activation: str) -> Projection:
    weight, bias, count, x_scale = parts.weight, parts.bias, parts.out_features, parts.x_scale
    a, b, scales, offsets = parts.lora or (None, None, None, None)
    routed, max_rank = parts.routed, parts.max_rank
    if parts.packed:
        int8 = torch.ops.lora_kernels.int8_lora_linear.default

        def int8_call(x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
            ids = rows.ids
            if a is None or ids is None:
                return int8(
                    x, weight, count, bias, None, None, None, None, None, residual, activation,
                    x_scale,
                )  # fmt: skip
            return int8(
                x, weight, count, bias, a, b, scales, offsets, ids, residual, activation, x_scale,
                None, None, 0.0, max_rank,
            )  # fmt: skip

        return int8_call

    # Also without LoRA: torch's own product rounds differently for one row and for several. Ours
    # does so only between at most 8 rows and more, where it changes its way through memory.
    fused = torch.ops.lora_kernels.lora_linear.default

    def call(x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        ids = rows.ids if routed else None
        if a is None or (routed and ids is None):
            return fused(
                x, weight, bias, None, None, None, None, None, residual, activation, 0.0, None
            )
        return fused(
            x, weight, bias, a, b, scales, offsets, ids, residual, activation, 0.0, None, max_rank
        )

    return call


def _module_call(
    module: Any, rows: AdapterRows, activation: str, extra_bias: torch.Tensor | None
) -> Projection:
    def call(x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        with rows.active():
            y = module(x)
        if extra_bias is not None:
            y = y + extra_bias
        if activation == "gelu":
            y = F.gelu(y)
        return y if residual is None else y + residual

    return call
