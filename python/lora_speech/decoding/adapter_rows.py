"""Which adapter each row of a batch that is decoded uses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from lora_speech.errors import ModelError


class AdapterRows:
    """Which adapter each row of the batch uses.

    Attributes
    ----------
    names : list of (str or None), or None
        One per row, or one for all; None where nobody chose adapters.
    ids : Tensor or None
        The same as int32 [rows] or [1], -1 for the base; None where no row has an adapter.
        Projections read it at every call.
    pins : lora_kernels.adapters.registry.Pins or None
        The adapters as they were when the rows were made: what other threads change meanwhile
        changes nothing here.
    """

    def __init__(
        self, names: list[str | None] | None, ids: torch.Tensor | None, pins: Any = None
    ) -> None:
        self.names, self.ids, self.pins = names, ids, pins

    @classmethod
    def of(cls, model: Any, adapters: str | Sequence[str | None] | None, batch: int) -> AdapterRows:
        """Rows for one call: `adapters` as `greedy_decode` takes them.

        None keeps what an enclosing `lora_kernels.use_adapters` chose.
        """
        import lora_kernels as lk
        from lora_kernels.adapters.registry import ACTIVE_SELECTION, AdapterSelection

        pins = None
        if adapters is None:
            ambient = ACTIVE_SELECTION.get()
            pins = None if ambient is None else ambient.pins
            names = None if ambient is None else list(ambient.names)
        else:
            names = [adapters] if isinstance(adapters, str) else list(adapters)
        if names is None:
            return cls(None, None)
        if (
            not names
            or batch % len(names)
            or (adapters is not None and len(names) not in (1, batch))
        ):
            raise ModelError(
                f"adapters: expected one for all rows or one (or None) per row ({batch}), got "
                f"{len(names)}; give as many as there are recordings"
            )
        if pins is None:
            with lk.use_adapters(names) as selection:  # refuses names that nobody loaded
                pins = selection.pins
        if len(names) > 1:
            names = [name for name in names for _ in range(batch // len(names))]
        registry = next(
            (r for m in model.modules() if (r := getattr(m, "_registry", None)) is not None), None
        )
        ids = None
        if registry is None and any(names):
            raise ModelError(
                f"adapters: expected adapters of this model, got {names} and it has none; load "
                "them with lora_kernels.load_adapter(model, folder, name=...)"
            )
        if registry is not None:
            ids = AdapterSelection(names, pins).ids(registry, next(model.parameters()), batch)
        return cls(names, ids, pins)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Choose the same adapters for what runs as modules, or is read from them."""
        from lora_kernels.adapters.registry import ACTIVE_SELECTION, AdapterSelection

        if self.names is None:
            yield
            return
        token = ACTIVE_SELECTION.set(AdapterSelection(self.names, self.pins))
        try:
            yield
        finally:
            ACTIVE_SELECTION.reset(token)

    def of_row(self, row: int) -> tuple[list[str | None] | None, torch.Tensor | None]:
        """Names and ids of one row alone."""
        names, ids = self.names, self.ids
        if names is not None and len(names) > 1:
            names = [names[row]]
        if ids is not None and ids.numel() > 1:
            ids = ids[row : row + 1]
        return names, ids

    def repeat(self, times: int) -> None:
        """Go on with every row `times` times, its copies side by side."""
        if self.names is not None and len(self.names) > 1:
            self.names = [name for name in self.names for _ in range(times)]
        if self.ids is not None and self.ids.numel() > 1:
            self.ids = self.ids.repeat_interleave(times)

    def keep(self, index: torch.Tensor) -> None:
        """Go on with some of the rows only."""
        if self.names is not None and len(self.names) > 1:
            self.names = [self.names[i] for i in index.tolist()]
        if self.ids is not None and self.ids.numel() > 1:
            self.ids = self.ids[index]
