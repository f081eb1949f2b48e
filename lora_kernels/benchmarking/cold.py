"""Weights out of cache: calls that cycle over so many copies that each is met cold."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import torch

COLD_BYTES = 96 * 2**20
"""Weights are cycled over copies of this many bytes in all, so that a decoding step finds them out
of cache, as it does in a model; hot weights flatter a library three to five times."""


def copies(bytes_each: int) -> int:
    """How many copies of a weight put it out of cache."""
    return max(2, min(256, COLD_BYTES // bytes_each + 1))


def cycling(function: Callable[..., Any], operands: list[tuple]) -> Callable[[], Any]:
    """Call ``function`` with the next operands, round and round.

    Every contestant gets a copy of the tensors and modules: with shared memory whoever comes soon
    after another would find in the cache what that one has just read.
    """
    turn = itertools.cycle([tuple(_own(item) for item in group) for group in operands])
    return lambda: function(*next(turn))


def _own(item: Any) -> Any:
    if isinstance(item, torch.Tensor):
        return item.detach().clone() if item.layout is torch.strided else item
    return copy.deepcopy(item) if isinstance(item, torch.nn.Module) else item
