"""Names of a model's live adapters, and which of them the current call uses."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import nn

from ..errors import AdapterError, describe_nearest
from .adapter import Adapter
from .bank import AdapterBank

# Every living registry, so that use_adapters() can refuse an unknown name at once: a layer
# without adapters never looks at the selection, and a typing error would pass in silence.
_REGISTRIES: weakref.WeakSet[AdapterRegistry] = weakref.WeakSet()


class AdapterRegistry:
    """The live adapters of one model: name to index, the same index in every layer.

    One tensor of indices serves all layers; a layer that an adapter does not target has rank 0
    at its index. Whoever is using the adapters while they change goes on with those there were:
    see :class:`Pins`.
    """

    def __init__(self) -> None:
        self.__setstate__(({}, []))

    def __getstate__(self) -> tuple[dict[str, int], list[Adapter | None]]:
        return (self._index, self._slots)

    def __setstate__(self, state: tuple[dict[str, int], list[Adapter | None]]) -> None:
        self._index, self._slots = state
        # Held for moments: while names are looked up once, and while finished banks are put in.
        self._lock = threading.Lock()
        self._pins: weakref.WeakSet[Pins] = weakref.WeakSet()
        _REGISTRIES.add(self)

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, name: object) -> bool:
        return name in self._index

    @property
    def names(self) -> tuple[str, ...]:
        """Names in the order in which they were first added."""
        return tuple(self._index)

    @property
    def capacity(self) -> int:
        """Number of indices, free ones included: the n of every bank."""
        return len(self._slots)

    def index(self, name: str) -> int:
        """Index of a name.

        Raises
        ------
        AdapterError
            If the name is unknown; the text lists the known ones.
        """
        try:
            return self._index[name]
        except KeyError:
            raise AdapterError(unknown_name_text(name, self._index)) from None

    def get(self, name: str) -> Adapter:
        """The adapter of a name; raises like :meth:`index`."""
        adapter = self._slots[self.index(name)]
        assert adapter is not None, "a named index always holds an adapter"
        return adapter

    def free_index(self, name: str) -> int:
        """Where an adapter of this name goes: its own index, a free one, or a new one."""
        if name in self._index:
            return self._index[name]
        for index, adapter in enumerate(self._slots):
            if adapter is None:
                return index
        return len(self._slots)

    def put(self, name: str, adapter: Adapter) -> int:
        """Add or replace an adapter and return its index."""
        index = self.free_index(name)
        if index == len(self._slots):
            self._slots.append(None)
        self._slots[index] = adapter
        self._index[name] = index
        return index

    def pop(self, name: str) -> Adapter:
        """Remove an adapter; its index becomes free. Raises like :meth:`index`."""
        adapter = self.get(name)
        self._slots[self._index.pop(name)] = None
        return adapter

    def pin(self, pins: Pins) -> Mapping[str, int]:
        """Indices by name as they are now; later changes tell ``pins`` what they replace."""
        with self._lock:
            self._pins.add(pins)
            return dict(self._index)

    @contextmanager
    def changing(self, modules: Sequence[tuple[nn.Module, AdapterBank | None]]) -> Iterator[bool]:
        """Hold off new users for the moment in which new banks are put in place.

        Parameters
        ----------
        modules
            Each that will get another bank, and the one that it has.

        Yields
        ------
        bool
            Whether somebody goes on with the old ones.
        """
        with self._lock:
            users = [pins for pins in self._pins if pins.keep(self, modules)]
            yield bool(users)


class Pins:
    """The adapters that a block of ``use_adapters()`` works with, model by model.

    They are those that a model had when the block first used it. What another thread loads,
    replaces or removes meanwhile is seen by the next block; what the block's own thread does, at
    once. Old banks live as long as a block that uses them.
    """

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        self._indices: dict[AdapterRegistry, Mapping[str, int]] = {}
        self._kept: dict[nn.Module, tuple[AdapterRegistry, AdapterBank | None]] = {}

    def indices(self, registry: AdapterRegistry) -> Mapping[str, int]:
        """Index by name: the same object until the block's own thread changes something."""
        found = self._indices.get(registry)
        if found is None:
            found = self._indices[registry] = registry.pin(self)
        return found

    def bank(self, module: nn.Module, current: AdapterBank | None) -> AdapterBank | None:
        """The bank of a module whose bank was ``current`` just before this call."""
        kept = self._kept.get(module)
        return current if kept is None else kept[1]

    def keep(
        self, registry: AdapterRegistry, modules: Sequence[tuple[nn.Module, AdapterBank | None]]
    ) -> bool:
        """Go on with banks that are about to be replaced, unless by the block's own thread."""
        if self._thread == threading.get_ident():
            self._indices.pop(registry, None)
            self._kept = {m: kept for m, kept in self._kept.items() if kept[0] is not registry}
            return False
        for module, bank in modules:
            self._kept.setdefault(module, (registry, bank))
        return True


