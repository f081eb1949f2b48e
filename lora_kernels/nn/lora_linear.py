"""Linear layers and pointwise convolutions with live adapters, through ``lora_linear``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .. import ops
from ..adapters.registry import ACTIVE_SELECTION
from .adapter_host import AdapterHost


class LoraLinear(AdapterHost, nn.Linear):
    """``nn.Linear`` whose rows may each use another adapter.

    It is an ``nn.Linear`` in every respect (parameters, ``state_dict``, ``isinstance``); without
    a bank, or outside of ``use_adapters()``, it computes exactly what ``nn.Linear`` computes.

    Attributes
    ----------
    activation
        ``none``, ``gelu`` or ``silu``, fused into the product.
    """

    activation: str = "none"

    @classmethod
    def from_linear(cls, linear: nn.Linear, activation: str = "none") -> LoraLinear:
        """A LoraLinear that shares the parameters of ``linear``."""
        module = cls.__new__(cls)
        module.__dict__.update(linear.__dict__)
        module._parameters = linear._parameters.copy()
        module.activation = activation
        return module

    @property
    def adapter_device(self) -> torch.device:
        """Where the weight lives."""
        return self.weight.device

    def forward(self, input: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """``act(x Wt + bias + s (x At) B) + residual``.

        Parameters
        ----------
        input
            [..., K]; the first dimension is the batch that ``use_adapters()`` speaks of.
        residual
            [..., N], added after the activation.

        Returns
        -------
        torch.Tensor
            [..., N].

        Raises
        ------
        AdapterError
            If the batch is not a multiple of the number of names given to ``use_adapters()``.
        """
        weight, bias = self.weight, self.bias
        registry = self._registry
        # Without adapters no context variable is read: torch.compile cannot trace one.
        selection = None if registry is None else ACTIVE_SELECTION.get()
        if registry is None or selection is None:
            if residual is None and self.activation == "none":
                return F.linear(input, weight, bias)
            bank = ids = None
        else:
            batch = input.shape[0] if input.dim() > 1 else 1
            ids = selection.ids(registry, input, batch)
            bank = self.bank_for(selection)
        if bank is None or ids is None:
            return ops.lora_linear(
                input, weight, bias, residual=residual, activation=self.activation
            )
        return ops.lora_linear(
            input,
            weight,
            bias,
            lora_a=bank.lora_a,
            lora_b=bank.lora_b,
            scales=bank.scales,
            offsets=bank.offsets,
            adapter_ids=ids,
            max_rank=bank.max_rank,
            residual=residual,
            activation=self.activation,
        )

    def extra_repr(self) -> str:
        """``nn.Linear``'s text, with the ranks of the live adapters."""
        ranks = f", ranks={list(self._bank.ranks)}" if self._bank is not None else ""
        return super().extra_repr() + ranks


class LoraPointwiseConv1d(AdapterHost, nn.Conv1d):
    """``nn.Conv1d`` of kernel size 1 whose sequences may each use another adapter.

    A pointwise convolution is a linear layer over [batch, channels, frames]. Without a bank, or
    outside of ``use_adapters()``, it computes exactly what ``nn.Conv1d`` computes.
    """

    @property
    def adapter_features(self) -> tuple[int, int]:
        """(input channels, output channels)."""
        return self.in_channels, self.out_channels

    @property
    def adapter_device(self) -> torch.device:
        """Where the weight lives."""
        return self.weight.device

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Convolve [batch, in_channels, frames] (or [in_channels, frames]).

        Returns
        -------
        torch.Tensor
            [batch, out_channels, frames].
        """
        registry = self._registry
        selection = None if registry is None else ACTIVE_SELECTION.get()
        if registry is None or selection is None:
            return super().forward(input)
        batch = input.shape[0] if input.dim() == 3 else 1
        ids = selection.ids(registry, input, batch)
        bank = self.bank_for(selection)
        if bank is None or ids is None:
            return super().forward(input)
        y = ops.lora_linear(
            input.transpose(-1, -2),
            self.weight.squeeze(-1),
            self.bias,
            lora_a=bank.lora_a,
            lora_b=bank.lora_b,
            scales=bank.scales,
            offsets=bank.offsets,
            adapter_ids=ids,
            max_rank=bank.max_rank,
        )
        return y.transpose(-1, -2)


def is_pointwise(module: nn.Module) -> bool:
    """Whether a convolution is a linear layer over channels: kernel 1, stride 1, no groups."""
    return (
        isinstance(module, nn.Conv1d)
        and module.kernel_size == (1,)
        and module.stride == (1,)
        and module.padding in ((0,), "valid", "same")
        and module.groups == 1
    )


def specialise(module: nn.Module) -> bool:
    """Turn a plain ``nn.Linear`` or pointwise ``nn.Conv1d`` into its counterpart, in place.

    The object stays the same (parameters, hooks and references to it remain valid); only its
    class changes.

    Returns
    -------
    bool
        Whether the module is of one of the two kinds.
    """
    if type(module) is nn.Linear:
        module.__class__ = LoraLinear
    elif type(module) is nn.Conv1d and is_pointwise(module):
        module.__class__ = LoraPointwiseConv1d
    else:
        return False
    module.__dict__["_specialised"] = True
    return True


def generalise(module: nn.Module) -> bool:
    """Undo :func:`specialise`; live adapters of the module are dropped.

    Returns
    -------
    bool
        Whether the module had been specialised (one built as LoraLinear stays what it is).
    """
    if not module.__dict__.pop("_specialised", False):
        return False
    base: Any = nn.Linear if isinstance(module, LoraLinear) else nn.Conv1d
    for name in ("_bank", "_registry"):
        module.__dict__.pop(name, None)
    module.__class__ = base
    return True
