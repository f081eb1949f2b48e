"""Fold a live adapter into the base weights, for a model that needs only one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .errors import AdapterError, SwapError
from .live import get_adapter, remove_adapter
from .nn.int8_lora_linear import Int8LoraLinear


@dataclass(frozen=True)
class MergeReport:
    """What a merge changed.

    Attributes
    ----------
    name
        The adapter.
    modules
        Module name to the largest absolute change of one of its weights.
    """

    name: str
    modules: dict[str, float]

    def __str__(self) -> str:
        largest = max(self.modules.values(), default=0.0)
        return (
            f"merge: adapter {self.name!r} folded into {len(self.modules)} modules; "
            f"largest change of a weight {largest:.3g}"
        )


@torch.no_grad()
def merge(model: nn.Module, name: str) -> MergeReport:
    """``W <- W + s B A`` in every module of a live adapter, which is then removed.

    The sum is computed in fp32 and rounded once to the weight's dtype. Either every module
    changes or, on an error, none.

    Parameters
    ----------
    model
        A model with live adapters.
    name
        The adapter to fold in; others stay live and then add to the merged weights.

    Returns
    -------
    MergeReport

    Raises
    ------
    AdapterError
        If the name is unknown, or a merged weight would not be finite in its dtype.
    SwapError
        If a module is quantized (merge before ``quantize()``) or its weight is tied to another.
    """
    adapter = get_adapter(model, name)
    named = dict(model.named_modules())
    holders: dict[int, int] = {}
    for module in named.values():
        for parameter in module._parameters.values():
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    merged: dict[str, torch.Tensor] = {}
    for module_name, layer in adapter.layers.items():
        module = named[module_name]
        if isinstance(module, Int8LoraLinear):
            raise SwapError(
                f"{module_name}: expected a floating-point weight, got INT8, which would lose the "
                "adapter to rounding; merge first, then quantize(), or keep the adapter live"
            )
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        if holders.get(id(weight), 0) > 1:
            raise SwapError(
                f"{module_name}: expected a weight of its own, got one that other modules share "
                "and would change with it; keep the adapter live, or untie the weights first"
            )
        delta = layer.delta_weight().to(weight.device).reshape(weight.shape)
        merged[module_name] = (weight.float() + delta).to(weight.dtype)
        if not bool(torch.isfinite(merged[module_name]).all()):
            raise AdapterError(
                f"{module_name}: expected finite merged weights, got an overflow of "
                f"{weight.dtype}; merge into a float32 or bfloat16 model"
            )
    changes = {}
    for module_name, new in merged.items():
        weight = named[module_name].weight
        assert isinstance(weight, torch.Tensor)
        changes[module_name] = float((new.float() - weight.float()).abs().max())
        weight.copy_(new)
    remove_adapter(model, name)
    return MergeReport(name, changes)
