"""LayerNorms and activations whose outputs are made again in the backward pass, not kept.

They compute as before and note on their output where it came from (:mod:`..ops.recompute`);
``lora_linear`` then keeps no copy of it. Nothing changes without gradients, under autocast, in
``torch.compile``, or for whatever else reads the output.
"""

from __future__ import annotations

from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn

from ..ops.recompute import remember
from .peft_layers import has_foreign_forward

# Deterministic, made by one elementwise or row-wise pass, and with a gradient that keeps the input.
_TORCH_KINDS = (nn.LayerNorm, nn.GELU, nn.SiLU)
_TRANSFORMERS_KINDS = ("GELUActivation", "SiLUActivation")


def is_recomputable(module: nn.Module) -> bool:
    """Whether a module is a LayerNorm or activation of a kind that can be made again."""
    cls = type(module)
    if cls in _TORCH_KINDS:
        return True
    return cls.__module__ == "transformers.activations" and cls.__name__ in _TRANSFORMERS_KINDS


def _forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    made = type(self).forward(self, x)
    if (
        made.requires_grad
        and type(made) is torch.Tensor
        and not torch.compiler.is_compiling()
        and not torch._C._is_any_autocast_enabled()  # the backward pass runs outside of it
    ):
        remember(made, partial(type(self).forward, self), x)
    return made  # type: ignore[no-any-return]


# A pickled instance finds its forward by this name, which is its class's own until swapped again.
_forward.__name__ = "forward"


def swap_layer(module: nn.Module) -> bool:
    """Let the outputs of an instance be made again; returns whether that is new."""
    if has_foreign_forward(module):  # ours among them
        return False
    module.__dict__["forward"] = MethodType(_forward, module)
    return True


def unswap_layer(module: nn.Module) -> bool:
    """Give the class's forward back; returns whether it had been replaced."""
    if getattr(module.__dict__.get("forward"), "__func__", None) is not _forward:
        return False
    module.__dict__.pop("forward")
    return True
