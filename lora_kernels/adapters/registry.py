"""Names of a model's live adapters, and which of them the current call uses."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from ..errors import AdapterError, describe_nearest
from .adapter import Adapter

# Every living registry, so that use_adapters() can refuse an unknown name at once: a layer
# without adapters never looks at the selection, and a typing error would pass in silence.
_REGISTRIES: weakref.WeakSet[AdapterRegistry] = weakref.WeakSet()


class AdapterRegistry:
    """The live adapters of one model: name to index, the same index in every layer.

    One tensor of indices serves all layers; a layer that an adapter does not target has rank 0
    at its index.

    Attributes
    ----------
    version
        Grows with every change; selections resolved under an older version resolve again.
    """

    def __init__(self) -> None:
        self._index: dict[str, int] = {}
        self._slots: list[Adapter | None] = []
        self.version = 0
        _REGISTRIES.add(self)

    def __getstate__(self) -> tuple[dict[str, int], list[Adapter | None], int]:
        return (self._index, self._slots, self.version)

    def __setstate__(self, state: tuple[dict[str, int], list[Adapter | None], int]) -> None:
        self._index, self._slots, self.version = state
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
        self.version += 1
        return index

    def pop(self, name: str) -> Adapter:
        """Remove an adapter; its index becomes free. Raises like :meth:`index`."""
        adapter = self.get(name)
        self._slots[self._index.pop(name)] = None
        self.version += 1
        return adapter


def unknown_name_text(name: str, known: dict[str, int] | set[str]) -> str:
    """Error text for an adapter name that nobody loaded."""
    listed = ", ".join(map(repr, sorted(known))) or "none"
    nearest = f"; {describe_nearest(name, known)}" if len(known) > 8 else ""
    return (
        f"adapter name: expected a loaded adapter, got {name!r}; loaded: {listed}{nearest}; "
        f"load it first with load_adapter(model, folder, name={name!r})"
    )


class AdapterSelection:
    """The adapters of one call: one name (or None for the base) per utterance of the batch."""

    __slots__ = ("_resolved", "again", "names")

    def __init__(self, names: Sequence[str | None]) -> None:
        self.names = tuple(names)
        # Rows that a generation loop wants to decode again; see integrations.whisper_generation.
        self.again: list[int] = []
        self._resolved: tuple[
            AdapterRegistry | None, int, torch.device | None, torch.Tensor | None
        ] = (None, -1, None, None)

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
        owner, version, device, ids = self._resolved
        if owner is not registry or version != registry.version or device != x.device:
            indices = [-1 if name is None else registry.index(name) for name in self.names]
            ids = None
            if any(index >= 0 for index in indices):
                ids = torch.tensor(indices, dtype=torch.int32, device=x.device)
            self._resolved = (registry, registry.version, x.device, ids)
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
