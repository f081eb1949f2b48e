"""What recorded encoders and decoders take from modules besides their linears."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch

from lora_speech.decoding.linear_parts import LinearParts

Norm = tuple[torch.Tensor, torch.Tensor, float]
"""Weight, bias and epsilon of a layer norm."""

SCREENED_BYTES = 4_000_000
"""From this many INT8 weights of a vocabulary on a screen is made, half as large again. Smaller
ones stay in the caches, where reading a screen takes as long as reading all."""

_screens: WeakKeyDictionary[Any, tuple[torch.Tensor, torch.Tensor]] = WeakKeyDictionary()
_packing = Lock()
_packed: WeakKeyDictionary[Any, tuple[torch.Tensor, int, torch.Tensor]] = WeakKeyDictionary()


def norm_of(module: Any) -> Norm:
    """Take a layer norm apart."""
    return module.weight, module.bias, module.eps


def has_gelu(layer: Any) -> bool:
    """Whether a layer's feed-forward block has the activation that recordings assume."""
    return type(layer.activation_fn).__name__ in ("GELUActivation", "GELU")


def record_linear(
    step: Any,
    x: torch.Tensor,
    part: LinearParts,
    ids: torch.Tensor | None,
    out: torch.Tensor,
    **extra: Any,
) -> torch.Tensor:
    """Record an INT8 linear with its adapters in a composite; returns `out`.

    `extra` is the operator's: norm, activation, residual.
    """
    step.int8_lora_linear(
        x, part.weight, part.out_features, part.bias, x_scale=part.x_scale, out=out,
        **part.lora_of(ids), **extra,
    )  # fmt: skip
    return out


def packed_once(
    module: Any, rows: Callable[[torch.Tensor], torch.Tensor] = lambda weight: weight
) -> torch.Tensor:
    """INT8 of a floating-point module's weight, packed for `int8_lora_linear`.

    Parameters
    ----------
    module : torch.nn.Module
        Its `weight` stays as it is. The packed one is kept for as long as the module and the
        values of its weight live.
    rows : callable
        Makes the weight a matrix [out features, in features].

    Returns
    -------
    Tensor
        uint8.
    """
    from lora_kernels.nn.int8_rows import quantize_weight
    from lora_kernels.ops import int8_pack

    with _packing:  # whoever else needs it for the first time waits, and gets the same
        weight = module.weight
        # The tensor itself, and how often it was written in place: an address could be another's.
        # On another device it stays the same tensor, of the same version.
        version = -1 if weight.is_inference() else weight._version
        known = _packed.get(module)
        if (
            known is not None
            and known[0] is weight
            and known[1] == version
            and known[2].device == weight.device
        ):
            return known[2]
        packed = int8_pack(*quantize_weight(rows(weight)))
        _packed[module] = (weight, version, packed)
        return packed


def screen_once(module: Any, packed: torch.Tensor) -> torch.Tensor | None:
    """Screen of what `packed_once` made of a vocabulary's projection, for `int8_lora_topk`.

    Parameters
    ----------
    module : torch.nn.Module
        The screen is kept for as long as it and `packed` live.
    packed : Tensor
        INT8 of the module's weight [vocabulary, width].

    Returns
    -------
    Tensor or None
        uint8; None where the vocabulary is too small for a screen to pay, or not on the CPU: CUDA
        kernels read all of it.
    """
    from lora_kernels.ops import int8_pack_screen

    words, width = module.weight.shape
    if words * width < SCREENED_BYTES or not packed.is_cpu:
        return None
    known = _screens.get(module)
    if known is not None and known[0] is packed:
        return known[1]
    screen = int8_pack_screen(packed, words, width)
    _screens[module] = (packed, screen)
    return screen
