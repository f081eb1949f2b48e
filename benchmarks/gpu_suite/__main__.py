"""``python -m benchmarks.gpu_suite --json OUT``: build, test, sanitize and measure on a GPU.

Ends within eight minutes: what there is no time for is left out and named, and so are the peers
that are not installed (transformers, peft, torchao, flash_attn, flash_attn_interface). Exit code 0:
all tests passed; 1: something failed; 2: there is no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from . import machine

ROOT = Path(__file__).resolve().parents[2]
TOOLKIT = Path("/usr/local/cuda/bin")  # where nvcc and compute-sanitizer are if not on the path
BUDGET_S = 480.0
RESERVE_S = 10.0  # of the budget, for ending and writing
MEASURE_S = 150.0  # of the budget, which tests and sanitizers leave to the benchmarks
NO_TIME = 124
ENDED = "no time was left; the measurement was ended"
# Checked under compute-sanitizer: one call of every kernel, small.
SANITIZED = "benchmarks.gpu_suite.every_kernel"
COMPILE_AHEAD = "benchmarks.gpu_suite.compile_ahead"


class Suite:
    """The steps in order; each adds to ``results`` and says what failed."""

    def __init__(self, deadline: float, *, dry_run: bool = False) -> None:
        self.deadline = deadline
        self.dry_run = dry_run
        self.results: dict[str, Any] = {"steps": {}}
        self.environment = dict(os.environ)

    def left(self, reserve: float = 0.0) -> float:
        return self.deadline - time.perf_counter() - reserve

    def step(
        self,
        name: str,
        command: list[str],
        most: float,
        *,
        show: bool = False,
        more: Mapping[str, str] | None = None,
    ) -> bool:
        """Run a command, with `more` in its environment; keep its end, its time, its tests."""
        begin = time.perf_counter()
        limit = min(most, self.left(RESERVE_S))
        if limit <= 0:
            code, output = NO_TIME, "skipped: no time was left"
        else:
            environment = self.environment | dict(more or {})
            code, output = run_within(command, limit, environment, show)
        seconds = time.perf_counter() - begin
        self.results["steps"][name] = {
            "passed": code == 0,
            "code": code,
            "seconds": seconds,
            "output": output[-4000:] if code else output[-400:],
        }
        tests = counted(output)
        if tests:
            self.results["steps"][name]["tests"] = tests
        state = {0: "passed", NO_TIME: "NO TIME"}.get(code, f"FAILED ({code})")
        counts = ", ".join(f"{count} {what}" for what, count in tests.items())
        print(f"{name:36} {state:14} {seconds:6.1f} s  {counts}".rstrip(), flush=True)
        if code and not show:
            print(output[-3000:])
        return code == 0

    def build(self) -> bool:
        """The library for this GPU alone, in a folder of its own."""
        major, minor = torch.cuda.get_device_capability()
        folder = ROOT / "build" / f"gpu_suite_sm_{major}{minor}"
        configure = ["cmake", "-S", str(ROOT), "-B", str(folder), "-DLORA_KERNELS_CUDA=ON"]
        feature = "a" if (major, minor) == (9, 0) else ""  # wgmma is of sm_90a alone
        configure += [f"-DCMAKE_CUDA_ARCHITECTURES={major}{minor}{feature}-real"]
        configure += [f"-DLORA_KERNELS_TORCH={torch.__path__[0]}", "-DLORA_KERNELS_TENSORRT=OFF"]
        named = "CUDACXX" in os.environ or "CUDA_HOME" in os.environ or shutil.which("nvcc")
        if not named and (TOOLKIT / "nvcc").exists():
            configure += [f"-DCMAKE_CUDA_COMPILER={TOOLKIT / 'nvcc'}"]
        configure += ["-G", "Ninja"] if shutil.which("ninja") else []
        jobs = str(os.cpu_count() or 4)
        built = self.step("configure", configure, 60) and self.step(
            "build", ["cmake", "--build", str(folder), "-j", jobs], 240
        )
        self.environment["LORA_KERNELS_LIBRARY"] = str(folder / "_torch.so")
        os.environ["LORA_KERNELS_LIBRARY"] = str(folder / "_torch.so")
        return built

    def tests(self) -> None:
        """The primitives first: whatever stands on them fails with them."""
        folder = ROOT / "tests" / "gpu"
        for path in [folder / "test_primitives.py", *sorted(folder.glob("test_*_gpu.py"))]:
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)]
            self.step(str(path.relative_to(ROOT)), command, min(150, self.left(MEASURE_S)))

    def sanitize(self) -> None:
        """Our kernels alone, if this release's filter is as expected; torch's are many."""
        tool = shutil.which("compute-sanitizer") or str(TOOLKIT / "compute-sanitizer")
        # Each tensor an allocation of its own, beyond whose end memcheck sees.
        alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        for check in ("memcheck", "racecheck"):
            name = f"compute-sanitizer {check}"
            command = [tool, "--tool", check, "--error-exitcode", "1", "--print-limit", "20"]
            program = [sys.executable, "-m", SANITIZED]
            only_ours = ["--kernel-name", "kns=lora_kernels"]
            most = min(90, self.left(MEASURE_S))
            if not self.step(name, [*command, *only_ours, *program], most, more=alone):
                output = self.results["steps"][name]["output"]
                if "SUMMARY" not in output and self.results["steps"][name]["code"] != 124:
                    most = min(120, self.left(MEASURE_S))
                    self.step(name, [*command, *program], most, more=alone)

    @contextlib.contextmanager
    def compiling_ahead(self) -> Iterator[None]:
        """What torch.compile has to do begins beside the steps within, and is ended with them."""
        if machine.nvidia_smi().get("compute_mode", "Default") != "Default":
            yield  # one process alone may use this GPU
            return
        with tempfile.TemporaryDirectory() as folder:
            lines = Path(folder) / "compiled.jsonl"
            process = subprocess.Popen(
                [sys.executable, "-m", COMPILE_AHEAD, "--out", str(lines)],
                cwd=ROOT,
                env=self.environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            try:
                yield
            finally:
                end_all(process)
            self.results["compiled_ahead_s"] = seconds_of(lines)

    def measure(self) -> None:
        """In a process of its own, which can be ended whatever it does; its lines are kept."""
        with tempfile.TemporaryDirectory() as folder:
            lines = Path(folder) / "results.jsonl"
            seconds = self.left(2 * RESERVE_S)
            command = [sys.executable, "-m", "benchmarks.gpu_suite.measure", "--out", str(lines)]
            command += ["--seconds", f"{seconds:.1f}", *(["--dry-run"] if self.dry_run else [])]
            command += ["--compile-s", json.dumps(self.results.get("compiled_ahead_s", {}))]
            self.step("benchmarks", command, BUDGET_S, show=True)
            self.results |= read_results(lines)
        for result in self.results["benchmarks"]:
            if result.get("skipped") == ENDED:
                print(f"{result['name']:24} skipped: {ENDED}")


def end_all(process: subprocess.Popen[Any]) -> None:
    """A process that leads a session, and its children: compilers, workers."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def counted(output: str) -> dict[str, int]:
    """What pytest's last line counts: passed, failed, skipped; empty of other programs."""
    lines = [line for line in output.splitlines() if re.search(r" in [\d.]+s", line)]
    counts = re.findall(r"(\d+) (passed|failed|skipped|errors?)", lines[-1]) if lines else []
    return {what: int(count) for count, what in counts}


