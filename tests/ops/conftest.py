"""Every implementation is forced in turn, and the test proves that it ran."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lora_kernels.ops import _library as _library


def table() -> list[tuple[str, str, bool, bool, int, str]]:
    """(op, name, available, selected, runs, reason) of every implementation."""
    rows = []
    for line in torch.ops.lora_kernels.describe_implementations().splitlines():
        fields = line.split("\t")
        if len(fields) == 6:
            op, name, available, selected, runs, reason = fields
            rows.append((op, name, available == "1", selected == "1", int(runs), reason))
    return rows


def runs_of(name: str) -> int:
    return sum(row[4] for row in table() if row[1] == name)


def runs_of_others(name: str) -> int:
    """Runs under other names; an operator without a row of its own runs the row it refines."""
    refined = {"avx2_vnni": "avx2", "amx": "avx512"}.get(name, name)
    return sum(row[4] for row in table() if row[1] not in (name, refined))


@pytest.fixture(params=["generic", "avx2", "avx2_vnni", "avx512", "amx"])
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Force the implementation of this name; afterwards check that it, and no other, has run."""
    name = request.param
    module = request.module.__name__
    if name == "avx2_vnni" and not any(part in module for part in ("int8", "blocked")):
        pytest.skip("only integer products have a row of this name")
    if name == "amx" and not any(part in module for part in ("linear", "int8", "blocked")):
        pytest.skip("what this computes is not computed in tiles")
    known = [row for row in table() if row[1] == name]
    if not known or not all(row[2] for row in known):
        reasons = {row[5] for row in known} or {"not built for this processor"}
        pytest.skip(f"{name}: {', '.join(sorted(reasons))}")
    before, others = runs_of(name), runs_of_others(name)
    forced = torch.ops.lora_kernels.forced_implementation()
    torch.ops.lora_kernels.force_implementation(name)
    try:
        yield name
    finally:
        torch.ops.lora_kernels.force_implementation(forced)
    assert runs_of(name) > before, f"{name} was forced but did not run"
    assert runs_of_others(name) == others, f"{name} was forced but another implementation ran"
