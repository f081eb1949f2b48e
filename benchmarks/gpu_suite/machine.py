"""The GPU as it says of itself, and the two ceilings that it reaches here."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .timing import median_us

_QUERY = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,temperature.gpu"


def _output(command: list[str]) -> str:
    """What a program prints; empty where it is absent, fails or takes too long."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return run.stdout.strip() if run.returncode == 0 else ""


def nvidia_smi() -> dict[str, str]:
    """Name, driver, clocks, power and temperature at this moment; empty without nvidia-smi."""
    text = _output(["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader", "-i", "0"])
    values = [part.strip() for part in text.split(",")]
    return dict(zip(_QUERY.split(","), values, strict=False)) if text else {}


def versions() -> dict[str, str | None]:
    """Of everything whose speed or code is compared."""
    release = re.search(r"release ([\d.]+)", _output(["nvcc", "--version"]))
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "nvcc": release[1] if release else None,
        "commit": _output(["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]) or None,
    }
    for package in ("torch", "triton", "peft"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


@dataclass(frozen=True)
class Ceilings:
    """Measured, not from a data sheet: bytes per second of a copy, FLOP per second of cuBLAS."""

    bytes_per_second: float
    flops: dict[str, float]

    def roofline_us(self, bytes_moved: float, operations: float, dtype: torch.dtype) -> float:
        """The time that neither memory nor arithmetic could beat, in µs."""
        name = str(dtype)[6:]
        return 1e6 * max(bytes_moved / self.bytes_per_second, operations / self.flops[name])


def dtypes() -> list[torch.dtype]:
    """What this GPU's tensor cores multiply."""
    if torch.cuda.get_device_capability() < (8, 0):
        return [torch.float16]
    return [torch.float16, torch.bfloat16, torch.float32]


def _copy_bytes_per_second() -> float:
    free, _ = torch.cuda.mem_get_info()
    count = min(2**30, free // 8)
    source = torch.empty(count, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * count / median_us(lambda: target.copy_(source), seconds=0.5) * 1e6


def measure_ceilings(kinds: list[torch.dtype]) -> Ceilings:
    """A copy of 1 GB, counted twice (read and written), and products of 8,192 cubed."""
    moved = _copy_bytes_per_second()
    flops = {}
    for dtype in kinds:
        size = 8192 if dtype != torch.float32 else 4096
        a, b = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(2))
        flops[str(dtype)[6:]] = 2.0 * size**3 / median_us(lambda a=a, b=b: a @ b, seconds=0.5) * 1e6
    return Ceilings(moved, flops)


def facts() -> dict[str, Any]:
    """What a reader of the results has to know of the machine."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "architecture": f"sm_{properties.major}{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "nvidia_smi": nvidia_smi(),
        "versions": versions(),
        "platform": platform.platform(),
    }
