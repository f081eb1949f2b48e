"""The interleaved comparison behind every benchmark, and the header of the results."""

from __future__ import annotations

import copy
import itertools
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from lora_kernels import environment, implementations

from . import roofline

# Weights are cycled over copies of this many bytes in all, so that a decoding step finds them out
# of cache, as it does in a model; hot weights flatter a library three to five times.
COLD_BYTES = 96 * 2**20


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


def copies(bytes_each: int) -> int:
    """How many copies of a weight put it out of cache."""
    return max(2, min(256, COLD_BYTES // bytes_each + 1))


def cycling(function: Callable[..., Any], operands: list[tuple]) -> Callable[[], Any]:
    """Call ``function`` with the next operands, round and round.

    Every contestant gets a copy of the tensors and modules: with shared memory whoever comes soon
    after another would find in the cache what that one has just read.
    """
    turn = itertools.cycle([tuple(_own(item) for item in group) for group in operands])
    return lambda: function(*next(turn))


def _own(item: Any) -> Any:
    if isinstance(item, torch.Tensor):
        return item.detach().clone() if item.layout is torch.strided else item
    return copy.deepcopy(item) if isinstance(item, torch.nn.Module) else item


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
        samples: dict[str, list[float]] = {name: [] for name in contestants}
        for function in contestants.values():
            for _ in range(3):
                function()
        begin = time.perf_counter()
        for function in contestants.values():
            function()
        once = max(time.perf_counter() - begin, 1e-6)
        rounds = int(max(7, min(500, request.config.getoption("--seconds") / once)))

        # Shuffled, not rotated: nobody always comes after the one that leaves the caches worst.
        order, shuffle = list(contestants.items()), random.Random(0).shuffle

        def take_turns() -> None:
            shuffle(order)
            for name, function in order:
                begin = time.perf_counter()
                function()
                samples[name].append(time.perf_counter() - begin)

        benchmark.pedantic(ours, setup=take_turns, rounds=rounds, iterations=1)
        mine = samples.pop("ours")
        limit = roofline.measure(threads).seconds(work.bytes_read, work.operations, work.kind)
        ratio = {
            name: sorted(a / b for a, b in zip(mine, times, strict=True))[rounds // 2]
            for name, times in samples.items()
        }
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
            roofline_fraction=limit / (roofline.percentiles(mine)["p50_us"] / 1e6),
            ours=roofline.percentiles(mine),
            peers={name: roofline.percentiles(times) for name, times in samples.items()},
            ratio_to_peer=ratio,
        )
        return benchmark.extra_info

    return run
