"""``int8_lora_topk``: the largest outputs of ``int8_lora_linear``, without the outputs."""

from __future__ import annotations

import torch

from . import _library as _library
from ._dispatch import straight
from .int8_lora_linear import no_gradient

_op = torch.ops.lora_kernels.int8_lora_topk.default
_straight = straight(_op)


def int8_lora_topk(
    x: torch.Tensor,
    packed_weight: torch.Tensor,
    out_features: int,
    k: int = 1,
    bias: torch.Tensor | None = None,
    lora_a: torch.Tensor | None = None,
    lora_b: torch.Tensor | None = None,
    *,
    scales: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    adapter_ids: torch.Tensor | None = None,
    x_scale: torch.Tensor | None = None,
    norm: tuple[torch.Tensor, torch.Tensor, float] | None = None,
    log_sum: bool = False,
    screen: torch.Tensor | None = None,
    max_rank: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return the ``k`` largest of ``y = int8_lora_linear(x, ...)`` per row, largest first.

    The choice over a vocabulary: ``y`` never reaches memory. Of equal values the first column is
    taken; a NaN counts as infinity. Forward only.

    Parameters
    ----------
    x, packed_weight, out_features, bias, lora_a, lora_b, scales, offsets, adapter_ids
        As :func:`int8_lora_linear` has them. A bias of minus infinity takes a column out.
    x_scale, norm, max_rank
        The same.
    k
        How many, at most 256 and ``out_features``.
    log_sum
        Whether ``log(sum(exp(y)))`` is wanted: ``values - log_sum[..., None]`` are the logarithms
        of the softmax.
    screen
        uint8, what :func:`int8_pack_screen` made of ``packed_weight``: read in its place, it halves
        the bytes that the choice for one to four rows takes, where neither LoRA nor ``log_sum`` is
        asked for; otherwise it is left alone. Columns and values are the same, bit for bit. Beyond
        64 columns of ``x`` that holds with all but certainty: a wrong choice takes an error of
        eight standard deviations, for which low bits of the weight, unrelated to its high ones,
        would have to be made to match ``x``. On CUDA it is not used.

    Returns
    -------
    values, columns : torch.Tensor
        fp32 and int64 [..., k].
    log_sum : torch.Tensor or None
        fp32 [...].

    Raises
    ------
    RuntimeError
        If a shape, dtype or value does not fit; the text names the argument, what was expected,
        what came, and the fix.
    """
    norm_weight, norm_bias, norm_eps = (None, None, 0.0) if norm is None else norm
    call = (None if torch.is_grad_enabled() else _straight(x)) or _op
    values, columns, log_sums = call(
        x,
        packed_weight,
        out_features,
        k,
        bias,
        lora_a,
        lora_b,
        scales,
        offsets,
        adapter_ids,
        x_scale,
        norm_weight,
        norm_bias,
        norm_eps,
        log_sum,
        screen,
        max_rank,
    )
    return values, columns, log_sums if log_sum else None


@torch.library.register_fake("lora_kernels::int8_lora_topk")
def _fake(
    x: torch.Tensor,
    packed_weight: torch.Tensor,
    out_features: int,
    k: int,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor | None,
    lora_b: torch.Tensor | None,
    scales: torch.Tensor | None,
    offsets: torch.Tensor | None,
    adapter_ids: torch.Tensor | None,
    x_scale: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    norm_eps: float,
    log_sum: bool,
    screen: torch.Tensor | None = None,
    max_rank: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = x.shape[:-1]
    return (
        x.new_empty(*rows, k, dtype=torch.float32),
        x.new_empty(*rows, k, dtype=torch.int64),
        x.new_empty(rows if log_sum else (0,), dtype=torch.float32),
    )


torch.library.register_autograd(
    "lora_kernels::int8_lora_topk", no_gradient("int8_lora_topk", "x, lora_a, lora_b, bias")
)
