"""All cases, one after another: ``python -m benchmarks.gpu_suite.measure --seconds S --out FILE``.

A process of its own, which the suite ends when its time is over: every result is a line of FILE as
soon as it is there. ``--dry-run`` needs no GPU: every case, small, its contestants called once on
the CPU; its times mean nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from . import machine
from .case import Case, Function
from .cases import operators
from .machine import Ceilings
from .timing import CudaMeter, DryMeter, percentiles

MOST_PER_CASE_S = 3.0
# torch.compile of one layer, forward and backward, with a cold cache, until one was measured.
COMPILE_S = 40.0
DRY_SIZE = 40  # of every dimension of a dry run's cases


def all_cases(dtype: torch.dtype) -> list[Case]:
    cases = [case for operator in operators().values() for case in operator.cases(dtype)]
    names = [case.name for case in cases]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"cases: names have to differ, but these occur twice: {', '.join(twice)}")
    return cases


def small(case: Case) -> Case:
    shape = {name: min(size, DRY_SIZE) for name, size in case.shape.items()}
    return dataclasses.replace(case, shape=shape)


class Measurement:
    """Cases within a time; what no longer fits is skipped and says so."""

    def __init__(self, meter: Any, ceilings: Ceilings, deadline: float) -> None:
        self.meter, self.ceilings, self.deadline = meter, ceilings, deadline
        self.compile_s = COMPILE_S

    def left(self) -> float:
        return self.deadline - self.meter.now()

    def run(self, cases: list[Case]) -> Iterator[dict[str, Any]]:
        for index, case in enumerate(cases):
            if self.left() < 1:
                yield {"name": case.name, "skipped": "no time was left"}
                continue
            with torch.set_grad_enabled(case.grad):
                try:
                    yield self.result(case, len(cases) - index)
                except Exception as error:  # one case's fault is not the next one's
                    yield {"name": case.name, "failed": f"{type(error).__name__}: {error}"}

    def prepared(self, case: Case, reserve: float) -> tuple[dict[str, Function], dict[str, str]]:
        """The contestants that are measured, and why the others are not."""
        functions, left_out = {}, {}
        for name, contestant in case.contestants(case, self.meter.device).items():
            if contestant.absent:
                left_out[name] = contestant.absent
                continue
            if not contestant.compiled:
                function = contestant.prepare()
                functions[name] = self.meter.graph(function) if case.graphs else function
                continue
            if not self.meter.compiles:
                left_out[name] = "nothing is compiled in a dry run"
            elif self.left() - reserve < self.compile_s:
                left_out[name] = f"no time was left for torch.compile ({self.compile_s:.0f} s)"
            else:
                begin = self.meter.now()
                function = contestant.prepare()
                function()
                self.compile_s = 1.5 * (self.meter.now() - begin) + 1
                functions[name] = function
        return functions, left_out

    def result(self, case: Case, remaining: int) -> dict[str, Any]:
        # Cases that follow keep a second each, whatever is compiled here.
        functions, left_out = self.prepared(case, reserve=float(remaining))
        seconds = max(0.2, min(MOST_PER_CASE_S, self.left() / (2 * remaining)))
        samples = self.meter.in_turns(functions, seconds)
        moved, operations = case.work(case)
        times = {name: percentiles(values) for name, values in samples.items()}
        medians = {name: values["p50_us"] for name, values in times.items()}
        ours = medians["ours"]
        limit = self.ceilings.roofline_us(moved, operations, case.dtype)
        result: dict[str, Any] = {
            "name": case.name,
            "dtype": str(case.dtype)[6:],
            "shape": dict(case.shape),
            "rounds": len(samples["ours"]),
            "bytes": moved,
            "operations": operations,
            "roofline_us": limit,
            "roofline_fraction": limit / ours,
            "bandwidth_fraction": moved / (ours * 1e-6) / self.ceilings.bytes_per_second,
            "times": times,
            "p50_us": medians,
            "left_out": left_out,
            "clocks": self.meter.clocks(),
        }
        if case.grad:
            result["peak_bytes"] = {n: self.meter.peak_bytes(f) for n, f in functions.items()}
        result["aims"] = [aim.judge(result) for aim in case.aims]
        return result


def line_of(result: dict[str, Any]) -> str:
    """Lines of the table: our time, the roofline, the ratio to every peer, the aims."""
    for state in ("skipped", "failed"):
        if state in result:
            return f"{result['name']:24} {state}: {result[state]}"
    ours, medians = result["times"]["ours"], result["p50_us"]
    text = f"{result['name']:24} {ours['p20_us']:8.1f} {ours['p50_us']:8.1f} {ours['p80_us']:8.1f}"
    text += f" us  roofline {100 * result['roofline_fraction']:4.0f} %  ours / "
    text += "  ".join(
        f"{name} {medians['ours'] / value:.2f}" for name, value in medians.items() if name != "ours"
    )
    for name, why in result["left_out"].items():
        text += f"\n{'':24} {name} left out: {why}"
    for aim in result["aims"]:
        state = {True: "reached", False: "MISSED", None: "not measured"}[aim["reached"]]
        value = "" if aim["value"] is None else f" ({aim['value']:.2f})"
        text += f"\n{'':24} [{state}: {aim['aim']}{value}]"
    return text


def main() -> int:
    begin = time.perf_counter()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_suite.measure")
    parser.add_argument("--seconds", type=float, required=True, help="the time there is")
    parser.add_argument("--out", type=Path, required=True, help="JSON, a line for each result")
    parser.add_argument("--dry-run", action="store_true", help="small, on the CPU; for tests")
    arguments = parser.parse_args()
    meter: CudaMeter | DryMeter
    if arguments.dry_run:
        meter, dtype = DryMeter(), torch.bfloat16
        ceilings = Ceilings(1e12, {"bfloat16": 1e14})
        cases = [small(case) for case in all_cases(dtype)]
    else:
        dtypes = machine.dtypes()
        meter, dtype = CudaMeter(), dtypes[min(1, len(dtypes) - 1)]
        ceilings = machine.measure_ceilings(dtypes)
        cases = all_cases(dtype)
    failed = False
    with arguments.out.open("w") as out:

        def keep(line: dict[str, Any]) -> None:
            out.write(json.dumps(line) + "\n")
            out.flush()

        keep({"cases": [case.name for case in cases], "dry_run": arguments.dry_run})
        keep({"ceilings": dataclasses.asdict(ceilings)})
        for result in Measurement(meter, ceilings, begin + arguments.seconds).run(cases):
            keep(result)
            print(line_of(result), flush=True)
            failed = failed or "failed" in result
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
