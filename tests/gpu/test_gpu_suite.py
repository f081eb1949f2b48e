"""benchmarks.gpu_suite where there is no GPU, and its parts that need none."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu_suite import __main__ as suite_main
from benchmarks.gpu_suite import every_kernel, machine
from benchmarks.gpu_suite.__main__ import ENDED, Suite, counted, read_results
from benchmarks.gpu_suite.case import COMPILE_S, Case, Contestant, Function
from benchmarks.gpu_suite.compile_ahead import compile_all
from benchmarks.gpu_suite.machine import Ceilings
from benchmarks.gpu_suite.measure import Measurement, all_cases, line_of, small
from benchmarks.gpu_suite.timing import CudaMeter, DryMeter

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


def case_named(name: str) -> Case:
    return next(case for case in all_cases(torch.bfloat16) if case.name == name)


class ScriptedMeter(DryMeter):
    """A clock that a test moves, and figures that it gives."""

    def __init__(self, us: dict[str, float], peaks: dict[str, int], compiling: float = 0) -> None:
        self.us, self.peaks, self.clock, self.compiling = us, peaks, 0.0, compiling
        self.names: dict[object, str] = {}

    def compile_s(self) -> dict[str, float]:
        return dict.fromkeys(COMPILE_S, 40.0)

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
        meter.clock += meter.compiling
        return lambda: None

    def contestants(changed: Case, device: str) -> dict[str, Contestant]:
        return {
            name: Contestant(compile_slowly, compiled=True) if contestant.compiled else contestant
            for name, contestant in case.contestants(changed, device).items()
        }

    return dataclasses.replace(small(case), contestants=contestants)


CEILINGS = Ceilings(1e12, {"bfloat16": 1e14, "int8": 2e14})


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
    names = case.contestants(case, "cpu")
    meter.us = dict.fromkeys(names, best / fraction)
    (result,) = Measurement(meter, CEILINGS, 100).run([case])
    aims = {aim["aim"]: aim["reached"] for aim in result["aims"]}
    assert aims["at least 80 % of memory bandwidth"] is reached


def test_what_no_longer_fits_is_skipped_and_named() -> None:
    us = dict.fromkeys(("ours", "base_alone", "addmm", "merged", "peft", "peft_compiled"), 1.0)
    meter = ScriptedMeter(us, {}, compiling=30)
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


def test_what_aims_ask_for_is_compiled_first_and_the_rest_in_the_end() -> None:
    us = dict.fromkeys(("ours", "base_alone", "addmm", "merged", "peft", "peft_compiled"), 1.0)
    meter = ScriptedMeter(us, dict.fromkeys(us, 1), compiling=20)
    cases = [
        scripted(case_named(name), meter) for name in ("4096x1280x1280", "train-4096x1280x1280")
    ]
    results = list(Measurement(meter, CEILINGS, 80).run(cases))
    assert [result["name"] for result in results] == [
        "4096x1280x1280", "train-4096x1280x1280", "4096x1280x1280",
    ]  # fmt: skip
    assert ["peft_compiled" in result["times"] for result in results] == [False, True, True]
    assert meter.clock < 80


def test_a_rival_that_fails_is_named_and_the_others_are_measured() -> None:
    def contestants(case: Case, device: str) -> dict[str, Contestant]:
        good = Contestant(lambda: lambda: None)
        return {"ours": good, "falls": Contestant(lambda: lambda: 1 / 0), "stands": good}

    case = dataclasses.replace(
        small(case_named("4096x1280x1280")), contestants=contestants, aims=()
    )
    (result,) = Measurement(DryMeter(), CEILINGS, time.perf_counter() + 60).run([case])
    assert set(result["times"]) == {"ours", "stands"}
    assert result["broken"] == {"falls": "ZeroDivisionError: division by zero"}
    assert "falls broken: ZeroDivisionError" in line_of(result)


def test_a_case_that_fails_is_named_and_the_next_is_measured() -> None:
    good = small(case_named("mixed-32-adapters-1280x1280"))
    broken = dataclasses.replace(good, name="broken", contestants=lambda case, device: 1 / 0)
    first, second = Measurement(DryMeter(), CEILINGS, time.perf_counter() + 60).run([broken, good])
    assert first["failed"].startswith("ZeroDivisionError")
    assert second["rounds"] == 1


def test_results_of_an_ended_measurement_are_kept(tmp_path: Path) -> None:
    lines = tmp_path / "lines"
    lines.write_text('{"cases": ["a", "b"], "dry_run": false}\n{"name": "a"}\n{"name": "b", "ti')
    assert read_results(lines)["benchmarks"] == [{"name": "a"}, {"name": "b", "skipped": ENDED}]
    assert read_results(tmp_path / "absent")["benchmarks"] == []
    lines.write_text('{"name": "a"}\n{"name": "b"}\n{"name": "a", "rounds": 7}\n')
    assert read_results(lines)["benchmarks"] == [{"name": "b"}, {"name": "a", "rounds": 7}]


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
    for result in results["benchmarks"]:
        assert result["broken"] == {}
        for why in result["left_out"].values():
            assert why.endswith("is not installed")


@pytest.mark.slow
def test_what_the_sanitizer_watches_runs_on_a_cpu_too() -> None:
    every_kernel.call_all([torch.bfloat16], "cpu")


class Recorder(Suite):
    """Steps that are only written down."""

    def step(self, name, command, most, *, show=False, more=None) -> bool:
        self.results["steps"][name] = {"command": command, "more": more, "code": 0}
        return True


def test_a_build_has_its_nvcc_and_no_plugins(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("CUDACXX", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "/bin")
    monkeypatch.setenv("LORA_KERNELS_LIBRARY", "restored by monkeypatch")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(suite_main, "TOOLKIT", tmp_path)
    (tmp_path / "nvcc").touch()
    suite = Recorder(time.perf_counter() + 100)
    assert suite.build()
    command = suite.results["steps"]["configure"]["command"]
    assert f"-DCMAKE_CUDA_COMPILER={tmp_path}/nvcc" in command
    assert "-DLORA_KERNELS_TENSORRT=OFF" in command
    assert "-DCMAKE_CUDA_ARCHITECTURES=90a-real" in command
    monkeypatch.setenv("CUDACXX", "/some/nvcc")
    assert suite.build()
    command = suite.results["steps"]["configure"]["command"]
    assert not any("CUDA_COMPILER" in argument for argument in command)


def test_the_sanitizer_sees_each_tensor_alone() -> None:
    suite = Recorder(time.perf_counter() + 400)
    suite.sanitize()
    steps = suite.results["steps"]
    assert set(steps) == {"compute-sanitizer memcheck", "compute-sanitizer racecheck"}
    for step in steps.values():
        assert step["more"] == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    code = "import os; raise SystemExit(os.environ['ALONE'] != 'yes')"
    assert Suite(time.perf_counter() + 60).step(
        "given", [sys.executable, "-c", code], 30, more={"ALONE": "yes"}
    )


def test_compiling_ahead_is_ended_and_its_times_are_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = """
import pathlib, sys, time
out = sys.argv[-1]
lines = '{"compiled": "a", "seconds": 2}\\n{"compiled": "a", "seconds": 3}\\n{"compiled": "b", "se'
pathlib.Path(out).write_text(lines)
pathlib.Path(__file__).with_name("begun").touch()
time.sleep(60)
"""
    (tmp_path / "slow.py").write_text(program)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(suite_main, "COMPILE_AHEAD", "slow")
    suite = Suite(time.perf_counter() + 100)
    suite.environment = dict(os.environ)
    began = time.perf_counter()
    with suite.compiling_ahead():
        while not (tmp_path / "begun").exists() and time.perf_counter() < began + 30:
            time.sleep(0.05)
    assert time.perf_counter() < began + 35
    assert suite.results["compiled_ahead_s"] == {"a": 3}
    command: list[str] = []
    monkeypatch.setattr(suite, "step", lambda name, given, *_, **__: command.extend(given))
    suite.measure()
    assert json.loads(command[command.index("--compile-s") + 1]) == {"a": 3}


def test_what_aims_ask_for_is_compiled_ahead_first() -> None:
    meter = ScriptedMeter({}, {})
    cases = [
        scripted(case_named(name), meter) for name in ("4096x1280x1280", "train-4096x1280x1280")
    ]
    seen: list[str] = []

    def watched(case: Case) -> Case:
        def contestants(changed: Case, device: str) -> dict[str, Contestant]:
            seen.append(case.name)
            return case.contestants(changed, device)

        return dataclasses.replace(case, contestants=contestants)

    lines = list(compile_all([watched(case) for case in cases], "cpu"))
    assert seen == ["train-4096x1280x1280", "4096x1280x1280", "train-4096x1280x1280"]
    assert [line["compiled"] for line in lines] == ["peft_compiled"] * 2


def test_tests_that_were_skipped_are_counted() -> None:
    line = "==== 3 failed, 12 passed, 2 skipped, 1 warning in 4.21s ===="
    assert counted(f"... 7 passed\n{line}\n") == {"failed": 3, "passed": 12, "skipped": 2}
    assert counted("2 errors in 0.10s") == {"errors": 2}
    assert counted("a compiler's output") == {}
    suite = Suite(time.perf_counter() + 60)
    suite.step("pytest", [sys.executable, "-c", "print('1 passed, 2 skipped in 0.1s')"], 30)
    assert suite.results["steps"]["pytest"]["tests"] == {"passed": 1, "skipped": 2}


def test_the_roofline_is_the_higher_of_its_two_limits() -> None:
    assert CEILINGS.roofline_us(1e6, 1e6, "bfloat16") == pytest.approx(1.0)
    assert CEILINGS.roofline_us(1e3, 1e9, "bfloat16") == pytest.approx(10.0)
    assert CEILINGS.roofline_us(1e3, 1e9, "int8") == pytest.approx(5.0)


def test_the_ceiling_of_int8_is_the_data_sheet_s_where_it_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hopper = SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: hopper)
    monkeypatch.setattr(machine, "nvidia_smi", lambda: {"clocks.sm": "1755 MHz"})
    calls: list[object] = []

    def median_us(function: Function, seconds: float) -> float:
        calls.append(function())
        return 1e5

    monkeypatch.setattr(machine, "median_us", median_us)
    ceiling = functools.partial(machine._int8_operations_per_second, 1e14, "cpu", 32)
    rate, source = ceiling()
    assert (rate, source) == (pytest.approx(1.898e15, rel=1e-3), "data sheet at 1755 MHz")
    (product,) = calls
    assert isinstance(product, torch.Tensor) and product.dtype == torch.int32
    monkeypatch.setattr(machine, "nvidia_smi", lambda: {})
    assert ceiling() == (2 * 32**3 * 10, "torch._int_mm")

    def unsupported(function: Function, seconds: float) -> float:
        raise RuntimeError("not implemented")

    monkeypatch.setattr(machine, "median_us", unsupported)
    assert ceiling()[0] == 2e14


def test_what_was_compiled_ahead_is_what_compiling_is_expected_to_take() -> None:
    expected = CudaMeter({"static_compiled": 55.0}).compile_s()
    assert expected == COMPILE_S | {"static_compiled": 55.0}
    assert expected != COMPILE_S
