"""Times of device work: events, medians, contestants in turns; the meters of a measurement."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable

import torch

from .case import COMPILE_S


class _Flush:
    """Writes more than the L2 holds, so that every call finds its operands in memory."""

    def __init__(self) -> None:
        self.buffer: torch.Tensor | None = None

    def __call__(self) -> None:
        if self.buffer is None:
            self.buffer = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
        self.buffer.zero_()


flush = _Flush()


def _once_us(function: Callable[[], object]) -> float:
    begin = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    flush()  # also keeps the device busy while the call is launched
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3


def in_turns(
    contestants: dict[str, Callable[[], object]], seconds: float
) -> dict[str, list[float]]:
    """Samples in µs of every contestant, in random order within each round."""
    for function in contestants.values():
        for _ in range(3):
            function()
    torch.cuda.synchronize()
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    deadline = time.perf_counter() + seconds
    rounds = 0
    while (time.perf_counter() < deadline or rounds < 7) and rounds < 500:
        for name in random.sample(list(contestants), len(contestants)):
            samples[name].append(_once_us(contestants[name]))
        rounds += 1
    return samples


def median_us(function: Callable[[], object], *, seconds: float) -> float:
    return statistics.median(in_turns({"it": function}, seconds)["it"])


def percentiles(samples: list[float]) -> dict[str, float]:
    """p20, p50 and p80 in µs."""
    ordered = sorted(samples)
    return {
        f"p{p}_us": ordered[min(len(ordered) - 1, int(p / 100 * len(ordered)))]
        for p in (20, 50, 80)
    }


def captured(function: Callable[[], object]) -> Callable[[], object]:
    """The same work as a CUDA graph: without what launching it costs the host."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def peak_bytes(function: Callable[[], object]) -> int:
    """The most that a call allocates above what there was before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


class CudaMeter:
    """Measures on this process's GPU."""

    device = "cuda"
    now = staticmethod(time.perf_counter)
    in_turns = staticmethod(in_turns)
    peak_bytes = staticmethod(peak_bytes)
    graph = staticmethod(captured)

    def __init__(self, compile_s: dict[str, float]) -> None:
        self._compile_s = compile_s  # ahead of the measurement, of what was compiled there

    def compile_s(self) -> dict[str, float]:
        """What torch.compile takes for a contestant, until one was measured."""
        return COMPILE_S | self._compile_s

    def clocks(self) -> dict[str, str]:
        from .machine import nvidia_smi

        return nvidia_smi()


class DryMeter:
    """Calls every contestant once, on the CPU: shows that a case runs, and measures nothing."""

    device = "cpu"
    now = staticmethod(time.perf_counter)

    def compile_s(self) -> dict[str, float]:
        """Nothing is compiled: it is called as it is."""
        return dict.fromkeys(COMPILE_S, 0.0)

    def in_turns(
        self, contestants: dict[str, Callable[[], object]], seconds: float
    ) -> dict[str, list[float]]:
        samples = {}
        for name, function in contestants.items():
            begin = time.perf_counter()
            function()
            samples[name] = [(time.perf_counter() - begin) * 1e6]
        return samples

    def peak_bytes(self, function: Callable[[], object]) -> int:
        """Of what the call returns; a CPU keeps no account of more."""
        result = function()
        tensors = result if isinstance(result, tuple) else (result,)
        return sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))

    def graph(self, function: Callable[[], object]) -> Callable[[], object]:
        return function

    def clocks(self) -> dict[str, str]:
        return {}
