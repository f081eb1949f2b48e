"""Results that are cheaper to make again than to keep for the backward pass.

A LayerNorm keeps its input for its own gradient, and so does an activation. The product that
follows would keep the output beside it, as large again. :func:`remember` notes on the output how
it was made; an operator that finds the note keeps the input, which is kept anyway, and makes the
output again when its gradient is wanted: one elementwise pass for as much memory as the tensor
takes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

_NOTE = "_lora_kernels_origin"


class Origin(NamedTuple):
    """What makes a tensor again: ``make(source)`` gives the same bits."""

    make: Callable[[torch.Tensor], torch.Tensor]
    source: torch.Tensor
    version: int  # of the tensor that carries the note: a change in place voids it


def remember(
    result: torch.Tensor, make: Callable[[torch.Tensor], torch.Tensor], source: torch.Tensor
) -> None:
    """Note on ``result`` that ``make(source)`` gives it again, and that ``source`` is kept anyway.

    The caller vouches for both. The note lives as long as the tensor object and goes to no view
    or copy of it.
    """
    setattr(result, _NOTE, Origin(make, source, result._version))


def origin(tensor: torch.Tensor) -> Origin | None:
    """The note that a tensor carries, if it still holds."""
    note: Origin | None = getattr(tensor, _NOTE, None)
    return note if note is not None and note.version == tensor._version else None
