"""benchmarks.gpu_suite where there is no GPU, and its parts that need none."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu_suite.__main__ import ENDED, Suite, read_results
from benchmarks.gpu_suite.case import Aim, Case, Contestant, Function
from benchmarks.gpu_suite.cases import lora_linear
from benchmarks.gpu_suite.machine import Ceilings
from benchmarks.gpu_suite.measure import Measurement, all_cases, line_of, small
from benchmarks.gpu_suite.timing import DryMeter

ROOT = Path(__file__).resolve().parents[2]


def test_without_a_gpu_it_says_so_and_ends_with_2(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_suite", "--json", out],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2, run.stderr
    assert "there is no GPU here" in run.stdout
    assert not out.exists()


def test_steps_that_fail_or_take_too_long_are_kept() -> None:
    suite = Suite(time.perf_counter() + 100)
    assert suite.step("good", [sys.executable, "-c", "print(1)"], 60)
    assert not suite.step("bad", [sys.executable, "-c", "raise SystemExit(3)"], 60)
    assert not suite.step("slow", [sys.executable, "-c", "import time; time.sleep(60)"], 0.5)
    assert not suite.step("absent", ["/no/such/tool"], 60)
    codes = {name: step["code"] for name, step in suite.results["steps"].items()}
    assert codes == {"good": 0, "bad": 3, "slow": 124, "absent": 127}


def test_no_step_outlives_the_suite_nor_does_what_it_started(tmp_path: Path) -> None:
    suite = Suite(time.perf_counter() + 11)
    mark = tmp_path / "mark"
    late = f"import pathlib, time; time.sleep(4); pathlib.Path({str(mark)!r}).touch()"
    child = [sys.executable, "-c", late]
    command = [sys.executable, "-c", f"import subprocess; subprocess.run({child})"]
    begin = time.perf_counter()
    assert not suite.step("slow", command, 300)
    assert time.perf_counter() - begin < 4
    time.sleep(4)
    assert not mark.exists()
    assert not suite.step("late", [sys.executable, "-c", "open('/no/such/file')"], 300)
    assert "skipped: no time" in suite.results["steps"]["late"]["output"]


# The figures to reach: figure, limit, contestant, and the shapes at which each of them is asked.
FIGURES = [
    ("time", 1.05, "base_alone", {"rows": {4096, 12000}, "in_features": {1280}}),
    ("time", 1.10, "base_alone", {"rows": {1, 8, 32}, "in_features": {1280, 5120}}),
    ("bandwidth", 0.8, "", {"rows": {1, 8, 32}, "in_features": {1280, 5120}}),
    ("time", 1 / 1.4, "peft", {"rows": {4096, 12000}, "in_features": {1280}}),
    ("time", 1 / 1.2, "peft_compiled", {"rows": {4096, 12000}, "in_features": {1280}}),
    ("peak_bytes", 1.0, "peft", {"rows": {4096, 12000}, "in_features": {1280}}),
    ("time", 1.15, "one_adapter", {"rows": {32}, "in_features": {1280}}),
]


@pytest.mark.parametrize(("figure", "limit", "against", "where"), FIGURES)
def test_every_figure_of_the_aims_has_a_case(
    figure: str, limit: float, against: str, where: dict[str, set[int]]
) -> None:
    aim = Aim(figure, limit, against)
    having = [case for case in lora_linear.cases(torch.bfloat16) if aim in case.aims]
    for size, values in where.items():
        assert values <= {case.shape[size] for case in having}
    for case in map(small, having):  # the contestant that the aim names takes part
        assert {"ours", against or "ours"} <= lora_linear_contestants(case)
        assert case.grad == (against.startswith("peft"))


def lora_linear_contestants(case: Case) -> set[str]:
    return set(case.contestants(case, "cpu"))


def case_named(name: str) -> Case:
    return next(case for case in all_cases(torch.bfloat16) if case.name == name)


def test_the_work_of_a_case_counts_what_its_rows_use() -> None:
    n, k = 5120, 1280
    moved, operations = lora_linear.work(case_named("decode-1x1280x5120"))
    assert moved == 2 * (n * k + 16 * (n + k) + n + k)
    assert operations == 2 * n * k + 2 * 16 * (n + k)
    ranks = lora_linear.ranks_of(32)
    assert (ranks[0], ranks[-1]) == (4, 64)
    moved, operations = lora_linear.work_of_mixed(case_named("mixed-32-adapters"))
    assert moved == 2 * (n * k + sum(ranks) * (n + k) + 32 * (n + k))
    assert operations == 2 * 32 * n * k + sum(2 * rank * (n + k) for rank in ranks)
    step = case_named("train-4096x1280x1280")
    forward = dataclasses.replace(step, grad=False)
    assert lora_linear.work(step)[1] == pytest.approx(2 * lora_linear.work(forward)[1], rel=0.03)


class ScriptedMeter(DryMeter):
    """A clock that a test moves, and figures that it gives."""

    compiles = True

    def __init__(self, us: dict[str, float], peaks: dict[str, int], compile_s: float = 0) -> None:
        self.us, self.peaks, self.clock, self.compile_s = us, peaks, 0.0, compile_s
        self.names: dict[object, str] = {}

    def now(self) -> float:
        return self.clock

    def in_turns(self, contestants, seconds):
        self.clock += seconds
        self.names = {function: name for name, function in contestants.items()}
        return {name: [self.us[name]] * 3 for name in contestants}

    def peak_bytes(self, function) -> int:
        return self.peaks[self.names[function]]


def scripted(case: Case, meter: ScriptedMeter) -> Case:
    """The case, small; its compiled contestants take the meter's time to prepare."""

    def compile_slowly() -> Function:
        meter.clock += meter.compile_s
        return lambda: None

    def contestants(changed: Case, device: str) -> dict[str, Contestant]:
        return {
            name: Contestant(compile_slowly, compiled=True) if contestant.compiled else contestant
            for name, contestant in case.contestants(changed, device).items()
        }

    return dataclasses.replace(small(case), contestants=contestants)


