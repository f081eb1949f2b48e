"""``lora_linear``: base and low-rank product, bias, activation and residual in one operator."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from . import _library as _library
from ._dispatch import straight
from .recompute import origin

_op = torch.ops.lora_kernels.lora_linear.default
_straight = straight(_op)
_keeping_t_op = torch.ops.lora_kernels.lora_linear_keeping_t.default
_straight_keeping_t = straight(_keeping_t_op)
_backward_op = torch.ops.lora_kernels.lora_linear_backward.default


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    lora_a: torch.Tensor | None = None,
    lora_b: torch.Tensor | None = None,
    *,
    scales: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    adapter_ids: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str = "none",
    dropout_p: float = 0.0,
    dropout_seed: torch.Tensor | None = None,
    max_rank: int = 0,
) -> torch.Tensor:
    """Compute ``act(x Wt + bias + s (dropout(x) At) B) + residual``.

    The LoRA term is that of Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models"
    (2021), with one adapter per row of ``x`` out of a ragged bank. Differentiable in ``x``,
    ``weight``, ``bias``, ``lora_a``, ``lora_b`` and ``residual``. Under ``torch.autocast`` the
    operands are cast as ``F.linear``'s are.

    Parameters
    ----------
    x
        [..., K], fp32, fp16 or bf16. M is the number of its rows.
    weight
        [N, K] in the dtype of ``x``.
    bias
        [N] in that dtype or fp32.
    lora_a, lora_b
        [R, K] and [R, N] by rank row, both fp32, fp16 or bf16; the R rank rows of all adapters
        one after another. ``lora_b`` may have any strides: PEFT's B, [N, r], is passed as
        ``B.t()`` without a copy. Or in blocks of 64 outputs, [N64 / 64, R, 64], as ``AdapterBank``
        keeps it, where no gradient is needed.
    scales
        fp32 [n], alpha / rank of each adapter; None: all 1.
    offsets
        int32 [n + 1], where each adapter's rank rows begin; None: one adapter of all R rows.
    adapter_ids
        int32 [G], G a divisor of M: the adapter of rows ``g * M / G`` to
        ``(g + 1) * M / G - 1``; -1: base only. None: adapter 0 for every row.
    residual
        [..., N] in the dtype of ``x``, added after the activation.
    activation
        "none", "gelu" (with the error function, as Whisper has it) or "silu".
    dropout_p, dropout_seed
        Dropout on the LoRA branch's input, with the mask of a counter-based generator
        (Philox4x32-10) seeded by ``dropout_seed``, int64 [1]: the same seed gives the same mask,
        so none is stored for the backward pass.
    max_rank
        The largest of the ranks that ``offsets`` tells, as ``AdapterBank.max_rank`` has it; 0: not
        known. On a CUDA device, where ``offsets`` are not waited for, kernels are planned for this
        rank instead of the sum of all, and a larger one is cut to it (gradients of the rank rows
        that are cut off are undefined). The CPU refuses one that is smaller than a rank.

    Returns
    -------
    torch.Tensor
        [..., N] in the dtype of ``x``; sums in fp32.

    Raises
    ------
    RuntimeError
        If a shape, dtype or value does not fit; the text names the argument, what was expected,
        what came, and the fix.
    """
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        residual = None if residual is None else residual.to(dtype)
    arguments = (
        x,
        weight,
        bias,
        lora_a,
        lora_b,
        scales,
        offsets,
        adapter_ids,
        residual,
        activation,
        dropout_p,
        dropout_seed,
        max_rank,
    )
    kernel = _straight(x)
    if kernel is not None and not torch.is_grad_enabled():
        return kernel(*arguments)  # type: ignore[no-any-return]
    if _worth_keeping_t(lora_a, lora_b, offsets, activation):
        if kernel is not None:
            return _DifferentiableKeepingT.apply(*arguments)[0]  # type: ignore[no-any-return]
        if not torch.compiler.is_exporting():  # what leaves PyTorch is the plain operator
            return _keeping_t_op(*arguments)[0]
    if kernel is not None:
        return _Differentiable.apply(*arguments)  # type: ignore[no-any-return]
    return _op(*arguments)


# Of the adapters of a bank. A row of the t that is kept is as wide as all ranks together, of which
# its adapter's are a part.
_MOST_RANK_ROWS_KEPT = 64


def _worth_keeping_t(
    lora_a: torch.Tensor | None,
    lora_b: torch.Tensor | None,
    offsets: torch.Tensor | None,
    activation: str,
) -> bool:
    """Whether the forward pass hands its s (x At) to the backward pass.

    dB needs it. Behind an activation the backward pass computes what went into it, and has t from
    there.
    """
    return (
        lora_a is not None
        and lora_b is not None
        and activation == "none"
        and torch.is_grad_enabled()
        and (lora_a.requires_grad or lora_b.requires_grad)
        and (offsets is None or lora_a.shape[0] <= _MOST_RANK_ROWS_KEPT)
    )


def _columns_of_t(lora_a: torch.Tensor) -> Any:
    return (lora_a.shape[0] + 15) // 16 * 16  # kept_t_columns of the contract


@torch.library.register_fake("lora_kernels::lora_linear")
def _fake(x: torch.Tensor, weight: torch.Tensor, *args: Any) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.register_fake("lora_kernels::lora_linear_keeping_t")
def _fake_keeping_t(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor | None,
    *args: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    columns = 0 if lora_a is None else _columns_of_t(lora_a)
    t = x.new_empty(
        math.prod(x.shape[:-1]),
        columns,
        dtype=x.dtype if x.is_cuda else torch.float32,
    )
    return _fake(x, weight), t


@torch.library.register_fake("lora_kernels::lora_linear_backward")
def _fake_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_a: torch.Tensor | None,
    lora_b: torch.Tensor | None,
    scales: torch.Tensor | None,
    offsets: torch.Tensor | None,
    adapter_ids: torch.Tensor | None,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
    needs_dx: bool,
    needs_dweight: bool,
    needs_dbias: bool,
    needs_dlora: bool,
    t: torch.Tensor | None = None,
    max_rank: int = 0,
) -> tuple[torch.Tensor, ...]:
    def fp32(*shape: int) -> torch.Tensor:
        return x.new_empty(shape, dtype=torch.float32)

    lora = needs_dlora and lora_a is not None and lora_b is not None
    return (
        x.new_empty(x.shape if needs_dx else (0,)),
        fp32(*(weight.shape if needs_dweight else (0,))),
        fp32(weight.shape[0] if needs_dbias else 0),
        fp32(*(lora_a.shape if lora and lora_a is not None else (0,))),
        fp32(*(lora_b.shape if lora and lora_b is not None else (0,))),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _save(ctx, inputs, None)


def _setup_context_keeping_t(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]
) -> None:
    t = output[1]
    ctx.mark_non_differentiable(t)
    ctx.set_materialize_grads(False)
    _save(ctx, inputs, t)


def _save(ctx: Any, inputs: tuple[Any, ...], t: torch.Tensor | None) -> None:
    x, weight, bias, lora_a, lora_b, scales, offsets, ids = inputs[:8]
    activation, dropout_p, seed, max_rank = inputs[9:]
    # The bias matters to the gradient only through an activation.
    kept_bias = bias if activation != "none" else None
    # An x that its maker can make again is not kept beside what it was made from.
    source = origin(x)
    ctx.make_x = source and source.make
    kept_x = source.source if source else x
    ctx.save_for_backward(kept_x, weight, kept_bias, lora_a, lora_b, scales, offsets, ids, seed, t)
    ctx.activation = activation
    ctx.dropout_p = dropout_p
    ctx.max_rank = max_rank
    ctx.bias_dtype = None if bias is None else bias.dtype


def through_activation(activation: str, dy: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """The gradient of what goes into "gelu" or "silu", z, from that of what comes out."""
    aten = torch.ops.aten
    return (aten.gelu_backward if activation == "gelu" else aten.silu_backward)(dy, z)  # type: ignore[no-any-return]


def _backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, weight, bias, lora_a, lora_b, scales, offsets, ids, seed, t = ctx.saved_tensors
    if ctx.make_x is not None:
        with torch.no_grad():
            x = ctx.make_x(x)
    dz = dy
    if ctx.activation != "none":
        # Recomputing what went into the activation costs one forward pass and saves keeping it.
        lora = (lora_a, lora_b, scales, offsets, ids)
        rest = (None, "none", ctx.dropout_p, seed, ctx.max_rank)
        z, t = _keeping_t_op(x, weight, bias, *lora, *rest)
        dz = through_activation(ctx.activation, dy, z)
    needs = ctx.needs_input_grad
    needs_lora = lora_a is not None and (needs[3] or needs[4])
    dx, dweight, dbias, da, db = _backward_op(
        dz,
        x,
        weight,
        lora_a,
        lora_b,
        scales,
        offsets,
        ids,
        ctx.dropout_p,
        seed,
        needs[0],
        needs[1],
        needs[2],
        needs_lora,
        t if needs_lora else None,
        ctx.max_rank,
    )
    return (
        dx if needs[0] else None,
        dweight.to(weight.dtype) if needs[1] else None,
        dbias.to(ctx.bias_dtype) if needs[2] else None,
        da.to(lora_a.dtype) if needs_lora and needs[3] else None,
        db.to(lora_b.dtype) if needs_lora and needs[4] else None,
        None,
        None,
        None,
        dy if needs[8] else None,
        None,
        None,
        None,
        None,
    )


torch.library.register_autograd(
    "lora_kernels::lora_linear", _backward, setup_context=_setup_context
)


def _backward_keeping_t(
    ctx: Any, dy: torch.Tensor | None, dt: None
) -> tuple[torch.Tensor | None, ...]:
    # Gradients that are not there are not made of zeros, for the sake of t, which has none.
    return (None,) * 13 if dy is None else _backward(ctx, dy)


torch.library.register_autograd(
    "lora_kernels::lora_linear_keeping_t",
    _backward_keeping_t,
    setup_context=_setup_context_keeping_t,
)


class _Differentiable(torch.autograd.Function):
    """The same gradient for eager calls, without the cost of the registered one."""

    @staticmethod
    def forward(*arguments: Any) -> torch.Tensor:
        return _straight(arguments[0])(*arguments)  # type: ignore[no-any-return]

    setup_context = staticmethod(_setup_context)
    backward = staticmethod(once_differentiable(_backward))  # type: ignore[assignment]


class _DifferentiableKeepingT(torch.autograd.Function):
    """The same with t handed from the forward to the backward pass."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return _straight_keeping_t(arguments[0])(*arguments)  # type: ignore[no-any-return]

    setup_context = staticmethod(_setup_context_keeping_t)
    backward = staticmethod(once_differentiable(_backward_keeping_t))  # type: ignore[assignment]
