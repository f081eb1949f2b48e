"""What a planted fault is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """A change of one place in csrc/cuda, and the words by which it must be found.

    ``operator`` is the part of run_shapes.py that meets it.
    """

    operator: str
    name: str
    file: str
    before: str
    after: str
    words: tuple[str, ...]
    sanitized: bool = False