def run_within(
    command: list[str], seconds: float, environment: dict[str, str], show: bool
) -> tuple[int, str]:
    """Exit code and output; past its time the command ends with all that it started."""
    with tempfile.TemporaryFile("w+") as output:
        try:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdout=None if show else output,
                stderr=None if show else subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return 127, str(error)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = NO_TIME
        finally:
            end_all(process)
        output.seek(0)
        text = output.read()
    return code, text + ("\nended: no time was left" if code == NO_TIME else "")


def seconds_of(path: Path) -> dict[str, float]:
    """The most that compiling a contestant took, by its name; none where nothing was written."""
    most: dict[str, float] = {}
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:  # the last one, cut off
            break
        most[line["compiled"]] = max(line["seconds"], most.get(line["compiled"], 0.0))
    return most


def read_results(path: Path) -> dict[str, Any]:
    """What a measurement has written, whole or not: cases without a result are named as skipped."""
    found: dict[str, Any] = {"benchmarks": []}
    names: list[str] = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:  # the last one, cut off
            break
        if "cases" in line:
            names = line["cases"]
            found["dry_run"] = line["dry_run"]
        elif "ceilings" in line:
            found |= line
        else:  # a later one of a case replaces the former
            found["benchmarks"] = [r for r in found["benchmarks"] if r["name"] != line["name"]]
            found["benchmarks"].append(line)
    done = {result["name"] for result in found["benchmarks"]}
    found["benchmarks"] += [{"name": n, "skipped": ENDED} for n in names if n not in done]
    return found


def write_json(path: Path, results: dict[str, Any]) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(results, indent=1) + "\n")
    part.replace(path)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_suite", description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where the results go")
    parser.add_argument("--skip-sanitizer", action="store_true")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="no GPU: every case once, small, on the CPU; measures nothing",
    )
    arguments = parser.parse_args()
    suite = Suite(time.perf_counter() + BUDGET_S, dry_run=arguments.dry_run)
    if arguments.dry_run:
        suite.results["versions"] = machine.versions()
        suite.measure()
    elif torch.cuda.is_available():
        suite.results["machine"] = machine.facts()
        print(json.dumps(suite.results["machine"], indent=1))
        if suite.build():
            with suite.compiling_ahead():
                suite.tests()
                if not arguments.skip_sanitizer:
                    suite.sanitize()
            suite.measure()
        suite.results["machine_after"] = machine.nvidia_smi()
    else:
        why = "this torch is a CPU build" if torch.version.cuda is None else "no device was found"
        print(f"gpu_suite: there is no GPU here ({why}); nothing was built, tested or measured")
        return 2
    write_json(arguments.json, suite.results)
    failed = [name for name, step in suite.results["steps"].items() if not step["passed"]]
    print(
        f"{arguments.json} written; " + (f"FAILED: {', '.join(failed)}" if failed else "all right")
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
