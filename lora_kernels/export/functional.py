"""``kv_attention_step`` without mutation, which is what a graph of an exported model can hold."""

from __future__ import annotations

from typing import Any

import torch

from .. import ops

_library = torch.library.Library("lora_kernels", "FRAGMENT")
_library.define(
    "kv_attention_step_functional(Tensor q, Tensor? k, Tensor? v, Tensor k_cache, Tensor v_cache, "
    "Tensor? k_scales, Tensor? v_scales, Tensor lengths, Tensor? slots, float scale) -> Tensor[]"
)


def _run(
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_scales: torch.Tensor | None,
    v_scales: torch.Tensor | None,
    lengths: torch.Tensor,
    slots: torch.Tensor | None,
    scale: float,
) -> list[torch.Tensor]:
    caches = [k_cache, v_cache, *(s for s in (k_scales, v_scales) if s is not None)]
    if k is not None:
        caches = [cache.clone() for cache in caches]
    scales: dict[str, Any] = dict(zip(("k_scales", "v_scales"), caches[2:], strict=False))
    out, _ = ops.kv_attention_step(
        q, k, v, caches[0], caches[1], lengths, slots=slots, scale=scale, **scales
    )
    return [out] if k is None else [out, *caches]


def _fake(q: torch.Tensor, k: torch.Tensor | None, v: Any, *operands: Any) -> list[torch.Tensor]:
    out = q.new_empty(q.shape)
    if k is None:
        return [out]
    caches = (operand for operand in operands[:4] if operand is not None)
    return [out, *(torch.empty_like(cache) for cache in caches)]


_library.impl("kv_attention_step_functional", _run, "CompositeExplicitAutograd")
torch.library.register_fake("lora_kernels::kv_attention_step_functional", _fake, lib=_library)
_op = torch.ops.lora_kernels.kv_attention_step_functional.default


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
) -> tuple[torch.Tensor, ...]:
    """:func:`lora_kernels.ops.kv_attention_step` with the caches as results.

    Parameters
    ----------
    q, k, v, k_cache, v_cache, lengths, k_scales, v_scales, slots, scale
        As in :func:`lora_kernels.ops.kv_attention_step`; the caches are left as they are.

    Returns
    -------
    tuple of torch.Tensor
        The result; where k and v are given, the new caches; where those are int8, their scales.
    """
    return tuple(_op(q, k, v, k_cache, v_cache, k_scales, v_scales, lengths, slots, scale))
