"""What every module that can carry live adapters has in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import nn

from ..adapters.adapter import AdapterLayer
from ..adapters.bank import AdapterBank
from ..adapters.registry import AdapterRegistry, AdapterSelection
from ..errors import AdapterError


class AdapterHost(nn.Module):
    """Mixin of modules with an :class:`AdapterBank` and the registry that names its adapters.

    The bank is not part of the module's state: ``state_dict()`` holds the base alone, as before
    the swap. It follows the module to another device or floating-point dtype.
    """

    # Class attributes, so that a plain nn.Linear that became a LoraLinear has them too.
    _bank: AdapterBank | None = None
    _registry: AdapterRegistry | None = None

    # How banks are kept for this kind of module: the arguments of AdapterBank.pack().
    adapter_dtype: torch.dtype | None = None
    blocked_adapters: bool = False

    @property
    def bank(self) -> AdapterBank | None:
        """The adapters of this layer, or None."""
        return self._bank

    def bank_for(self, selection: AdapterSelection) -> AdapterBank | None:
        """The adapters that a selection works with; they may have been replaced since."""
        current = self._bank  # looked at first: a change keeps the old before it puts the new one
        return selection.pins.bank(self, current)

    def set_bank(
        self, bank: AdapterBank | None, registry: AdapterRegistry | None, *, in_use: bool = False
    ) -> None:
        """Replace the bank whole; None removes it.

        Parameters
        ----------
        bank
            The new one.
        registry
            What names its adapters.
        in_use
            Whether someone goes on with the one that is removed, and has to be asked.

        Raises
        ------
        AdapterError
            If the bank's sizes are not those of the module.
        """
        if bank is not None:
            expected = self.adapter_features
            got = (bank.lora_a.shape[1], bank.out_features)
            if got != expected:
                raise AdapterError(
                    f"bank: expected adapters of {expected} (inputs, outputs), got {got}; pack it "
                    "for this module"
                )
        self._bank = bank
        self._registry = registry if bank is not None or in_use else None

    def pack_bank(self, layers: Sequence[AdapterLayer | None]) -> AdapterBank:
        """A bank as this module keeps it; see :meth:`AdapterBank.pack`."""
        return AdapterBank.pack(
            layers,
            *self.adapter_features,
            dtype=self.adapter_dtype,
            blocked=self.blocked_adapters,
            device=self.adapter_device,
        )

    def bank_with(self, index: int, layer: AdapterLayer | None, count: int) -> AdapterBank:
        """The module's bank with another adapter at an index, and room for ``count`` indices."""
        bank = self._bank or self.pack_bank([])
        appended = index >= bank.count
        if appended and layer is not None and self.adapter_dtype is None:
            # Appending keeps the dtype: packing finds the smallest that holds them all.
            kept = torch.promote_types(bank.lora_a.dtype, layer.lora_a.dtype)
            appended = bank.total_rank > 0 and kept == bank.lora_a.dtype
        if not appended:
            layers = bank.unpack()
            layers.extend([None] * (count - len(layers)))
            layers[index] = layer
            return self.pack_bank(layers)
        for place in range(bank.count, count):
            bank = bank.append(layer if place == index else None)
        return bank

    @property
    def adapter_features(self) -> tuple[int, int]:
        """(K, N) that an adapter of this module has."""
        return cast(int, self.in_features), cast(int, self.out_features)

    @property
    def adapter_device(self) -> torch.device:
        """Where the module's weights live."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        result = super()._apply(fn, *args, **kwargs)  # type: ignore[no-untyped-call]
        bank = self._bank
        if bank is not None:
            # fn casts floating tensors, and scales must stay fp32: only A and B go through it, and
            # keep their dtype where this kind of module has one for them.
            lora_a, lora_b = (
                fn(factor) if self.adapter_dtype is None else factor.to(fn(factor[:0]).device)
                for factor in (bank.lora_a, bank.lora_b)
            )
            self._bank = AdapterBank(
                lora_a,
                lora_b,
                bank.offsets.to(lora_a.device),
                bank.scales.to(lora_a.device),
                bank.ranks,
                bank.out_features,
            )
        return result


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The dtype that autocast gives matrix products on the device of ``x``, or None."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
