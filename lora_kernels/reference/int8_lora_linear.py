"""Executable specification of ``int8_lora_linear`` and of its quantization.

The integers are exact: rounding happens in fp32 by the formulas below, which every
implementation repeats bit for bit, and the accumulators are summed in float64, exact up to
2**53 (K up to 5e11 at 127 * 127 per term).
"""

from __future__ import annotations

import torch

from .lora_linear import apply_activation, lora_branch

INT8_MAX = 127


def _rounded(values: torch.Tensor, inverse_scale: torch.Tensor) -> torch.Tensor:
    """int8 of ``clamp(rint(values * inverse_scale), -127, 127)`` in fp32, ties to even."""
    product = torch.nan_to_num(values * inverse_scale, nan=0.0)
    return product.round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8)


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric INT8 of each row by its largest magnitude.

    ``amax = max |x|``, ``inv = 127 / amax``, ``q = clamp(rint(x * inv), -127, 127)``,
    ``scale = amax / 127``; all in fp32, ``rint`` to even. A row whose amax is 0, or so small
    (below 127 / FLT_MAX, about 3.7e-37) that inv overflows, gives q 0 and scale 0. A row with a
    non-finite value gives q 0 and scale NaN, so that everything computed from it is NaN.

    Parameters
    ----------
    x
        [..., K], fp32, fp16 or bf16 (a wider x is rounded to fp32 first).

    Returns
    -------
    tuple of torch.Tensor
        q int8 [..., K] and scale fp32 [...].
    """
    x = x.to(torch.float32)
    amax = x.abs().amax(dim=-1) if x.shape[-1] else x.new_zeros(x.shape[:-1])
    finite = torch.isfinite(amax)
    inverse = torch.full_like(amax, INT8_MAX) / amax
    usable = finite & torch.isfinite(inverse)
    zero = torch.zeros_like(amax)
    q = _rounded(x, torch.where(usable, inverse, zero).unsqueeze(-1))
    scale = torch.where(usable, amax / INT8_MAX, zero)
    return q, torch.where(finite, scale, torch.full_like(amax, torch.nan))


def quantize_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric INT8 of a weight, one scale per output channel.

    The formulas of :func:`quantize_rows` on the rows of ``weight``; q never holds -128.

    Parameters
    ----------
    weight
        [N, K], finite.

    Returns
    -------
    tuple of torch.Tensor
        q int8 [N, K] in [-127, 127] and scales fp32 [N].

    Raises
    ------
    ValueError
        If the weight holds a NaN or an infinity.
    """
    q, scales = quantize_rows(weight.detach())
    if not bool(torch.isfinite(scales).all()):
        channel = int((~torch.isfinite(scales)).nonzero()[0])
        raise ValueError(
            f"weight: expected finite values, got NaN or infinity in output channel {channel}; "
            "repair the checkpoint before quantizing it"
        )
    return q, scales


def quantize_static(x: torch.Tensor, x_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """INT8 of every row with one calibrated scale.

    ``q = clamp(rint(x * (1 / x_scale)), -127, 127)`` in fp32. A row with a non-finite value has
    the scale NaN.

    Parameters
    ----------
    x
        [..., K].
    x_scale
        fp32 [1], positive.

    Returns
    -------
    tuple of torch.Tensor
        q int8 [..., K] and scale fp32 [...].
    """
    x = x.to(torch.float32)
    x_scale = x_scale.to(torch.float32).reshape(())
    finite = torch.isfinite(x).all(dim=-1)
    scale = torch.where(finite, x_scale, torch.full_like(x_scale, torch.nan))
    inverse = torch.ones_like(x_scale) / x_scale
    return _rounded(torch.where(finite.unsqueeze(-1), x, 0.0), inverse), scale


def int8_accumulators(q_x: torch.Tensor, q_weight: torch.Tensor) -> torch.Tensor:
    """Exact ``q_x q_weightᵀ`` as int64: [M, K] by [N, K] gives [M, N]."""
    return (q_x.to(torch.float64) @ q_weight.to(torch.float64).T).to(torch.int64)


def int8_lora_linear(
    x: torch.Tensor,
    q_weight: torch.Tensor,
    weight_scales: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    lora_a: torch.Tensor | None = None,
    lora_b: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    adapter_ids: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str = "none",
    x_scale: torch.Tensor | None = None,
    norm: tuple[torch.Tensor, torch.Tensor, float] | None = None,
    compute_dtype: torch.dtype | None = torch.float64,
    straight_through: bool = False,
) -> torch.Tensor:
    """``act(acc * (s_x s_w) + bias + s (x At) B) + residual`` with integer accumulators acc.

    The operator takes its weight packed; the specification takes what ``int8_unpack`` gives.

    Parameters
    ----------
    x
        [..., K]. The LoRA branch sees it unquantized.
    q_weight, weight_scales
        int8 [N, K] in [-127, 127] and fp32 [N], see :func:`quantize_weight`.
    bias, lora_a, lora_b, scales, offsets, adapter_ids, residual, activation
        As in :func:`lora_kernels.reference.lora_linear`.
    x_scale
        fp32 [1], a calibrated scale for every row; None quantizes each row by its own maximum.
    norm
        Weight, bias and epsilon of a LayerNorm of ``x`` in fp32, before everything else.
    compute_dtype
        Dtype of everything after the integer accumulators. None: the dtype of ``x``.
    straight_through
        Give the base product the gradient of ``x Wt``, W dequantized, as quantization-aware
        training has it (Bengio et al., "Estimating or Propagating Gradients Through Stochastic
        Neurons", 2013): rounding and clipping of ``x`` count as the identity.

    Returns
    -------
    torch.Tensor
        [..., N] in ``compute_dtype``; rows of ``x`` with a non-finite value are NaN.
    """
    dtype = compute_dtype or x.dtype
    if norm is not None:
        norm_weight, norm_bias, norm_eps = norm
        x = torch.nn.functional.layer_norm(
            x.float(), x.shape[-1:], norm_weight.float(), norm_bias.float(), norm_eps
        )
    rows = x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)  # K may be 0
    q_x, s_x = quantize_rows(rows) if x_scale is None else quantize_static(rows, x_scale)
    accumulators = int8_accumulators(q_x, q_weight)
    # The factor of an element is one fp32 product, as the operators compute it.
    factor = s_x.unsqueeze(1) * weight_scales.to(torch.float32).unsqueeze(0)
    y = accumulators.to(dtype) * factor.to(dtype)
    if straight_through:
        smooth = rows.to(dtype) @ (q_weight.to(dtype) * weight_scales.to(dtype).unsqueeze(1)).T
        y = y.detach() + (smooth - smooth.detach())
    if bias is not None:
        y = y + bias.to(dtype)
    if lora_a is not None and lora_b is not None:
        y = y + lora_branch(
            rows.to(dtype),
            lora_a.to(dtype),
            lora_b.to(dtype),
            scales=scales,
            offsets=offsets,
            adapter_ids=adapter_ids,
        )
    y = apply_activation(y, activation).reshape(*x.shape[:-1], q_weight.shape[0])
    return y if residual is None else y + residual.to(dtype)
