"""What an operator hands to the suite: cases, their contestants, and the figures they must reach.

A new operator adds one file, ``benchmarks/gpu_suite/cases/<operator>.py``, with two functions:

``cases(dtype) -> list[Case]``
    its shapes, and what is to be reached at each;
``every_kernel(dtypes, device) -> None``
    each of its kernels once, small: what compute-sanitizer watches.

Its tests are ``tests/gpu/test_<operator>_gpu.py``. Nothing else is to be changed: both are found by
their names.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Function = Callable[[], object]


# What torch.compile takes with a cold cache, in seconds, until one was measured: by contestant.
COMPILE_S = {
    "peft_compiled": 40.0,  # a layer, forward and backward
    "weight_only_compiled": 20.0,
    "torchao_compiled": 40.0,
    "static_compiled": 120.0,  # a decoder of 32 layers
}
# Figures that have to be at least as large as their limit, as a part of this; others: at most.
_AT_LEAST = {"bandwidth": "memory bandwidth", "roofline": "the roofline"}


@dataclass(frozen=True)
class Aim:
    """One figure to reach.

    ``time`` and ``peak_bytes`` are ours over a contestant's, at most ``limit``; ``time_of_bytes``
    is our time over that of the case's bytes at the speed of a copy, at most ``limit``;
    ``bandwidth`` is the inverse of it, and ``roofline`` the roofline's time over ours, at least
    ``limit``.
    """

    figure: str
    limit: float
    against: str = ""  # a contestant; none for what is compared with a ceiling

    def __str__(self) -> str:
        if self.figure in _AT_LEAST:
            return f"at least {100 * self.limit:.0f} % of {_AT_LEAST[self.figure]}"
        if self.figure == "time_of_bytes":
            return f"time at most {self.limit:.2f} of that of its bytes"
        return f"{self.figure} at most {self.limit:.2f} of {self.against}"

    def value(self, result: Mapping[str, Any]) -> float | None:
        """The figure in a case's result; None where the contestant was not measured."""
        if self.figure in _AT_LEAST:
            return result[f"{self.figure}_fraction"]
        if self.figure == "time_of_bytes":
            return 1 / result["bandwidth_fraction"]
        values = result["p50_us" if self.figure == "time" else "peak_bytes"]
        if self.against not in values or "ours" not in values:
            return None
        return values["ours"] / values[self.against]

    def judge(self, result: Mapping[str, Any]) -> dict[str, Any]:
        value = self.value(result)
        reached = None
        if value is not None:
            reached = value >= self.limit if self.figure in _AT_LEAST else value <= self.limit
        return {"aim": str(self), "value": value, "reached": reached}


@dataclass(frozen=True)
class Contestant:
    """How a rival is prepared; what is prepared is what is timed."""

    prepare: Callable[[], Function]
    compiled: bool = False  # by torch.compile: left out where there is no time for that
    absent: str = ""  # why it is left out on this machine; ours: the case is


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
    graphs: bool = False  # as decoders call it: every contestant is a CUDA graph
    grad: bool = False  # the contestants take gradients; their peak memory is measured
    arithmetic: str = ""  # of its operations, where that is not its dtype: "int8"
    dry: Mapping[str, int] = field(default_factory=dict)  # sizes of a dry run that have to differ
    least_s: float = 1.0  # what preparing and measuring it takes at least

    def compile_s(self, known: Mapping[str, float]) -> float:
        """What torch.compile takes for the contestants that its aims name."""
        return sum(known.get(name, 0.0) for name in {aim.against for aim in self.aims})


def in_order(cases: list[Case]) -> list[Case]:
    """The cheapest aims first, then those that wait for torch.compile; last, cases without.

    What no time is left for is then the least missed.
    """
    return sorted(cases, key=lambda case: (not case.aims, case.compile_s(COMPILE_S)))


def cannot(why: str) -> Contestant:
    """A contestant that is left out for a reason."""

    def prepare() -> Function:
        raise RuntimeError(why)

    return Contestant(prepare, absent=why)


def absent(package: str) -> str:
    """Why a contestant of this package is left out; empty where it is installed."""
    return "" if importlib.util.find_spec(package) else f"{package} is not installed"
