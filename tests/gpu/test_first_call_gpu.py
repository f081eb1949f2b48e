"""A CUDA graph captures the very first call of each kernel in a process: nothing is made at it.

A process of its own, since whatever an earlier test has called is no first call here.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lora_kernels.ops._dispatch import has_cuda

pytestmark = pytest.mark.skipif(
    not has_cuda(torch.ops.lora_kernels.lora_linear.default) or not torch.cuda.is_available(),
    reason="no GPU, or a library without CUDA kernels",
)

# Cases of the suite whose operands are made without a call of the kernels that are captured.
CASES = [
    "decode-1x1280x5120",
    "4096x1280x1280",
    "mixed-32-adapters-1280x1280",
    "int8-1x1280x5120",
    "int8-4096x1280x5120",
    "kv-pack",
    "kv-self",
    "kv-cross",
    "kv-cross-int8",
    "kv-relative-16",
]


def capture(names: list[str]) -> None:
    """Capture each call unprepared; a replay gives what an ordinary call does afterwards."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from benchmarks.gpu_suite.machine import main_dtype
    from benchmarks.gpu_suite.measure import all_cases

    cases = {case.name: case for case in all_cases(main_dtype())}
    with torch.no_grad():
        for name in names:
            function = cases[name].contestants(cases[name], "cuda")["ours"].prepare()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = function()
            graph.replay()
            for got, want in zip(tensors(captured), tensors(function()), strict=True):
                assert torch.equal(got, want), name
            print("captured", name)


def tensors(result: object) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)  # type: ignore[call-overload]


def test_the_very_first_call_is_captured() -> None:
    command = [sys.executable, str(Path(__file__).resolve()), *CASES]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.split() == [word for name in CASES for word in ("captured", name)]


if __name__ == "__main__":
    capture(sys.argv[1:])
