"""Quantization schemes: a frozen dataclass describes one, a registered handler applies it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from .errors import SwapError
from .integrations.peft_layers import has_foreign_forward, is_peft_layer
from .nn.int8_lora_linear import Int8LoraLinear, Int8LoraPointwiseConv1d
from .nn.lora_linear import LoraLinear, LoraPointwiseConv1d, is_pointwise
from .report import Change, Kept, SwapReport
from .selection import is_inside, select_modules


@dataclass(frozen=True)
class Int8Dynamic:
    """INT8 weights per output channel; inputs quantized per row as they come.

    Needs no calibration. LayerNorm, softmax, residual additions, LoRA and biases stay in
    floating point.
    """


Scheme = TypeVar("Scheme")
Handler = Callable[[nn.Module, Scheme], nn.Module]
_HANDLERS: dict[type, Handler] = {}


def register_scheme(scheme: type[Scheme]) -> Callable[[Handler[Scheme]], Handler[Scheme]]:
    """Register the function that turns one linear layer into its quantized counterpart.

    Parameters
    ----------
    scheme
        The dataclass that describes the scheme.

    Returns
    -------
    callable
        A decorator for ``handler(linear, scheme) -> module``.
    """

    def register(handler: Handler[Scheme]) -> Handler[Scheme]:
        if scheme in _HANDLERS:
            raise SwapError(
                f"scheme: expected a new class, {scheme.__name__} is registered already"
            )
        _HANDLERS[scheme] = handler
        return handler

    return register


@register_scheme(Int8Dynamic)
def _int8_dynamic(linear: nn.Module, scheme: Int8Dynamic) -> nn.Module:
    activation = linear.activation if isinstance(linear, LoraLinear) else "none"
    if isinstance(linear, nn.Conv1d):
        return Int8LoraPointwiseConv1d.from_linear(linear)
    assert isinstance(linear, nn.Linear)
    return Int8LoraLinear.from_linear(linear, activation=activation)


def _tied_parameters(model: nn.Module) -> dict[int, list[str]]:
    """Parameter id to the names of every module that holds it, where there are several."""
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append(name)
    return {key: names for key, names in holders.items() if len(names) > 1}


def _why_not(
    name: str, module: nn.Module, peft: set[str], tied: dict[int, list[str]]
) -> str | None:
    """The reason to leave a linear layer or convolution in floating point, or None."""
    if type(module) not in (nn.Linear, LoraLinear, nn.Conv1d, LoraPointwiseConv1d):
        return "a subclass with its own behaviour"
    if isinstance(module, nn.Conv1d) and not is_pointwise(module):
        return "not a pointwise convolution"
    if is_inside(name, peft):
        return "part of a PEFT layer (merge it, or load the adapter with load_adapter)"
    weight = module.weight
    if id(weight) in tied:
        others = ", ".join(other for other in tied[id(weight)] if other != name)
        return f"weight tied with {others}"
    if not isinstance(weight, nn.Parameter):
        return "weight computed by a parametrization"
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"weight of {weight.dtype}"
    if has_foreign_forward(module):
        return "its forward was replaced by someone else"
    return None


def quantize(
    model: nn.Module,
    scheme: object | None = None,
    *,
    modules: str | Iterable[str] | None = None,
) -> SwapReport:
    """Quantize the linear layers and pointwise convolutions of a model, in place.

    Live adapters already loaded stay loaded. Output heads whose weight is tied to an embedding
    are left alone, and the report says so.

    Parameters
    ----------
    model
        Any module.
    scheme
        A scheme, e.g. ``Int8Dynamic()`` (the default).
    modules
        Which modules: None for all, a regular expression for the whole name, or a list of names
        or their ends.

    Returns
    -------
    SwapReport
        What was replaced, what was left and why.

    Raises
    ------
    SwapError
        If the scheme is unknown, ``modules`` names nothing, nothing could be quantized, or a
        weight holds a NaN or an infinity; the model is then unchanged.
    """
    scheme = Int8Dynamic() if scheme is None else scheme
    handler = _HANDLERS.get(type(scheme))
    if handler is None:
        known = ", ".join(f"{known.__name__}()" for known in _HANDLERS)
        raise SwapError(f"scheme: expected one of {known}, got {scheme!r}; pass one of these")
    named = dict(model.named_modules())
    candidates = {n: m for n, m in named.items() if n and isinstance(m, (nn.Linear, nn.Conv1d))}
    selected = select_modules(list(candidates), modules)
    tied = _tied_parameters(model)
    peft = {name for name, module in named.items() if is_peft_layer(module)}
    report = SwapReport(title=f"quantize to {scheme!r}")
    new: dict[str, nn.Module] = {}
    for name, module in candidates.items():
        if name not in selected:
            continue
        reason = _why_not(name, module, peft, tied)
        if reason is not None:
            report.kept.append(Kept(name, type(module).__name__, reason))
            continue
        try:
            new[name] = handler(module, scheme)
        except ValueError as error:
            raise SwapError(f"{name}: {error}") from error
        report.replaced.append(Change(name, type(module).__name__, type(new[name]).__name__))
        if module._forward_hooks or module._forward_pre_hooks:
            report.notes.append(f"{name}: its forward hooks were moved to the quantized module")
    if not new:
        reasons = sorted({kept.reason for kept in report.kept})
        raise SwapError(
            f"model: expected at least one linear layer to quantize, got none "
            f"({'; '.join(reasons) or 'it has no floating-point linear layers'})"
        )
    for name, quantized in new.items():
        old = candidates[name]
        quantized._forward_hooks = old._forward_hooks
        quantized._forward_pre_hooks = old._forward_pre_hooks
        quantized._forward_hooks_with_kwargs = old._forward_hooks_with_kwargs
        quantized._forward_pre_hooks_with_kwargs = old._forward_pre_hooks_with_kwargs
        if (
            isinstance(old, (LoraLinear, LoraPointwiseConv1d))
            and isinstance(quantized, Int8LoraLinear)
            and old.bank is not None
        ):
            quantized.set_bank(quantized.pack_bank(old.bank.unpack()), old._registry)
        parent, _, leaf = name.rpartition(".")
        named[parent]._modules[leaf] = quantized
    return report
