"""What this machine can do at all, measured in the same run as what is judged by it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache

import torch


def _best(function: Callable[[], object], repeats: int = 7) -> float:
    """Seconds of the fastest of some calls: a limit is what the machine can do, not its median."""
    function()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return min(times)


@dataclass(frozen=True)
class Limits:
    """Bytes per second read from memory, and operations per second by type.

    The arithmetic limits are those of the best library product of 2,048 cubed found here (MKL and
    oneDNN), so a fraction above 1 is possible and means that the library leaves some behind.
    """

    read_bytes: float
    float32: float
    bfloat16: float
    int8: float

    def seconds(self, bytes_read: float, operations: float, kind: str) -> float:
        """The shortest time that the roofline allows for this many bytes and operations."""
        return max(bytes_read / self.read_bytes, operations / getattr(self, kind))

    def as_dict(self) -> dict[str, float]:
        return {f"{name}_per_second": value for name, value in asdict(self).items()}


def read_bandwidth(threads: int, nbytes: int = 256 * 2**20) -> float:
    """Bytes per second that this many threads read; measured anew at every call.

    The default, 256 MiB, is far beyond any cache share of one process. A block that is as large as
    what a decoding step reads gives the limit for reading it again and again, cache and all.
    """
    torch.set_num_threads(threads)
    # A sum, or a matrix-vector product: which of the two reads faster differs between machines.
    width = 1024
    block = torch.ones(max(1, nbytes // (4 * width)), width)
    vector = torch.ones(width)
    seconds = min(_best(lambda: block.sum()), _best(lambda: block @ vector))
    return block.numel() * block.element_size() / seconds


@cache
def measure(threads: int) -> Limits:
    """Measure the limits with this many threads; cached for the process."""
    torch.set_num_threads(threads)
    size = 2048
    operations = 2 * size**3
    a, b = torch.randn(size, size), torch.randn(size, size)
    packed = torch.ops.mkldnn._reorder_linear_weight(b, size)
    fp32 = min(
        _best(lambda: a @ b, 3),
        _best(lambda: torch.ops.mkldnn._linear_pointwise(a, packed, None, "none", [], ""), 3),
    )
    a16, b16 = a.bfloat16(), b.bfloat16()
    bf16 = _best(lambda: a16 @ b16, 3)
    a8, b8 = (t.mul(20).clamp(-127, 127).to(torch.int8) for t in (a, b))
    int8 = _best(lambda: torch._int_mm(a8, b8), 3)
    return Limits(
        read_bandwidth(threads),
        operations / fp32,
        operations / bf16,
        max(operations / int8, operations / bf16),
    )
