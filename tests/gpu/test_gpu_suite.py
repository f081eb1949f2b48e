"""benchmarks.gpu_suite where there is no GPU, and its parts that need none."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu_suite import operators
from benchmarks.gpu_suite.__main__ import Suite, line_of
from benchmarks.gpu_suite.machine import Ceilings
from benchmarks.gpu_suite.timing import percentiles

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


def test_no_step_outlives_the_suite() -> None:
    suite = Suite(time.perf_counter() + 21)
    begin = time.perf_counter()
    assert not suite.step("slow", [sys.executable, "-c", "import time; time.sleep(60)"], 300)
    assert time.perf_counter() - begin < 15


def test_every_figure_of_the_aims_has_a_case() -> None:
    cases = operators.cases(torch.bfloat16)
    assert {case.kind for case in cases} == {"forward", "training", "mixed", "int8"}
    assert {1, 32, 4096} <= {case.rows for case in cases}
    assert all(case.aim for case in cases)
    few = next(case for case in cases if case.rows == 1)
    moved, operations = operators.work_of(few)
    assert moved == pytest.approx(few.in_features * few.out_features * 2, rel=0.05)
    assert operations == pytest.approx(2 * few.in_features * few.out_features, rel=0.05)


def test_a_line_of_the_table_says_whether_the_aim_was_reached() -> None:
    times = {"ours": percentiles([10.0, 11.0, 12.0]), "base_alone": percentiles([10.0] * 3)}
    result = {
        "name": "decode",
        "times": times,
        "roofline_fraction": 0.8,
        "ratio": {"base_alone": 1.1},
        "aim": {"against": "base_alone", "at_most": 1.05, "reached": False},
    }
    line = line_of(result)
    assert "11.0" in line
    assert "base_alone 1.10" in line
    assert "MISSED: at most 1.05 of base_alone" in line
    assert "no time" in line_of({"name": "x", "skipped": "no time was left"})
    ceilings = Ceilings(1e12, {"float16": 1e14})
    assert ceilings.roofline_us(1e6, 1e6, torch.float16) == pytest.approx(1.0)
    assert ceilings.roofline_us(1e3, 1e9, torch.float16) == pytest.approx(10.0)
