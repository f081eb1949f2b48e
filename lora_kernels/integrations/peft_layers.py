"""PEFT's own LoRA layers, computed by ``lora_linear``; their parameters stay PEFT's own.

Only ``forward`` of the instance is replaced, so training, ``save_pretrained``, ``Trainer``,
``set_adapter``, ``disable_adapter`` and merging keep working: whatever the fused forward does not
cover goes to PEFT's forward.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import nn

from .. import ops
from ..nn.adapter_host import AdapterHost
from ..nn.lora_linear import LoraLinear, LoraPointwiseConv1d, is_pointwise

_PLANS = "_lora_kernels_plans"
_LAYER_MODULE = "peft.tuners.lora.layer"
_SEED_LIMIT = 2**63 - 1


def is_peft_layer(module: nn.Module) -> bool:
    """Whether a module is a PEFT tuner layer of any kind (recognised without importing PEFT)."""
    return type(module).__module__.startswith("peft.tuners.") and hasattr(module, "base_layer")


def has_foreign_forward(module: nn.Module) -> bool:
    """Whether someone replaced this instance's forward by another than its class's."""
    forward = module.__dict__.get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


def _kind(module: nn.Module) -> str | None:
    cls = type(module)
    if cls.__module__ == _LAYER_MODULE and cls.__name__ in ("Linear", "Conv1d"):
        return cls.__name__
    return None


def _base_reasons(module: nn.Module, base: nn.Module) -> list[str]:
    reasons = []
    if type(base) not in (nn.Linear, LoraLinear, nn.Conv1d, LoraPointwiseConv1d):
        reasons.append(f"its base layer is {type(base).__module__}.{type(base).__name__}")
        return reasons
    if isinstance(base, nn.Conv1d) and not is_pointwise(base):
        reasons.append("not a pointwise convolution")
    if isinstance(base, nn.Conv1d) != (_kind(module) == "Conv1d"):
        reasons.append("its base layer is of another kind")
    if getattr(module, "fan_in_fan_out", False):
        reasons.append("fan_in_fan_out stores the weight transposed")
    if base.weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        reasons.append(f"its base weight is {base.weight.dtype}")
    reasons.extend(_tampered("its base layer", base))
    if isinstance(base, AdapterHost) and base.bank is not None:
        reasons.append("its base layer carries live adapters")
    return reasons


def _tampered(label: str, module: nn.Module) -> list[str]:
    """Reasons why a submodule must be called as a module rather than read."""
    if has_foreign_forward(module):
        return [f"the forward of {label} was replaced by someone else"]
    if module._forward_hooks or module._forward_pre_hooks:
        return [f"{label} has forward hooks"]
    return []


def may_be_read(module: nn.Module) -> bool:
    """Whether a module's parameters may be read instead of calling it: no hooks, its own forward.

    A PEFT layer whose forward :func:`swap_layer` replaced counts as one with its own.
    """
    if is_swapped(module):
        return not (module._forward_hooks or module._forward_pre_hooks)
    return not _tampered("it", module)


def _adapter_reasons(module: Any, adapter: str) -> list[str]:
    reasons = []
    if module.use_dora.get(adapter):
        reasons.append(f"adapter {adapter!r} uses DoRA")
    elif adapter in module.lora_variant:
        reasons.append(f"adapter {adapter!r} is a {type(module.lora_variant[adapter]).__name__}")
    if module.lora_bias.get(adapter):
        reasons.append(f"adapter {adapter!r} has a bias in lora_B (lora_bias=True)")
    for label in ("lora_A", "lora_B"):
        holder = getattr(module, label)
        if adapter in holder:
            reasons.extend(_tampered(label, holder[adapter]))
            if "weight" not in holder[adapter]._parameters:
                reasons.append(f"{label} has no plain weight")
    return reasons


def static_reasons(module: nn.Module) -> list[str]:
    """Every reason why PEFT's forward must stay, now and whatever adapter becomes active."""
    if _kind(module) is None:
        cls = type(module)
        return [f"PEFT's {cls.__module__}.{cls.__name__} has no fused counterpart"]
    reasons = _base_reasons(module, module.base_layer)  # type: ignore[arg-type]
    if has_foreign_forward(module) and not is_swapped(module):
        reasons.append("its forward was replaced by someone else")
    adapters = list(module.lora_A.keys())  # type: ignore[union-attr,operator]
    if not adapters:
        reasons.append("it has no LoRA adapter")
    per_adapter = [_adapter_reasons(module, adapter) for adapter in adapters]
    if adapters and all(per_adapter):
        reasons.extend(reason for group in per_adapter for reason in group)
    return reasons


