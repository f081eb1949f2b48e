"""``int8_lora_linear``: INT8 base and low-rank product, bias, activation and residual in one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import _library as _library
from ._dispatch import straight
from .lora_linear import through_activation

_op = torch.ops.lora_kernels.int8_lora_linear.default
_straight = straight(_op)
_linear_backward_op = torch.ops.lora_kernels.lora_linear_backward.default
_pack_op = torch.ops.lora_kernels.int8_pack.default
_pack_screen_op = torch.ops.lora_kernels.int8_pack_screen.default
_unpack_op = torch.ops.lora_kernels.int8_unpack.default

# csrc/include/lora_kernels/int8_packing.h: blocks of 64 channels, steps of 4 k
_BLOCK_CHANNELS = 64
_STEP_DEPTH = 4


def int8_lora_linear(
    x: torch.Tensor,
    packed_weight: torch.Tensor,
    out_features: int,
    bias: torch.Tensor | None = None,
    lora_a: torch.Tensor | None = None,
    lora_b: torch.Tensor | None = None,
    *,
    scales: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    adapter_ids: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str = "none",
    x_scale: torch.Tensor | None = None,
    norm: tuple[torch.Tensor, torch.Tensor, float] | None = None,
    max_rank: int = 0,
) -> torch.Tensor:
    """Compute ``act((q_x q_wt) (s_x s_w) + bias + s (x At) B) + residual``.

    Each row of ``x`` is quantized on the way: ``q_x = clamp(rint(x * inv), -127, 127)``, rounding
    half to even, with ``inv = 127 / amax`` and ``s_x = amax / 127`` of the row (dynamic), or
    ``inv = 1 / x_scale`` and ``s_x = x_scale`` (static). The sums ``q_x q_wt`` are exact integers,
    equal in every implementation. The LoRA term sees ``x`` itself. A row of zeros gives zeros; a
    row with a NaN or an infinity gives NaN, and no other row is touched by it.

    Differentiable in ``x``, ``bias``, ``lora_a``, ``lora_b`` and ``residual``, for
    quantization-aware training: rounding (and a static scale's clipping) is passed straight
    through, so the gradient is that of ``act(x Wt + bias + s (x At) B) + residual`` with W the
    dequantized weight, and the activation's derivative taken at the quantized sums. W itself and
    the scales have none, and ``norm`` is for calls without gradients.

    Parameters
    ----------
    x
        [..., K], fp32, fp16 or bf16. M is the number of its rows.
    packed_weight
        uint8, what :func:`int8_pack` made of a weight [N, K] and its scales.
    out_features
        N, which the packed bytes alone do not tell.
    bias
        [N] in the dtype of ``x`` or fp32.
    lora_a, lora_b
        [R, K] and [R, N] by rank row, both fp32, fp16 or bf16; the R rank rows of all adapters one
        after another. ``lora_b`` may have any strides: PEFT's B, [N, r], is passed as ``B.t()``
        without a copy. Or in blocks of 64 outputs, [N64 / 64, R, 64], as ``AdapterBank`` keeps it.
    scales
        fp32 [n], alpha / rank of each adapter; None: all 1.
    offsets
        int32 [n + 1], where each adapter's rank rows begin; None: one adapter of all R rows.
    adapter_ids
        int32 [G], G a divisor of M: the adapter of rows ``g * M / G`` to ``(g + 1) * M / G - 1``;
        -1: base only. None: adapter 0 for every row.
    residual
        [..., N] in the dtype of ``x``, added after the activation.
    activation
        "none", "gelu" (with the error function, as Whisper has it) or "silu".
    x_scale
        fp32 [1], positive: a calibrated scale for every row. None quantizes each row by its own
        largest magnitude. For an ``x`` on CUDA it may stay on the CPU, and is then checked before
        the launch; on the device a scale that is no positive finite number makes every row NaN.
    norm
        Weight [K], bias [K] (both fp32 or of the dtype of ``x``) and epsilon of a LayerNorm that
        ``x`` goes through first, in fp32; quantization and LoRA see its result.
    max_rank
        The largest of the ranks that ``offsets`` tells, as ``AdapterBank.max_rank`` has it; 0: not
        known. On a CUDA device, where ``offsets`` are not waited for, kernels are planned for this
        rank instead of the sum of all, and a larger one is cut to it (gradients of the rank rows
        that are cut off are undefined). The CPU refuses one that is smaller than a rank.

    Returns
    -------
    torch.Tensor
        [..., N] in the dtype of ``x``; everything after the integer sums in fp32.

    Raises
    ------
    RuntimeError
        If a shape, dtype or value does not fit (the text names the argument, what was expected,
        what came, and the fix), or if a gradient is asked for that it does not have.
    """
    norm_weight, norm_bias, norm_eps = (None, None, 0.0) if norm is None else norm
    call = (None if torch.is_grad_enabled() else _straight(x)) or _op
    return call(
        x,
        packed_weight,
        out_features,
        bias,
        lora_a,
        lora_b,
        scales,
        offsets,
        adapter_ids,
        residual,
        activation,
        x_scale,
        norm_weight,
        norm_bias,
        norm_eps,
        max_rank,
    )


def int8_pack(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Lay out an INT8 weight and its scales the way every implementation reads them.

    Parameters
    ----------
    weight
        int8 [N, K] in [-127, 127] (symmetric: never -128).
    scales
        fp32 [N], finite: the weight is ``weight * scales[:, None]``.

    Returns
    -------
    torch.Tensor
        uint8, one dimension: blocks of 64 output channels, each with its weights, scales and sums.
        The size is ``ceil(N / 64) * 64 * (ceil(K / 4) * 4 + 8)`` bytes.

    Raises
    ------
    RuntimeError
        If a shape, dtype or value does not fit; the text names the argument, what was expected,
        what came, and the fix.
    """
    return _pack_op(weight, scales)


def int8_pack_screen(
    packed_weight: torch.Tensor, out_features: int, in_features: int
) -> torch.Tensor:
    """Make the screen of a packed weight, for :func:`int8_lora_topk`.

    Parameters
    ----------
    packed_weight
        uint8, what :func:`int8_pack` returned.
    out_features, in_features
        N and K of the weight.

    Returns
    -------
    torch.Tensor
        uint8, one dimension: the high four bits of the weights in blocks of 64 output channels,
        each with its scales, and the mean and spread of what is missing. The size is
        ``ceil(N / 64) * 64 * (ceil(K / 8) * 4 + 12)`` bytes, half of the packed weight's.

    Raises
    ------
    RuntimeError
        If the size does not fit N and K.
    """
    return _pack_screen_op(packed_weight, out_features, in_features)


def int8_unpack(
    packed_weight: torch.Tensor, out_features: int, in_features: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Undo :func:`int8_pack`, exactly.

    Parameters
    ----------
    packed_weight
        uint8, what :func:`int8_pack` returned.
    out_features, in_features
        N and K of the weight.

    Returns
    -------
    tuple of torch.Tensor
        weight int8 [N, K] and scales fp32 [N].

    Raises
    ------
    RuntimeError
        If the size does not fit N and K.
    """
    return _unpack_op(packed_weight, out_features, in_features)


@torch.library.register_fake("lora_kernels::int8_lora_linear")
def _fake(
    x: torch.Tensor, packed_weight: torch.Tensor, out_features: int, *args: Any
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


@torch.library.register_fake("lora_kernels::int8_pack")
def _fake_pack(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    out_features, in_features = weight.shape
    blocks = (out_features + _BLOCK_CHANNELS - 1) // _BLOCK_CHANNELS
    depth = (in_features + _STEP_DEPTH - 1) // _STEP_DEPTH * _STEP_DEPTH
    return weight.new_empty(blocks * _BLOCK_CHANNELS * (depth + 8), dtype=torch.uint8)


@torch.library.register_fake("lora_kernels::int8_pack_screen")
def _fake_pack_screen(
    packed_weight: torch.Tensor, out_features: int, in_features: int
) -> torch.Tensor:
    blocks = (out_features + _BLOCK_CHANNELS - 1) // _BLOCK_CHANNELS
    steps = (in_features + 2 * _STEP_DEPTH - 1) // (2 * _STEP_DEPTH)
    return packed_weight.new_empty(blocks * _BLOCK_CHANNELS * (steps * 4 + 12))


@torch.library.register_fake("lora_kernels::int8_unpack")
def _fake_unpack(
    packed_weight: torch.Tensor, out_features: int, in_features: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        packed_weight.new_empty(out_features, in_features, dtype=torch.int8),
        packed_weight.new_empty(out_features, dtype=torch.float32),
    )


def no_gradient(operator: str, inputs: str) -> Callable[..., None]:
    """Make the backward of an operator on INT8 weights, which refuses by the operator's name.

    Parameters
    ----------
    operator
        What the text calls it.
    inputs
        The floating-point inputs that it names.
    """

    def refuse(ctx: Any, *grads: torch.Tensor) -> None:
        raise RuntimeError(
            f"{operator}: {inputs}: expected inputs that need no gradient, got a call to backward; "
            "this operator computes forward only. Run it under torch.no_grad(), or train with "
            "lora_linear and quantize afterwards."
        )

    return refuse


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, packed_weight, out_features, bias, lora_a, lora_b, scales, offsets, ids = inputs[:9]
    activation, x_scale, norm_weight = inputs[10:13]
    # The bias matters to the gradient only through an activation.
    kept_bias = bias if activation != "none" else None
    ctx.save_for_backward(
        x, packed_weight, kept_bias, lora_a, lora_b, scales, offsets, ids, x_scale
    )
    ctx.out_features = out_features
    ctx.activation = activation
    ctx.max_rank = inputs[15]
    ctx.normed = norm_weight is not None
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, packed_weight, bias, lora_a, lora_b, scales, offsets, ids, x_scale = ctx.saved_tensors
    needs = ctx.needs_input_grad
    if ctx.normed:
        raise RuntimeError(
            "int8_lora_linear: norm: expected None where a gradient is needed, got a LayerNorm; "
            "apply torch.nn.functional.layer_norm to x first"
        )
    if needs[11]:
        raise RuntimeError(
            "int8_lora_linear: x_scale: expected a scale that needs no gradient, got one that "
            "does; calibrate it, and pass x_scale.detach()"
        )
    q, weight_scales = _unpack_op(packed_weight, ctx.out_features, x.shape[-1])
    weight = (q * weight_scales.unsqueeze(1)).to(x.dtype)
    dz = dy
    if ctx.activation != "none":
        lora = (lora_a, lora_b, scales, offsets, ids)
        rest = (None, "none", x_scale, None, None, 0.0, ctx.max_rank)
        z = _op(x, packed_weight, ctx.out_features, bias, *lora, *rest)
        dz = through_activation(ctx.activation, dy, z)
    needs_lora = lora_a is not None and (needs[4] or needs[5])
    by_rank_row = lora_b
    if lora_b is not None and lora_b.dim() == 3:
        if needs[5]:
            raise RuntimeError(
                "int8_lora_linear: lora_b: expected [rank, out_features] where its gradient is "
                f"needed, got blocks {tuple(lora_b.shape)}; pass it by rank row"
            )
        by_rank_row = lora_b.transpose(0, 1).flatten(1)[:, : ctx.out_features]
    dx, _, dbias, da, db = _linear_backward_op(
        dz,
        x,
        weight,
        lora_a,
        by_rank_row,
        scales,
        offsets,
        ids,
        0.0,
        None,
        needs[0],
        False,
        needs[3],
        needs_lora,
        None,
        ctx.max_rank,
    )
    return (
        dx if needs[0] else None,
        None,
        None,
        dbias.to(ctx.bias_dtype) if needs[3] else None,
        da.to(lora_a.dtype) if needs_lora and needs[4] else None,
        db.to(lora_b.dtype) if needs_lora and needs[5] else None,
        None,
        None,
        None,
        dy if needs[9] else None,
        *[None] * 6,
    )


torch.library.register_autograd(
    "lora_kernels::int8_lora_linear", _backward, setup_context=_setup_context
)


# Packing is done once per model, on the host: its checks look at every value.
@torch.library.impl("lora_kernels::int8_pack", "CUDA")
def _pack_on_cuda(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return _pack_op(weight.cpu(), scales.cpu()).to(weight.device)


@torch.library.impl("lora_kernels::int8_pack_screen", "CUDA")
def _pack_screen_on_cuda(
    packed_weight: torch.Tensor, out_features: int, in_features: int
) -> torch.Tensor:
    screen = _pack_screen_op(packed_weight.cpu(), out_features, in_features)
    return screen.to(packed_weight.device)
