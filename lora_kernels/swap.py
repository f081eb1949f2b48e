"""Put the fused operators into a model, and take them out again."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from .errors import SwapError
from .integrations import peft_layers, recomputed_layers, transformers_whisper
from .integrations.peft_layers import has_foreign_forward
from .live import drop_registry, registry_of
from .nn.int8_lora_linear import Int8LoraLinear
from .nn.lora_linear import (
    LoraLinear,
    LoraPointwiseConv1d,
    generalise,
    is_pointwise,
    specialise,
)
from .report import Change, Kept, SwapReport
from .selection import is_inside, select_modules


def _class_name(module: nn.Module) -> str:
    cls = type(module)
    library = cls.__module__.partition(".")[0]
    return cls.__name__ if library in ("torch", "lora_kernels") else f"{library} {cls.__name__}"


def _check_trainable(model: nn.Module, peft: list[str]) -> None:
    """A LoRA setup in which everything trains has lost its freezing: refuse it."""
    parameters = list(model.named_parameters())
    if not peft or not all(parameter.requires_grad for _, parameter in parameters):
        return
    listed = ", ".join(map(repr, peft[:3])) + (" ..." if len(peft) > 3 else "")
    raise SwapError(
        f"model: expected only the LoRA parameters (of {listed}) to be trainable, got all "
        f"{len(parameters)} parameters trainable; the base was unfrozen after get_peft_model(), or "
        "LoRA was injected without freezing it: set requires_grad_(False) on the base"
    )


def _linear_reason(module: nn.Module) -> str | None:
    """Why a linear layer or convolution is left, or None if it can be replaced."""
    if isinstance(module, (LoraLinear, LoraPointwiseConv1d, Int8LoraLinear)):
        return "swapped already"
    if type(module) not in (nn.Linear, nn.Conv1d):
        return "a subclass with its own behaviour"
    if isinstance(module, nn.Conv1d) and not is_pointwise(module):
        return "not a pointwise convolution"
    if has_foreign_forward(module):
        return "its forward was replaced by someone else"
    return None


def _swap_linear(name: str, module: nn.Module, report: SwapReport) -> None:
    reason = _linear_reason(module)
    if reason is not None:
        report.kept.append(Kept(name, _class_name(module), reason))
        return
    before = _class_name(module)
    specialise(module)
    report.replaced.append(Change(name, before, _class_name(module)))


def _swap_peft(name: str, module: nn.Module, report: SwapReport) -> None:
    kind = _class_name(module)
    if peft_layers.is_swapped(module):
        report.kept.append(Kept(name, kind, "swapped already"))
        return
    reasons = peft_layers.static_reasons(module)
    if reasons:
        report.kept.append(Kept(name, kind, "; ".join(reasons)))
        return
    peft_layers.swap_layer(module)
    report.replaced.append(Change(name, kind, "lora_linear"))
    for note in peft_layers.dynamic_notes(module):
        text = f"for now PEFT's own forward computes: {note}"
        if text not in report.notes:
            report.notes.append(text)


def _swap_attention(name: str, module: nn.Module, report: SwapReport) -> None:
    kind = _class_name(module)
    if transformers_whisper.is_swapped(module):
        report.kept.append(Kept(name, kind, "swapped already"))
        return
    reasons = transformers_whisper.static_reasons(module)
    if reasons:
        report.kept.append(Kept(name, kind, "; ".join(reasons)))
        return
    transformers_whisper.swap_attention(module)
    report.replaced.append(Change(name, kind, "cached step by kv_attention_step"))


def _swap_recomputed(modules: Iterable[nn.Module], report: SwapReport) -> None:
    """Let training keep what LayerNorms and activations read, and not what they give as well."""
    kinds = [module for module in modules if recomputed_layers.is_recomputable(module)]
    count = sum(recomputed_layers.swap_layer(module) for module in kinds)
    if count:
        report.notes.append(
            f"the outputs of {count} LayerNorms and activations are made again in the backward "
            "pass instead of kept"
        )


def swap(
    model: nn.Module,
    *,
    modules: str | Iterable[str] | None = None,
    attention: bool = True,
) -> SwapReport:
    """Put the fused operators into a model, in place.

    Plain ``nn.Linear`` and pointwise ``nn.Conv1d`` become :class:`LoraLinear` and
    :class:`LoraPointwiseConv1d` (the same objects with the same parameters, so ``state_dict``,
    ``save_pretrained`` and optimizers see no change); PEFT's LoRA layers keep their parameters
    and get a fused forward, beside which LayerNorms and activations spare the memory that their
    outputs take in training; Whisper's decoder attention steps over a preallocated cache.
    Swapping twice is harmless.

    Parameters
    ----------
    model
        Any module; the model that ``get_peft_model`` returned, or a base model.
    modules
        Which linear layers: None for all, a regular expression for the whole name, or a list of
        names or their ends, as in PEFT's ``target_modules``.
    attention
        Also replace the cached step of attention modules that are recognised.

    Returns
    -------
    SwapReport
        What was replaced, what was left, and why; ``print`` it.

    Raises
    ------
    SwapError
        If ``modules`` names nothing, if the model has nothing to replace, or if it is a LoRA
        setup with all parameters trainable. The model is then unchanged.
    """
    named = {name: module for name, module in model.named_modules() if name} or {"": model}
    peft = [name for name, module in named.items() if peft_layers.is_peft_layer(module)]
    owners = set(peft)
    linears = [
        name
        for name, module in named.items()
        if isinstance(module, (nn.Linear, nn.Conv1d, Int8LoraLinear))
        and name not in owners
        and not is_inside(name, owners)
    ]
    attentions = [
        name for name, module in named.items() if transformers_whisper.is_whisper_attention(module)
    ]
    _check_trainable(model, peft)
    selected = select_modules([n for n in named if n in owners or n in set(linears)], modules)
    if not selected and not attentions:
        raise SwapError(
            f"model: expected a module with linear layers, pointwise convolutions or PEFT's LoRA "
            f"layers, got {type(model).__name__} without any; pass the model that holds them"
        )
    report = SwapReport()
    for name, module in named.items():
        if name in owners:
            if name in selected:
                _swap_peft(name, module, report)
        elif name in selected:
            _swap_linear(name, module, report)
    if any(peft_layers.is_swapped(named[name]) for name in peft):
        _swap_recomputed(named.values(), report)
    if attention:
        for name in attentions:
            _swap_attention(name, named[name], report)
    return report


def unswap(model: nn.Module) -> SwapReport:
    """Undo :func:`swap`; live adapters are dropped, quantized layers stay quantized.

    Returns
    -------
    SwapReport
        What was given back, and what was left.
    """
    report = SwapReport(title="unswap")
    registry = registry_of(model)
    if registry is not None and len(registry):
        report.notes.append(f"live adapters dropped: {', '.join(registry.names)}")
    drop_registry(model)
    for name, module in model.named_modules():
        before = _class_name(module)
        if generalise(module):
            report.replaced.append(Change(name, before, _class_name(module)))
        elif peft_layers.unswap_layer(module):
            report.replaced.append(Change(name, "lora_linear", before))
        elif transformers_whisper.unswap_attention(module):
            report.replaced.append(Change(name, "cached step by kv_attention_step", before))
        elif isinstance(module, Int8LoraLinear):
            report.kept.append(Kept(name, before, "quantized; load the floating-point model again"))
        else:
            recomputed_layers.unswap_layer(module)
    return report
