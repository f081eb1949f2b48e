"""``python -m benchmarks.gpu_suite --json OUT``: build, test, sanitize and measure on a GPU.

Ends within eight minutes: what there is no time for is left out and named. Exit code 0: all tests
passed; 1: something failed; 2: there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
BUDGET_S = 480.0
TESTS = ["primitives", "lora_linear_gpu", "int8_lora_linear_gpu"]
# Checked under compute-sanitizer: one call of every kernel, small.
SANITIZED = "benchmarks.gpu_suite.every_kernel"


class Suite:
    """The steps in order; each adds to ``results`` and says what failed."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.results: dict[str, Any] = {"steps": {}}
        self.environment = dict(os.environ)

    def left(self, reserve: float = 0.0) -> float:
        return max(1.0, self.deadline - time.perf_counter() - reserve)

    def step(self, name: str, command: list[str], most: float) -> bool:
        """Run a command; keep its end, its time, and whether it succeeded."""
        begin = time.perf_counter()
        try:
            run = subprocess.run(
                command,
                cwd=ROOT,
                env=self.environment,
                capture_output=True,
                text=True,
                timeout=min(most, self.left(20)),
            )
            code, output = run.returncode, run.stdout + run.stderr
        except subprocess.TimeoutExpired:
            code, output = 124, "no time was left"
        except OSError as error:
            code, output = 127, str(error)
        seconds = time.perf_counter() - begin
        self.results["steps"][name] = {
            "passed": code == 0,
            "code": code,
            "seconds": seconds,
            "output": output[-4000:] if code else output[-400:],
        }
        print(f"{name:28} {'passed' if code == 0 else f'FAILED ({code})':14} {seconds:6.1f} s")
        if code:
            print(output[-3000:])
        return code == 0

    def build(self) -> bool:
        """The library for this GPU alone, in a folder of its own."""
        major, minor = torch.cuda.get_device_capability()
        folder = ROOT / "build" / f"gpu_suite_sm_{major}{minor}"
        configure = ["cmake", "-S", str(ROOT), "-B", str(folder), "-DLORA_KERNELS_CUDA=ON"]
        configure += [f"-DCMAKE_CUDA_ARCHITECTURES={major}{minor}-real"]
        configure += [f"-DLORA_KERNELS_TORCH={torch.__path__[0]}"]
        configure += ["-G", "Ninja"] if shutil.which("ninja") else []
        jobs = str(os.cpu_count() or 4)
        built = self.step("configure", configure, 60) and self.step(
            "build", ["cmake", "--build", str(folder), "-j", jobs], 240
        )
        self.environment["LORA_KERNELS_LIBRARY"] = str(folder / "_torch.so")
        os.environ["LORA_KERNELS_LIBRARY"] = str(folder / "_torch.so")
        return built

    def tests(self) -> None:
        for path in (f"tests/gpu/test_{name}.py" for name in TESTS):
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", path]
            self.step(path, command, 150)

    def sanitize(self) -> None:
        """Our kernels alone, if this release's filter is as expected; torch's are many."""
        tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        for check in ("memcheck", "racecheck"):
            name = f"compute-sanitizer {check}"
            command = [tool, "--tool", check, "--error-exitcode", "1", "--print-limit", "20"]
            program = [sys.executable, "-m", SANITIZED]
            only_ours = ["--kernel-name", "kns=lora_kernels"]
            if not self.step(name, [*command, *only_ours, *program], 90):
                output = self.results["steps"][name]["output"]
                if "SUMMARY" not in output and self.results["steps"][name]["code"] != 124:
                    self.step(name, [*command, *program], 120)

    def measure(self, reserve: float) -> None:
        from lora_kernels import ops

        from . import machine, operators

        dtypes = [torch.float16]
        if torch.cuda.get_device_capability() >= (8, 0):
            dtypes += [torch.bfloat16, torch.float32]
        ceilings = machine.measure_ceilings(dtypes)
        self.results["ceilings"] = machine.as_dict(ceilings)
        self.results["benchmarks"] = rows = []
        deadline = self.deadline - reserve
        for result in operators.run(ops, ceilings, dtypes[min(1, len(dtypes) - 1)], deadline):
            rows.append(result)
            print(line_of(result))
        self.results["machine_after"] = machine.nvidia_smi()


def line_of(result: dict[str, Any]) -> str:
    """One line of the table: our time, the roofline, the ratio to every peer, the aim."""
    if "skipped" in result:
        return f"{result['name']:24} skipped: {result['skipped']}"
    ours, ratios = result["times"]["ours"], result["ratio"]
    text = f"{result['name']:24} {ours['p20_us']:8.1f} {ours['p50_us']:8.1f} {ours['p80_us']:8.1f}"
    text += f" us  roofline {100 * result['roofline_fraction']:4.0f} %  ours / "
    text += "  ".join(f"{name} {value:.2f}" for name, value in ratios.items())
    aim = result.get("aim")
    if aim:
        state = "reached" if aim["reached"] else "MISSED"
        text += f"  [{state}: at most {aim['at_most']:.2f} of {aim['against']}]"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_suite", description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where the results go")
    parser.add_argument("--skip-sanitizer", action="store_true")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        why = "this torch is a CPU build" if torch.version.cuda is None else "no device was found"
        print(f"gpu_suite: there is no GPU here ({why}); nothing was built, tested or measured")
        return 2
    from . import machine

    suite = Suite(time.perf_counter() + BUDGET_S)
    suite.results["machine"] = machine.facts()
    print(json.dumps(suite.results["machine"], indent=1))
    if suite.build():
        suite.tests()
        if not arguments.skip_sanitizer:
            suite.sanitize()
        suite.measure(reserve=15)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(suite.results, indent=1) + "\n")
    failed = [name for name, step in suite.results["steps"].items() if not step["passed"]]
    print(
        f"{arguments.json} written; " + (f"FAILED: {', '.join(failed)}" if failed else "all right")
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
