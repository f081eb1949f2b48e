"""The library with its CUDA kernels compiles and loads where torch is a CPU build."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(1800)  # whoever comes first builds the whole library

# For machines without a GPU, or from which CUDA_VISIBLE_DEVICES hides it.
LOADED = """
import sys, torch, lora_kernels as lk
from lora_kernels import implementations, ops
build, rows = implementations.describe()
assert build.without_cuda == "", build.without_cuda
has = torch._C._dispatch_has_kernel_for_dispatch_key
assert has("lora_kernels::lora_linear", "CUDA")
assert has("lora_kernels::lora_linear_backward", "CUDA")
assert ops.Composite.runs_on(torch.device("cuda"))
row = next(r for r in rows if r.op == "lora_linear" and r.name == "cuda")
assert not row.available and "could not be asked" in row.reason, row  # there is no driver here
x, w = torch.randn(3, 5), torch.randn(4, 5)
assert torch.allclose(ops.lora_linear(x, w), x @ w.T, atol=1e-5)
assert not torch.cuda.is_initialized()
print("loaded")
"""


@pytest.mark.slow
def test_the_library_loads_without_a_gpu(built: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", LOADED],
        env=os.environ
        | {"LORA_KERNELS_LIBRARY": str(built / "_torch.so"), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "loaded" in run.stdout


@pytest.mark.slow
def test_the_library_knows_what_it_was_built_for(built: Path) -> None:
    """What a launch that finds no machine code says (test_runtime_refusals.py)."""
    assert b"built with CMAKE_CUDA_ARCHITECTURES=80-real\0" in (built / "_torch.so").read_bytes()
