"""How far a floating-point result may be from the reference: one place, one rule.

A result's error against fp64 may be at most twice that of plain PyTorch in the same dtype, plus
rounding of the result itself (FlashAttention's rule). Errors are measured relative to the largest
magnitude of the reference.
"""

from __future__ import annotations

import torch

# One rounding of a result of magnitude 1, times two: summation order differs.
ROUNDING = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

# Besides that, where q and the softmax weights are integers of 14 bits (blocked caches): units of
# 2**-14 in each, relative to a result that averages values of both signs.
FOURTEEN_BITS = 5e-4


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest absolute difference over the largest magnitude of ``want`` (at least 1e-6)."""
    if want.numel() == 0:
        return 0.0
    difference = (got.double() - want.double()).abs().max()
    return (difference / want.double().abs().max().clamp_min(1e-6)).item()


def assert_close(
    got: torch.Tensor,
    exact: torch.Tensor,
    plain: torch.Tensor | None = None,
    *,
    what: str = "result",
    extra: float = 0.0,
    averaged: float = 0.0,
) -> None:
    """Assert the rule of this module.

    Parameters
    ----------
    got
        The result under test.
    exact
        The reference in fp64.
    plain
        The same by plain PyTorch in the dtype of ``got``; None: only rounding is allowed.
    what
        Name of ``got`` in the message.
    extra
        What is allowed besides, such as ``FOURTEEN_BITS``.
    averaged
        Magnitude that ``extra`` is relative to where it is larger than the result's: values whose
        average is the result may cancel in it.
    """
    assert got.shape == exact.shape, (
        f"{what}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    )
    error = relative_error(got, exact)
    if extra and averaged and exact.numel():
        extra *= max(1.0, averaged / exact.double().abs().max().clamp_min(1e-6).item())
    budget = (
        ROUNDING[got.dtype]
        + extra
        + 2 * (relative_error(plain, exact) if plain is not None else 0.0)
    )
    assert error <= budget, f"{what}: relative error {error:.2e}, budget {budget:.2e}"
