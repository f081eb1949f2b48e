"""The interleaved comparison behind every benchmark, and the header of the results."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from lora_kernels import environment, implementations
from lora_kernels.benchmarking import roofline
from lora_kernels.benchmarking.turns import Turns, percentiles, ratio


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--threads", type=int, default=1, help="threads of torch and the kernels")
    parser.addoption("--seconds", type=float, default=1.5, help="time for one comparison")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    threads = config.getoption("--threads")
    torch.set_num_threads(threads)
    machine_info.update(environment.facts())
    machine_info["limits"] = roofline.measure(threads).as_dict()


@dataclass(frozen=True)
class Work:
    """What one call has to read and to compute, and what computes it: the roofline's arguments."""

    bytes_read: float
    operations: float
    kind: str  # "float32", "bfloat16" or "int8"


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    count = request.config.getoption("--threads")
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    with torch.no_grad():
        yield count
    torch.set_num_threads(before)


@pytest.fixture
def compare(benchmark: Any, request: pytest.FixtureRequest, threads: int) -> Callable[..., dict]:
    """``compare(op, ours, peers, work)``: time ours and every peer in turn, round by round.

    Every round of pytest-benchmark's is preceded by one turn of all contestants, ours among them,
    in random order: they see the same moments of a noisy machine under the same conditions.
    Percentiles and ratios are those of the turns, and go to ``extra_info`` of the benchmark's JSON;
    its own statistics are of ours, called by its runner.
    """

    def run(
        op: str, ours: Callable[[], Any], peers: dict[str, Callable[[], Any]], work: Work
    ) -> dict:
        contestants = {"ours": ours, **peers}
        for function in contestants.values():
            for _ in range(3):
                function()
        begin = time.perf_counter()
        for function in contestants.values():
            function()
        once = max(time.perf_counter() - begin, 1e-6)
        rounds = int(max(7, min(500, request.config.getoption("--seconds") / once)))

        turns = Turns(contestants)
        benchmark.pedantic(ours, setup=turns.take, rounds=rounds, iterations=1)
        seconds = turns.samples
        mine = _microseconds(seconds["ours"])
        limit = roofline.measure(threads).seconds(work.bytes_read, work.operations, work.kind)
        chosen = next(
            row.name for row in implementations.describe()[1] if row.op == op and row.selected
        )
        benchmark.extra_info.update(
            op=op,
            implementation=chosen,
            threads=threads,
            rounds=rounds,
            bytes=work.bytes_read,
            operations=work.operations,
            roofline_us=limit * 1e6,
            roofline_fraction=limit / (mine["p50_us"] / 1e6),
            ours=mine,
            peers={name: _microseconds(seconds[name]) for name in peers},
            ratio_to_peer={name: ratio(seconds["ours"], seconds[name]) for name in peers},
        )
        return benchmark.extra_info

    return run


def _microseconds(seconds: list[float]) -> dict[str, float]:
    return {f"{name}_us": value * 1e6 for name, value in percentiles(seconds).items()}
