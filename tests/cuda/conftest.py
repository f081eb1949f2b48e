"""The library with its CUDA kernels, built once for all tests that take it."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from emulated import ROOT, TOOLKIT

NVCC = shutil.which("nvcc") or shutil.which("nvcc", path=str(TOOLKIT / "bin"))


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both bindings, with the kernels of one architecture and one type."""
    if NVCC is None or shutil.which("cmake") is None:
        pytest.skip("nvcc or cmake is not installed")
    include = Path(sysconfig.get_paths()["include"], "Python.h")
    raw = "ON" if include.is_file() else "OFF"
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = Path(os.environ.get("LORA_KERNELS_CUDA_BUILD") or shared / "cuda")
    folder.mkdir(parents=True, exist_ok=True)
    configure = ["cmake", "-S", ROOT, "-B", folder, "-DLORA_KERNELS_CUDA=ON"]
    configure += ["-DCMAKE_CUDA_ARCHITECTURES=80-real", f"-DCMAKE_CUDA_COMPILER={NVCC}"]
    # No kernel runs here; as shipped they take four times as long (`make cuda-check`).
    configure += ["-DCMAKE_CUDA_FLAGS=-Xcicc -O0 -Xptxas -O0"]
    configure += ["-DLORA_KERNELS_TYPES=f16", "-DLORA_KERNELS_OPTIMIZATION=-O0"]
    configure += [f"-DLORA_KERNELS_RAW={raw}", f"-DPython_EXECUTABLE={sys.executable}"]
    configure += [f"-DLORA_KERNELS_TORCH={torch.__path__[0]}"]
    configure += ["-G", "Ninja"] if shutil.which("ninja") else []
    jobs = os.environ.get("MAX_JOBS", "2")
    with open(folder / ".lock", "w") as lock:  # workers side by side build it once
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (configure, ["cmake", "--build", folder, "-j", jobs]):
            run = subprocess.run(command, capture_output=True, text=True)
            assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-2000:]
    return folder
