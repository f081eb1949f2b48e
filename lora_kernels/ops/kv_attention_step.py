"""``kv_attention_step``: append new keys and values to a cache and attend over it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import _library as _library

_op = torch.ops.lora_kernels.kv_attention_step.default


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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Append ``k`` and ``v`` to a cache, then compute ``softmax(scale q Kᵀ) V`` over it.

    With ``k`` and ``v`` this is a step of causal self-attention: token t of row i is written at
    position ``lengths[i] + t`` and attends to the positions up to its own. Without them it is a
    step of cross-attention: every token attends to the ``lengths[i]`` valid positions. The
    attention is that of Vaswani et al., "Attention Is All You Need" (2017); scores, softmax and
    sums are fp32 for every storage type.

    A row of ``q`` is one hypothesis; ``slots`` says where it lives in the cache. Beam search
    permutes this small table and never the cache; the beams of an utterance share its
    cross-attention K and V, which are then read once for all of them. All rows are appended before
    any row attends. Not differentiable.

    Parameters
    ----------
    q
        [rows, T, H, D] in fp32, fp16 or bf16.
    k, v
        The shape and dtype of ``q``, or both None.
    k_cache, v_cache
        Contiguous [S, H, C, D] in fp32, fp16, bf16 or int8, whatever the dtype of ``q``. Written
        in place when k and v are given. Positions that no row attends to may hold anything. Or the
        blocked int8 caches of :func:`kv_pack`, fixed, with their scales per channel: the fastest
        for cross-attention. Then ``q`` and the weights are rounded to 14 bits of their largest
        magnitude (``q`` to 8 from 64 tokens on), C is the number of positions rounded up to a
        multiple of 4, and a row with a ``q`` that is not finite gets NaN.
    lengths
        int32 [rows], the valid positions before this call; not changed.
    k_scales, v_scales
        For int8 caches alone, contiguous fp32. [S, H, C, 1], one per position: the append writes
        them in place, as amax / 127 of each new vector, whose values become
        ``clamp(rint(x * (127 / amax)), -127, 127)``; a vector that holds a NaN or an infinity gets
        the scale NaN. Or [S, H, 1, D], one per channel: finite and above 0 (for blocked caches as
        :func:`kv_pack` returns them), for caches that are quantized beforehand; nothing can be
        appended.
    slots
        int32 [rows]: row i reads and appends in cache row ``slots[i]``. int32 [rows, C]: position p
        of row i lives in cache row ``slots[i, p]`` (not with scales per channel). None: row i lives
        in cache row i.
    scale
        Factor of the scores, usually ``D ** -0.5``.
    heads
        Heads whose softmax weights are returned; None: none.

    Returns
    -------
    tuple of torch.Tensor
        The result, [rows, T, H, D] in the dtype of ``q``, 0 where there is nothing to attend to;
        and the weights of the chosen heads, fp32 [rows, len(heads), T, C], 0 beyond the positions
        that a token attends to (an empty tensor when ``heads`` is None).

    Raises
    ------
    RuntimeError
        If a shape, dtype or value does not fit: a length beyond the cache, a slot that is no cache
        row, two rows that would append in the same place, int8 caches without scales, scales per
        channel that are not finite or not above 0. The text names the argument, what was expected,
        what came, and the fix; nothing has been written then.

    Notes
    -----
    On a CUDA device D is at most 128, caches have the dtype of ``q`` or int8 (with fp32 ``q`` fp16
    and bf16 too), and lengths, slots and scales are not waited for: a row whose length or slot is
    out of range becomes NaN and appends nothing, a scale per channel that a CPU would refuse makes
    NaN of its head, and of two rows that append in the same place one is lost. ``q`` is split into
    14 bits for blocked caches whatever T is.
    """
    return _op(q, k, v, k_cache, v_cache, k_scales, v_scales, lengths, slots, scale, heads)


@torch.library.register_fake("lora_kernels::kv_attention_step")
def _fake(
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
    heads: Sequence[int] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, tokens = q.shape[:2]
    capacity = k_cache.shape[2] if k_cache.dim() == 4 else 4 * v_cache.shape[2]
    shape = (0,) if heads is None else (rows, len(heads), tokens, capacity)
    # new_empty(q.shape), not empty_like: the result is contiguous whatever the strides of q
    return q.new_empty(q.shape), q.new_empty(shape, dtype=torch.float32)
