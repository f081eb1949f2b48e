"""Which implementations of the operators exist here, and forcing one of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from .errors import LoraKernelsError
from .ops import _library as _library


@dataclass(frozen=True)
class Implementation:
    """A row of the table of implementations.

    Attributes
    ----------
    op, name
        For example "lora_linear" and "avx512".
    available
        Whether this CPU has what it needs; ``reason`` says what is missing.
    selected
        Whether calls take it now.
    runs
        How often it has run in this process.
    """

    op: str
    name: str
    available: bool
    selected: bool
    runs: int
    reason: str


@dataclass(frozen=True)
class Build:
    """How the compiled library was built; ``without_cuda`` is empty if CUDA kernels are in it."""

    compiler: str
    build_type: str
    without_cuda: str
    instruction_sets: tuple[str, ...]


def describe() -> tuple[Build, list[Implementation]]:
    """Return the build, and every implementation in order of preference."""
    rows: list[Implementation] = []
    build, isa = ("", "", ""), ""
    for line in torch.ops.lora_kernels.describe_implementations().splitlines():
        head, *fields = line.split("\t")
        if head == "isa":
            isa = fields[0]
        elif head == "build":
            build = (fields[0], fields[1], fields[2])
        else:
            name, available, selected, runs, reason = fields
            rows.append(
                Implementation(head, name, available == "1", selected == "1", int(runs), reason)
            )
    return Build(*build, tuple(isa.split())), rows


@contextmanager
def force_implementation(name: str) -> Iterator[None]:
    """Force every operator to one implementation inside a ``with`` block.

    The environment variable ``LORA_KERNELS_FORCE`` does the same for a whole process.

    Parameters
    ----------
    name
        "generic", "avx2", "avx2_vnni", "avx512", "amx" or "cuda". An operator without a row
        "avx2_vnni" or "amx" takes "avx2" or "avx512" for it. Operands on another kind of device
        than the name's are refused.

    Raises
    ------
    LoraKernelsError
        If there is no such implementation, or this CPU cannot run it; never a silent fallback.
    """
    _, rows = describe()
    known = {row.name for row in rows}
    if name not in known:
        raise LoraKernelsError(
            f"name: expected one of {', '.join(sorted(known))}, got {name!r}; "
            "see `python -m lora_kernels.environment`"
        )
    missing = {f"{row.op}: {row.reason}" for row in rows if row.name == name and not row.available}
    if missing:
        raise LoraKernelsError(
            f"name: {name!r} cannot run here ({'; '.join(sorted(missing))}); force another one"
        )
    before = torch.ops.lora_kernels.forced_implementation()
    torch.ops.lora_kernels.force_implementation(name)
    try:
        yield
    finally:
        torch.ops.lora_kernels.force_implementation(before)


def allow_tf32(allow: bool) -> None:
    """Let CUDA kernels round fp32 to tf32 (10 bits): one product in place of three.

    False to begin with, as ``torch.backends.cuda.matmul.allow_tf32`` is: products then keep the
    precision of fp32. It holds for the whole process and does nothing on CPUs.
    """
    torch.ops.lora_kernels.allow_tf32(bool(allow))