class _Plan:
    """What the fused forward needs of one adapter, looked up once."""

    __slots__ = ("a", "b", "base", "device", "dropout", "scales", "scaling", "usable")

    def __init__(self, module: Any, adapter: str) -> None:
        self.base = module.base_layer
        self.a = module.lora_A[adapter]
        self.b = module.lora_B[adapter]
        dropout = module.lora_dropout[adapter]
        self.dropout = dropout if isinstance(dropout, nn.Dropout) else None
        self.usable = not (
            _base_reasons(module, self.base)
            or _adapter_reasons(module, adapter)
            or not isinstance(dropout, (nn.Dropout, nn.Identity))
        )
        self.rescale(module.scaling[adapter])

    def rescale(self, scaling: float) -> None:
        self.scaling = scaling
        self.device = self.a.weight.device
        self.scales = torch.tensor([scaling], dtype=torch.float32, device=self.device)


def _plan(module: Any, adapter: str) -> _Plan | None:
    """The current plan of an adapter, or None if the layer has no such adapter."""
    plans: dict[str, _Plan] = module.__dict__[_PLANS]
    plan = plans.get(adapter)
    a = module._modules["lora_A"]._modules.get(adapter)
    if a is None:
        return None
    if plan is None or plan.a is not a or plan.base is not module._modules["base_layer"]:
        plan = plans[adapter] = _Plan(module, adapter)
    elif plan.scaling != module.scaling[adapter] or plan.device != a.weight.device:
        plan.rescale(module.scaling[adapter])
    return plan


def _usable_plan(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Plan | None:
    """The plan for this call, or None when PEFT's own forward must do it."""
    if args or kwargs or module._disable_adapters or module.merged_adapters:
        return None
    active = module._active_adapter
    if not isinstance(active, str):
        if len(active) != 1:
            return None
        active = active[0]
    plan = _plan(module, active)
    return plan if plan is not None and plan.usable else None


def _fused(plan: _Plan, x: torch.Tensor, pointwise: bool) -> torch.Tensor:
    """``lora_linear`` over [..., K] with PEFT's parameters, read where PEFT keeps them."""
    base = plan.base._parameters
    weight, bias = base["weight"], base["bias"]
    a, b = plan.a._parameters["weight"], plan.b._parameters["weight"]
    if pointwise:
        weight, a, b = weight.squeeze(-1), a.squeeze(-1), b.squeeze(-1)
    dropout = plan.dropout
    if dropout is None or not dropout.training or dropout.p == 0.0:
        return ops.lora_linear(x, weight, bias, lora_a=a, lora_b=b.t(), scales=plan.scales)
    # The seed comes from torch's generator, so that a restored generator state repeats the mask:
    # gradient checkpointing and exact resumption rely on it.
    seed = torch.randint(0, _SEED_LIMIT, (1,), dtype=torch.int64, device=x.device)
    return ops.lora_linear(
        x,
        weight,
        bias,
        lora_a=a,
        lora_b=b.t(),
        scales=plan.scales,
        dropout_p=dropout.p,
        dropout_seed=seed,
    )


def _linear_forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    plan = _usable_plan(self, args, kwargs)
    if plan is None:
        return type(self).forward(self, x, *args, **kwargs)
    return _fused(plan, x, pointwise=False)


def _conv1d_forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    plan = _usable_plan(self, args, kwargs)
    if plan is None:
        return type(self).forward(self, x, *args, **kwargs)
    return _fused(plan, x.transpose(-1, -2), pointwise=True).transpose(-1, -2)


# A pickled instance finds its forward by this name, which gives PEFT's own until swapped again.
_linear_forward.__name__ = _conv1d_forward.__name__ = "forward"


def swap_layer(module: nn.Module) -> None:
    """Replace the instance's forward; :func:`static_reasons` must be empty."""
    forward = _linear_forward if _kind(module) == "Linear" else _conv1d_forward
    module.__dict__[_PLANS] = {}
    module.__dict__["forward"] = MethodType(forward, module)


def is_swapped(module: nn.Module) -> bool:
    """Whether :func:`swap_layer` replaced this instance's forward."""
    forward = module.__dict__.get("forward")
    return getattr(forward, "__func__", None) in (_linear_forward, _conv1d_forward)


def unswap_layer(module: nn.Module) -> bool:
    """Give PEFT's forward back; returns whether it had been replaced."""
    if module.__dict__.pop(_PLANS, None) is None:
        return False
    module.__dict__.pop("forward", None)
    return True


def dynamic_notes(module: Any) -> list[str]:
    """States in which PEFT's own forward computes for the moment."""
    notes = []
    if module._disable_adapters:
        notes.append("adapters are disabled")
    if module.merged_adapters:
        notes.append(f"adapters {module.merged_adapters} are merged")
    active = module.active_adapters
    if len(active) > 1:
        notes.append(f"several adapters are active ({', '.join(active)})")
    return notes
