"""``kv_relative_step``: one chunk of a stream through attention with relative positions."""

from __future__ import annotations

import torch

from . import _library as _library

_op = torch.ops.lora_kernels.kv_relative_step.default


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
) -> torch.Tensor:
    """Append a chunk to rings of cached frames, then attend with relative positions.

    The attention of a streaming Conformer (Dai et al. 2019, arXiv:1901.02860, section 3.3). Every
    frame of a chunk attends to the whole chunk and to at most ``left`` frames before it. With n
    frames heard before the chunk, query i and frame f, both counted from the stream's beginning
    (i from the chunk's)::

        s[i, f] = scale * ((q[i] + u) . K[f] + (q[i] + v) . P[left + T - 1 - (n + i - f)])
        out[i]  = sum over f of softmax_f(s[i, f]) V[f]

    Frame f of a stream lives at ``f mod C`` of its ring, so a ring never moves and never grows.
    Scores, softmax and sums are fp32 for every storage type. Not differentiable.

    Parameters
    ----------
    q, k, v
        [rows, T, H, D] in fp32, fp16 or bf16, T at least 1; a row is one stream's chunk.
    k_cache, v_cache
        Contiguous [S, H, C, D] in fp32, fp16 or bf16, whatever the dtype of ``q``; written in
        place. C is at least ``left + T``. Frames that no query attends to may hold anything.
    positions
        [left + 2 T - 1, H, D] in the dtype of ``q``: the projected embeddings of the distances
        ``left + T - 1`` down to ``1 - T`` between a query and a frame.
    bias_u, bias_v
        [H, D] in the dtype of ``q``, added to it before ``K`` and before ``positions``.
    lengths
        int32 [rows], the frames that each stream has heard before this chunk; not changed. A stream
        begins with 0, whatever its ring holds.
    left
        Most frames before the chunk that are attended to.
    counts
        int32 [rows], the frames of each chunk, 0 to T: what lies beyond in ``k`` and ``v`` is
        ignored. None: T in every row.
    slots
        int32 [rows]: row i lives in ring ``slots[i]``, each in another one. None: in ring i.
    scale
        Factor of the scores, usually ``D ** -0.5``.

    Returns
    -------
    torch.Tensor
        [rows, T, H, D] in the dtype of ``q``, 0 for frames from ``counts`` on.

    Raises
    ------
    RuntimeError
        If a shape, dtype or value does not fit: rings of fewer than ``left + T`` frames, a slot
        that is no ring, two rows in one ring, a count beyond T. The text names the argument, what
        was expected, what came, and the fix; nothing has been written then.

    Notes
    -----
    On a CUDA device lengths, counts and slots are not waited for: a row with one that is out of
    range becomes NaN and appends nothing, and two rows in one ring overwrite each other. ``q`` plus
    a bias, and the weights, are rounded to the dtype of ``q`` there before their products.
    """
    return _op(
        *(q, k, v, k_cache, v_cache, positions, bias_u, bias_v),
        *(lengths, left, counts, slots, scale),
    )


@torch.library.register_fake("lora_kernels::kv_relative_step")
def _fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    positions: torch.Tensor,
    bias_u: torch.Tensor,
    bias_v: torch.Tensor,
    lengths: torch.Tensor,
    left: int,
    counts: torch.Tensor | None,
    slots: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    # new_empty(q.shape), not empty_like: the result is contiguous whatever the strides of q
    return q.new_empty(q.shape)
