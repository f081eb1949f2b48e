"""All cases, one after another: ``python -m benchmarks.gpu_suite.measure --seconds S --out FILE``.

A process of its own, which the suite ends when its time is over: every result is a line of FILE as
soon as it is there. ``--dry-run`` needs no GPU: every case, small, its contestants called once on
the CPU, those of torch.compile without being compiled; its times mean nothing.
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
from .case import Case, Function, in_order
from .cases import operators
from .machine import Ceilings
from .timing import CudaMeter, DryMeter, percentiles

MOST_PER_CASE_S = 3.0
LEAST_PER_CASE_S = 0.3
NO_TIME = "no time was left for torch.compile"
DRY_SIZE = 40  # of every dimension of a dry run's cases, unless the case says another


def all_cases(dtype: torch.dtype) -> list[Case]:
    """Of all operators, in the order in which they are measured."""
    cases = [case for operator in operators().values() for case in operator.cases(dtype)]
    names = [case.name for case in cases]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"cases: names have to differ, but these occur twice: {', '.join(twice)}")
    return in_order(cases)


def small(case: Case) -> Case:
    shape = {name: min(size, DRY_SIZE) for name, size in case.shape.items()}
    return dataclasses.replace(case, shape=shape | dict(case.dry))


class Measurement:
    """Cases within a time; what no longer fits is skipped and says so."""

    def __init__(self, meter: Any, ceilings: Ceilings, deadline: float) -> None:
        self.meter, self.ceilings, self.deadline = meter, ceilings, deadline
        self.compile_s = meter.compile_s()

    def left(self) -> float:
        return self.deadline - self.meter.now()

    def run(self, cases: list[Case]) -> Iterator[dict[str, Any]]:
        """A result of each case; in the end one more, in its place, of those for which there is
        time now to compile what was left out.
        """
        again = []
        for index, case in enumerate(cases):
            result = self.attempt(case, cases[index + 1 :])
            if self.waiting(result):
                again.append((case, result))
            yield result
        for case, result in again:
            least = min(self.compile_s[name] for name in self.waiting(result))
            if self.left() >= least + case.least_s:
                yield self.attempt(case, [])

    def attempt(self, case: Case, following: list[Case]) -> dict[str, Any]:
        if self.left() < case.least_s:
            return {"name": case.name, "skipped": "no time was left"}
        with torch.set_grad_enabled(case.grad):
            try:
                return self.result(case, following)
            except Exception as error:  # one case's fault is not the next one's
                return {"name": case.name, "failed": f"{type(error).__name__}: {error}"}

    def waiting(self, result: dict[str, Any]) -> list[str]:
        """Contestants that were left out because compiling them takes time."""
        return [n for n, why in result.get("left_out", {}).items() if why.startswith(NO_TIME)]

    def compile_reserve(self, cases: list[Case]) -> float:
        """What compiling the contestants that their aims name takes."""
        return sum(case.compile_s(self.compile_s) for case in cases)

    def prepared(
        self, case: Case, following: list[Case]
    ) -> tuple[dict[str, Function], dict[str, str], dict[str, str]]:
        """The contestants that are measured, why others are not, and the rivals that failed."""
        functions, left_out, broken = {}, {}, {}
        named = {aim.against for aim in case.aims}
        for name, contestant in case.contestants(case, self.meter.device).items():
            if contestant.absent:
                left_out[name] = contestant.absent
                continue
            if contestant.compiled:
                # Cases that follow keep their time, whatever is compiled here; what no aim asks
                # for does not take it from what an aim does.
                reserve = sum(later.least_s for later in following)
                reserve += 0 if name in named else self.compile_reserve([case, *following])
                if self.left() - reserve < self.compile_s[name]:
                    left_out[name] = f"{NO_TIME} ({self.compile_s[name]:.0f} s)"
                    continue
            begin = self.meter.now()
            try:
                function = contestant.prepare()
                function()
                if contestant.compiled:
                    self.compile_s[name] = 1.5 * (self.meter.now() - begin) + 1
                functions[name] = self.meter.graph(function) if case.graphs else function
            except Exception as error:
                if name == "ours":
                    raise
                broken[name] = f"{type(error).__name__}: {error}"
        return functions, left_out, broken

    def result(self, case: Case, following: list[Case]) -> dict[str, Any]:
        functions, left_out, broken = self.prepared(case, following)
        if "ours" not in functions:
            return {"name": case.name, "skipped": left_out["ours"]}
        free = self.left() - self.compile_reserve(following)
        seconds = min(MOST_PER_CASE_S, free / (2 * (1 + len(following))))
        seconds = max(LEAST_PER_CASE_S, seconds)
        samples = self.meter.in_turns(functions, seconds)
        moved, operations = case.work(case)
        times = {name: percentiles(values) for name, values in samples.items()}
        medians = {name: values["p50_us"] for name, values in times.items()}
        ours = medians["ours"]
        arithmetic = case.arithmetic or str(case.dtype)[6:]
        limit = self.ceilings.roofline_us(moved, operations, arithmetic)
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
            "broken": broken,
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
    for state in ("left_out", "broken"):
        for name, why in result[state].items():
            text += f"\n{'':24} {name} {state.replace('_', ' ')}: {why}"
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
    parser.add_argument(
        "--compile-s", default="{}", help="JSON: seconds that compiling took, by contestant"
    )
    parser.add_argument("--dry-run", action="store_true", help="small, on the CPU; for tests")
    arguments = parser.parse_args()
    meter: CudaMeter | DryMeter
    if arguments.dry_run:
        meter = DryMeter()
        torch.compiler.set_stance("force_eager")
        kinds = ("float16", "bfloat16", "float32", "int8")
        ceilings = Ceilings(1e12, dict.fromkeys(kinds, 1e14))
        cases = [small(case) for case in all_cases(torch.bfloat16)]
    else:
        meter = CudaMeter(json.loads(arguments.compile_s))
        ceilings = machine.measure_ceilings(machine.dtypes())
        cases = all_cases(machine.main_dtype())
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
            failed = failed or "failed" in result or bool(result.get("broken"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
