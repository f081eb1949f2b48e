"""What an operator hands to the suite: cases, their contestants, and the figures they must reach.

A new operator adds one file, ``benchmarks/gpu_suite/cases/<operator>.py``, with two functions:

``cases(dtype) -> list[Case]``
    its shapes, and what is to be reached at each;
``every_kernel(dtypes) -> None``
    each of its kernels once, small: what compute-sanitizer watches.

Its tests are ``tests/gpu/test_<operator>_gpu.py``. Nothing else is to be changed: both are found by
their names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Function = Callable[[], object]


@dataclass(frozen=True)
class Aim:
    """One figure to reach.

    ``time`` and ``peak_bytes`` are ours over a contestant's, at most ``limit``; ``bandwidth`` is
    the case's bytes over our time, as a fraction of what a copy reaches, at least ``limit``.
    """

    figure: str  # "time", "peak_bytes" or "bandwidth"
    limit: float
    against: str = ""  # a contestant; none for the bandwidth

    def __str__(self) -> str:
        if self.figure == "bandwidth":
            return f"at least {100 * self.limit:.0f} % of memory bandwidth"
        return f"{self.figure} at most {self.limit:.2f} of {self.against}"

    def value(self, result: Mapping[str, Any]) -> float | None:
        """The figure in a case's result; None where the contestant was not measured."""
        if self.figure == "bandwidth":
            return result["bandwidth_fraction"]
        values = result["p50_us" if self.figure == "time" else "peak_bytes"]
        if self.against not in values or "ours" not in values:
            return None
        return values["ours"] / values[self.against]

    def judge(self, result: Mapping[str, Any]) -> dict[str, Any]:
        value = self.value(result)
        at_least = self.figure == "bandwidth"
        reached = None
        if value is not None:
            reached = value >= self.limit if at_least else value <= self.limit
        return {"aim": str(self), "value": value, "reached": reached}


@dataclass(frozen=True)
class Contestant:
    """How a rival is prepared; what is prepared is what is timed."""

    prepare: Callable[[], Function]
    compiled: bool = False  # by torch.compile: left out where there is no time for that
    absent: str = ""  # why it is left out on this machine


@dataclass(frozen=True)
class Case:
    """One shape of one operator."""

    name: str
    shape: Mapping[str, int]  # sizes by name; a dry run makes them small
    dtype: torch.dtype
    # The fewest bytes and the operations, by the case's shape.
    work: Callable[[Case], tuple[float, float]]
    # Contestants by name on a device, "ours" among them.
    contestants: Callable[[Case, str], dict[str, Contestant]]
    aims: tuple[Aim, ...] = ()
    graphs: bool = False  # as decoders call it: every contestant but the compiled is a CUDA graph
    grad: bool = False  # the contestants take gradients; their peak memory is measured