CEILINGS = Ceilings(1e12, {"bfloat16": 1e14})


def test_aims_are_judged_by_what_was_measured() -> None:
    us = {"ours": 10.0, "base_alone": 8.0, "peft": 14.1, "peft_compiled": 11.9}
    meter = ScriptedMeter(us, {"ours": 100, "base_alone": 50, "peft": 99, "peft_compiled": 98})
    case = scripted(case_named("train-4096x1280x1280"), meter)
    (result,) = Measurement(meter, CEILINGS, 100).run([case])
    assert [aim["reached"] for aim in result["aims"]] == [True, False, False]
    line = line_of(result)
    assert "[reached: time at most 0.71 of peft (0.71)]" in line
    assert "[MISSED: time at most 0.83 of peft_compiled (0.84)]" in line
    assert "[MISSED: peak_bytes at most 1.00 of peft (1.01)]" in line


@pytest.mark.parametrize(("fraction", "reached"), [(0.81, True), (0.79, False)])
def test_bandwidth_is_of_the_bytes_that_have_to_move(fraction: float, reached: bool) -> None:
    meter = ScriptedMeter({}, {})
    case = scripted(case_named("decode-1x1280x5120"), meter)
    best = case.work(case)[0] / 1e12 * 1e6
    names = lora_linear_contestants(case)
    meter.us = dict.fromkeys(names, best / fraction)
    (result,) = Measurement(meter, CEILINGS, 100).run([case])
    aims = {aim["aim"]: aim["reached"] for aim in result["aims"]}
    assert aims["at least 80 % of memory bandwidth"] is reached


def test_what_no_longer_fits_is_skipped_and_named() -> None:
    us = dict.fromkeys(("ours", "base_alone", "addmm", "merged", "peft", "peft_compiled"), 1.0)
    meter = ScriptedMeter(us, {}, compile_s=30)
    cases = [
        dataclasses.replace(scripted(case_named(name), meter), aims=())
        for name in ("4096x1280x1280", "12000x1280x1280", "12000x1280x5120")
    ]
    first, second, third = Measurement(meter, CEILINGS, 50).run(cases)
    assert "peft_compiled" in first["times"]
    assert "no time was left for torch.compile (46 s)" in second["left_out"]["peft_compiled"]
    assert "peft_compiled left out" in line_of(second)
    assert "ours" in third["times"]
    assert meter.clock < 50
    (late,) = Measurement(meter, CEILINGS, meter.clock).run(cases[:1])
    assert line_of(late).endswith("skipped: no time was left")


def test_a_case_that_fails_is_named_and_the_next_is_measured() -> None:
    good = small(case_named("mixed-32-adapters"))
    broken = dataclasses.replace(good, name="broken", contestants=lambda case, device: 1 / 0)
    first, second = Measurement(DryMeter(), CEILINGS, time.perf_counter() + 60).run([broken, good])
    assert first["failed"].startswith("ZeroDivisionError")
    assert second["rounds"] == 1


def test_results_of_an_ended_measurement_are_kept(tmp_path: Path) -> None:
    lines = tmp_path / "lines"
    lines.write_text('{"cases": ["a", "b"], "dry_run": false}\n{"name": "a"}\n{"name": "b", "ti')
    assert read_results(lines)["benchmarks"] == [{"name": "a"}, {"name": "b", "skipped": ENDED}]
    assert read_results(tmp_path / "absent")["benchmarks"] == []


@pytest.mark.slow
def test_a_dry_run_calls_every_contestant_of_every_case(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "benchmarks.gpu_suite", "--dry-run", "--json", str(out)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    results = json.loads(out.read_text())
    assert results["dry_run"] is True
    assert results["versions"]["torch"] == torch.__version__
    names = [case.name for case in all_cases(torch.bfloat16)]
    assert [result["name"] for result in results["benchmarks"]] == names
    assert all("times" in result for result in results["benchmarks"])


def test_the_roofline_is_the_higher_of_its_two_limits() -> None:
    assert CEILINGS.roofline_us(1e6, 1e6, torch.bfloat16) == pytest.approx(1.0)
    assert CEILINGS.roofline_us(1e3, 1e9, torch.bfloat16) == pytest.approx(10.0)
