"""The C++ tests of the core, and which way its includes point."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"

# Folder to the folders it may include from, besides itself and the contract.
ALLOWED = {
    "include": set(),
    "cpu": set(),
    "cuda": set(),
    "core": {"cpu", "cuda"},
    "bindings": set(),
}
FORBIDDEN_BELOW_BINDINGS = ("torch/", "ATen/", "c10/", "pybind11/", "NvInfer", "Python.h")


def _sources() -> list[Path]:
    return sorted(p for p in CSRC.rglob("*") if p.suffix in {".h", ".cpp", ".inl", ".cu", ".cuh"})


@pytest.mark.parametrize("path", _sources(), ids=lambda p: str(p.relative_to(CSRC)))
def test_includes_point_up(path: Path) -> None:
    folder = path.relative_to(CSRC).parts[0]
    for include in re.findall(r'#include [<"]([^>"]+)[>"]', path.read_text()):
        head = include.split("/")[0]
        if folder != "bindings":
            assert not include.startswith(FORBIDDEN_BELOW_BINDINGS), f"{path} includes {include}"
        if head in ALLOWED and head != folder:
            assert head in ALLOWED[folder], f"{path} in {folder}/ includes {include}"
        if folder == "include" and "/" in include:
            assert head == "lora_kernels", f"the contract includes {include}"


def test_every_source_is_listed_once() -> None:
    """CMakeLists.txt holds the only list of sources."""
    listed = [line.strip() for line in (ROOT / "CMakeLists.txt").read_text().splitlines()]
    for path in _sources():
        if path.suffix == ".cpp":
            assert listed.count(str(path.relative_to(ROOT))) == 1, f"{path.name} in CMakeLists.txt"


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize(
    ("sanitizers", "tests"),
    [
        ("address,undefined", ["core_test", "composite_test", "cuda_plan_test", "transcribe_test"]),
        # Only where threads meet: the sanitizer makes everything else ten times slower.
        ("thread", ["composite_test"]),
    ],
)
def test_core_under_sanitizers(tmp_path: Path, sanitizers: str, tests: list[str]) -> None:
    """Builds tests/cpp with sanitizers and runs it."""
    if shutil.which("cmake") is None or shutil.which("g++") is None:
        pytest.skip("cmake or g++ is not installed")
    configure = ["cmake", "-S", ROOT, "-B", tmp_path, "-DLORA_KERNELS_TESTS=ON"]
    configure.append(f"-DLORA_KERNELS_SANITIZE={sanitizers}")
    if os.environ.get("TENSORRT_INCLUDE_DIR") and sanitizers.startswith("address"):
        tests = [*tests, "tensorrt_test"]
    if shutil.which("ninja"):
        configure += ["-G", "Ninja"]
    subprocess.run(configure, check=True, capture_output=True)
    build = ["cmake", "--build", tmp_path, "-j", "2", "--target", *tests]
    subprocess.run(build, check=True, capture_output=True)
    for test in tests:
        run = subprocess.run([tmp_path / test], capture_output=True, text=True)
        assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
        assert "all checks passed" in run.stdout