def unknown_name_text(name: str, known: Mapping[str, int] | set[str]) -> str:
    """Error text for an adapter name that nobody loaded."""
    listed = ", ".join(map(repr, sorted(known))) or "none"
    nearest = f"; {describe_nearest(name, known)}" if len(known) > 8 else ""
    return (
        f"adapter name: expected a loaded adapter, got {name!r}; loaded: {listed}{nearest}; "
        f"load it first with load_adapter(model, folder, name={name!r})"
    )


class AdapterSelection:
    """The adapters of one call: one name (or None for the base) per utterance of the batch.

    Parameters
    ----------
    names
        One for all utterances, or one per utterance.
    pins
        Those of the selection that this one is a part of; None: a selection of its own.
    """

    __slots__ = ("_resolved", "again", "names", "pins")

    def __init__(self, names: Sequence[str | None], pins: Pins | None = None) -> None:
        self.names = tuple(names)
        self.pins = pins or Pins()
        # Rows that a generation loop wants to decode again; see integrations.whisper_generation.
        self.again: list[int] = []
        self._resolved: tuple[
            Mapping[str, int] | None, torch.device | None, torch.Tensor | None
        ] = (None, None, None)

    def ids(self, registry: AdapterRegistry, x: torch.Tensor, batch: int) -> torch.Tensor | None:
        """int32 indices for the rows of ``x``, or None when every utterance uses the base.

        Parameters
        ----------
        registry
            Whose names to resolve.
        x
            The layer's input (for its device).
        batch
            Number of sequences in ``x``: a multiple of the number of names, because beam search
            repeats each utterance.

        Raises
        ------
        AdapterError
            For an unknown name, or a batch that the names do not divide.
        """
        known = self.pins.indices(registry)
        resolved, device, ids = self._resolved
        if resolved is not known or device != x.device:
            missing = next((n for n in self.names if n is not None and n not in known), None)
            if missing is not None:
                raise AdapterError(unknown_name_text(missing, known))
            indices = [-1 if name is None else known[name] for name in self.names]
            ids = None
            if any(index >= 0 for index in indices):
                ids = torch.tensor(indices, dtype=torch.int32, device=x.device)
            self._resolved = (known, x.device, ids)
        if batch % len(self.names):
            raise AdapterError(
                f"adapters: expected a batch that is a multiple of the {len(self.names)} names "
                f"given to use_adapters(), got {batch}; give one name (or None) per utterance; if "
                "this layer's input is the same for all utterances (relative positions), leave the "
                "layer out of the adapters or use one name for the whole batch"
            )
        return ids


ACTIVE_SELECTION: ContextVar[AdapterSelection | None] = ContextVar(
    "lora_kernels_adapters", default=None
)


@contextmanager
def use_adapters(names: str | Sequence[str | None] | None) -> Iterator[AdapterSelection]:
    """Choose the adapters for every forward pass inside the ``with`` block.

    The block works with the adapters that a model has when it first uses them: what another
    thread loads, replaces or removes meanwhile is seen by the next block.

    Parameters
    ----------
    names
        One name for the whole batch, or one name (None: the base alone) per utterance; None: the
        base for all. The batch of a layer may be a multiple of the number of names, because beam
        search repeats each utterance.

    Yields
    ------
    AdapterSelection

    Raises
    ------
    AdapterError
        If a name is not loaded in any model, listing those that are. Outside of a block every
        row uses the base alone.
    """
    chosen = (names,) if names is None or isinstance(names, str) else tuple(names)
    if not chosen:
        raise AdapterError(
            "names: expected one name (or None) per utterance, got an empty list; pass None to use "
            "the base for the whole batch"
        )
    known = {name for registry in _REGISTRIES for name in registry.names}
    for name in chosen:
        if name is not None and name not in known:
            raise AdapterError(unknown_name_text(name, known))
    selection = AdapterSelection(chosen)
    token = ACTIVE_SELECTION.set(selection)
    try:
        yield selection
    finally:
        ACTIVE_SELECTION.reset(token)
