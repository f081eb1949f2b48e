"""The GPU as it says of itself, and the ceilings that it reaches here."""

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

_PACKAGES = ("torch", "triton", "peft", "transformers", "torchao", "flash_attn", "flash_attn_3")
# Of INT8 per clock and multiprocessor on tensor cores, multiplications and additions: data sheets.
_INT8_PER_CLOCK = {
    (7, 5): 2048,
    (8, 0): 4096,
    (8, 6): 2048,
    (8, 9): 2048,
    (9, 0): 8192,
    (10, 0): 16384,
    (12, 0): 2048,
}
_QUERY = "name,driver_version,compute_mode,clocks.sm,clocks.mem,clocks.max.sm,power.draw"
_QUERY += ",temperature.gpu"


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
    for package in _PACKAGES:
        found[package] = _version(package)
    # cuBLAS by the name that its package has for this torch's CUDA, or had for CUDA 12.
    found["cublas"] = _version("nvidia-cublas") or _version("nvidia-cublas-cu12")
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@dataclass(frozen=True)
class Ceilings:
    """Bytes per second of a copy and operations per second of cuBLAS, measured; INT8's as said."""

    bytes_per_second: float
    flops: dict[str, float]  # by dtype, and of "int8"
    int8_from: str = ""

    def roofline_us(self, bytes_moved: float, operations: float, arithmetic: str) -> float:
        """The time that neither memory nor arithmetic could beat, in µs."""
        return 1e6 * max(bytes_moved / self.bytes_per_second, operations / self.flops[arithmetic])


def dtypes() -> list[torch.dtype]:
    """What this GPU's tensor cores multiply."""
    if torch.cuda.get_device_capability() < (8, 0):
        return [torch.float16]
    return [torch.float16, torch.bfloat16, torch.float32]


def main_dtype() -> torch.dtype:
    """What most cases are measured in: bf16, where there is such."""
    kinds = dtypes()
    return kinds[min(1, len(kinds) - 1)]


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
    flops["int8"], int8_from = _int8_operations_per_second(flops["float16"])
    return Ceilings(moved, flops, int8_from)


def _int8_operations_per_second(
    of_fp16: float, device: str = "cuda", size: int = 8192
) -> tuple[float, str]:
    """The data sheet's at the clock that INT8 products leave; else what torch._int_mm reaches.

    Also where that is more: then the clock was read after the products had ended.
    """
    a, b = torch.randint(-127, 128, (2, size, size), dtype=torch.int8, device=device)
    columns = b.t()
    try:
        us = median_us(lambda: torch._int_mm(a, columns), seconds=0.5)
    except RuntimeError:
        return 2 * of_fp16, "twice float16's: torch._int_mm is not supported here"
    for _ in range(int(1e6 / us)):  # a second of them, during which nvidia-smi looks
        torch._int_mm(a, columns)
    clock = re.match(r"(\d+) MHz", nvidia_smi().get("clocks.sm", ""))
    torch.cuda.synchronize()
    properties = torch.cuda.get_device_properties(0)
    per_clock = _INT8_PER_CLOCK.get((properties.major, properties.minor))
    reached = 2.0 * size**3 / us * 1e6
    rate = 0.0
    if clock is not None and per_clock is not None:
        rate = per_clock * properties.multi_processor_count * int(clock[1]) * 1e6
    if clock is None or rate < reached:
        return reached, "torch._int_mm"
    return rate, f"data sheet at {clock[1]} MHz"


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
