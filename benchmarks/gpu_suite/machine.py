"""The GPU as it says of itself, and the two ceilings that it reaches here."""

from __future__ import annotations

import platform
import shutil
import subprocess
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .timing import median_us

_QUERY = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,temperature.gpu"


def nvidia_smi() -> dict[str, str]:
    """Name, driver, clocks, power and temperature at this moment; empty without nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return {}
    run = subprocess.run(
        ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader", "-i", "0"],
        capture_output=True,
        text=True,
    )
    values = [part.strip() for part in run.stdout.strip().split(",")]
    return dict(zip(_QUERY.split(","), values, strict=False)) if run.returncode == 0 else {}


@dataclass(frozen=True)
class Ceilings:
    """Measured, not from a data sheet: bytes per second of a copy, FLOP per second of cuBLAS."""

    bytes_per_second: float
    flops: dict[str, float]

    def roofline_us(self, bytes_moved: float, operations: float, dtype: torch.dtype) -> float:
        """The time that neither memory nor arithmetic could beat, in µs."""
        name = str(dtype)[6:]
        return 1e6 * max(bytes_moved / self.bytes_per_second, operations / self.flops[name])


def _copy_bytes_per_second() -> float:
    free, _ = torch.cuda.mem_get_info()
    count = min(2**30, free // 8)
    source = torch.empty(count, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * count / median_us(lambda: target.copy_(source), seconds=0.5) * 1e6


def measure_ceilings(dtypes: list[torch.dtype]) -> Ceilings:
    """A copy of 1 GB, counted twice (read and written), and products of 8,192 cubed."""
    moved = _copy_bytes_per_second()
    flops = {}
    for dtype in dtypes:
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
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def as_dict(ceilings: Ceilings) -> dict[str, Any]:
    return asdict(ceilings)
