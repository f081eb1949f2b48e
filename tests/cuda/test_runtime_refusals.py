"""What the library says where the CUDA runtime refuses, with a runtime of the test's own."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from emulated import ROOT, TOOLKIT, missing


@pytest.mark.skipif(bool(missing()), reason=missing())
def test_devices_that_say_little_and_launches_without_machine_code(tmp_path: Path) -> None:
    program = tmp_path / "cuda_runtime_test"
    command = ["g++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fsanitize=undefined"]
    command += [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}"]
    command += ["-isystem", str(TOOLKIT / "include")]
    command += ['-DLORA_KERNELS_CUDA_ARCHITECTURES="75-real/80"', "-o", str(program)]
    command += [str(ROOT / "tests" / "cpp" / "cuda_runtime_test.cpp")]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]
    run = subprocess.run([program], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
    assert "all checks passed" in run.stdout
