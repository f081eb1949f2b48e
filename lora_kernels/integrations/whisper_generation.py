"""Adapters per utterance while Whisper's ``generate()`` shrinks its batch.

``generate()`` drops utterances that have ended from the batch and repeats those that need another
temperature, so that row i no longer is utterance i. Two methods of the model tell which rows
remain; their instance wrappers narrow the selection of ``use_adapters()`` to them.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import nn

from ..adapters.registry import ACTIVE_SELECTION, AdapterSelection

_METHODS = ("generate_with_fallback", "_need_fallback")


def narrowed(selection: AdapterSelection, batch: int, rows: list[int]) -> AdapterSelection | None:
    """The selection of some rows of a batch of ``batch`` utterances.

    None when the names do not divide the batch: the layers then explain the error.
    """
    if batch % len(selection.names):
        return None
    repeats = batch // len(selection.names)
    return AdapterSelection([selection.names[row // repeats] for row in rows], selection.pins)


def _generate_with_fallback(self: Any, *args: Any, **kwargs: Any) -> Any:
    selection = ACTIVE_SELECTION.get()
    rows, seek = kwargs.get("batch_idx_map"), kwargs.get("seek")
    original = type(self).generate_with_fallback
    if selection is None or len(selection.names) == 1 or rows is None or seek is None:
        return original(self, *args, **kwargs)
    current = narrowed(selection, len(seek), [int(row) for row in rows])
    token = ACTIVE_SELECTION.set(current or selection)
    try:
        return original(self, *args, **kwargs)
    finally:
        ACTIVE_SELECTION.reset(token)


def _need_fallback(
    self: Any, seek_sequence: Any, seek_outputs: Any, index: int, *args: Any, **kwargs: Any
) -> Any:
    result = type(self)._need_fallback(self, seek_sequence, seek_outputs, index, *args, **kwargs)
    selection = ACTIVE_SELECTION.get()
    if selection is not None and len(selection.names) > 1:
        # Called once per row in order; after the last row the next temperature begins with the
        # rows that need it. The wrapper of generate_with_fallback restores the selection.
        again = selection.again if index else []
        selection.again = [*again, index] if result[0] else again
        if index == len(selection.names) - 1 and selection.again:
            names = [selection.names[row] for row in selection.again]
            ACTIVE_SELECTION.set(AdapterSelection(names, selection.pins))
    return result


# A pickled instance finds its methods by these names: Whisper's own, until an adapter is added.
_generate_with_fallback.__name__, _need_fallback.__name__ = _METHODS


def _follows(module: nn.Module) -> bool:
    method = module.__dict__.get("generate_with_fallback")
    return getattr(method, "__func__", None) is _generate_with_fallback


def follow_rows(model: nn.Module) -> None:
    """Install the wrappers on every Whisper generation model in ``model``."""
    for module in model.modules():
        if not _follows(module) and all(hasattr(type(module), m) for m in _METHODS):
            module.__dict__["generate_with_fallback"] = MethodType(_generate_with_fallback, module)
            module.__dict__["_need_fallback"] = MethodType(_need_fallback, module)


def unfollow_rows(model: nn.Module) -> None:
    """Remove the wrappers."""
    for module in model.modules():
        if _follows(module):
            for method in _METHODS:
                module.__dict__.pop(method, None)
