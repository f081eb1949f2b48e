"""Symmetric INT8 of stored tensors: weights, and keys and values.

The formulas are those the operators apply to their inputs; :mod:`lora_kernels.reference` states
them again, on its own, for the tests.
"""

from __future__ import annotations

import torch

from ..errors import LoraKernelsError

INT8_MAX = 127  # -128 is left out: a value and its negative are both there
_CHUNK = 1 << 20  # elements in fp32 at a time, 4 MiB: no copy of a large weight, little for caches


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """INT8 of each row by its largest magnitude.

    ``amax = max |x|``, ``q = clamp(rint(x * (127 / amax)), -127, 127)``, ``scale = amax / 127``,
    in fp32, ties to even. A row of zeros, or one so small that ``127 / amax`` overflows, gives
    q 0 and scale 0; a row with a NaN or an infinity gives q 0 and scale NaN. Not differentiable.

    Parameters
    ----------
    x
        [..., K] with at least two dimensions and any strides, fp32, fp16 or bf16 (a wider x is
        rounded to fp32 first).

    Returns
    -------
    tuple of torch.Tensor
        q int8 [..., K] and scale fp32 [...], both contiguous.
    """
    x = x.detach()
    q = torch.zeros(x.shape, dtype=torch.int8, device=x.device)
    scales = torch.zeros(x.shape[:-1], dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return q, scales
    step = max(1, _CHUNK * x.shape[0] // x.numel())
    pieces = zip(x.split(step), q.split(step), scales.split(step), strict=True)
    for part, q_part, scale_part in pieces:
        part = part.to(torch.float32)
        amax = part.abs().amax(dim=-1)
        # A tensor: with a plain number torch may multiply by a rounded reciprocal instead.
        most = torch.full_like(amax, INT8_MAX)
        inverse = most / amax
        inverse.masked_fill_(inverse.isinf() | ~amax.isfinite(), 0.0)
        scaled = (part * inverse.unsqueeze(-1)).round_().clamp_(-INT8_MAX, INT8_MAX)
        q_part.copy_(scaled.nan_to_num_(nan=0.0))  # infinity times 0
        scale = (amax / most).masked_fill_(inverse == 0.0, 0.0)
        scale_part.copy_(scale.masked_fill_(~amax.isfinite(), torch.nan))
    return q, scales


def quantize_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`quantize_rows` of a weight [N, K]: one scale per output channel.

    Returns
    -------
    tuple of torch.Tensor
        q int8 [N, K] in [-127, 127] and scales fp32 [N].

    Raises
    ------
    LoraKernelsError
        If the weight holds a NaN or an infinity.
    """
    q, scales = quantize_rows(weight)
    broken = scales.isnan()
    if bool(broken.any()):
        raise LoraKernelsError(
            "weight: expected finite values, got NaN or infinity in output channel "
            f"{int(broken.nonzero()[0])}; repair the checkpoint before quantizing it"
        )
    return q, scales
