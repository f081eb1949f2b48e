"""Faults that are planted in real kernels are caught by the emulation, each of them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from emulated import ROOT, build, missing
from planted_faults import FAULTS, Fault

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

# With sanitizers the compiler takes three times as long for -O1.
QUICKLY = "-DLORA_KERNELS_EMULATION_OPTIONS=-Og;-g0"
ADDRESS = ("-DLORA_KERNELS_SANITIZE=address,undefined", "-DLORA_KERNELS_EMULATION_OPTIONS=-Og;-g1")
F16_ALONE = "-DLORA_KERNELS_TYPES=f16"  # what is not called is not built
# Going from one file to another compiles what includes either.
BY_FILE = sorted(FAULTS, key=lambda fault: (fault.sanitized, fault.file))


def run_shapes(
    library: Path, *options: str, sanitized: bool = False
) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"LORA_KERNELS_EMULATED": str(library)}
    if sanitized:
        found = subprocess.run(
            ["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
        )
        # The interpreter and torch leak by design, and torch is not watched.
        environment |= {
            "LD_PRELOAD": found.stdout.strip(),
            "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0",
        }
    script = ROOT / "tests" / "cuda" / "run_shapes.py"
    return subprocess.run(
        [sys.executable, script, *options], env=environment, capture_output=True, text=True
    )


def test_primitives_and_faults_in_small_kernels() -> None:
    """tests/cpp/emulation_test.cpp under AddressSanitizer and UndefinedBehaviorSanitizer."""
    program = build("emulation_test", *ADDRESS)
    run = subprocess.run(
        [program],
        env=os.environ | {"ASAN_OPTIONS": "detect_leaks=0"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert "all checks passed" in run.stdout


@pytest.mark.slow
@pytest.mark.faults
def test_kernels_under_sanitizers() -> None:
    """Every path on odd shapes; tensors and workspace end where their allocations do.

    In elements of both sizes, since bf16 goes where fp16 does; and in one order of threads, since
    addresses are the same in all.
    """
    library = build("libcuda_emulated.so", *ADDRESS, "-DLORA_KERNELS_TYPES=f16;f32")
    shapes = ["--dtype", "float16", "float32", "--orders", "1"]
    run = run_shapes(library, *shapes, sanitized=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert "all right" in run.stdout


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize(
    ("what", "silent"), [("ordered", True), ("race", False), ("kernels", True)]
)
def test_races_under_thread_sanitizer(what: str, silent: bool) -> None:
    """A race that changes no result is seen; writes in order are none; our kernels have none."""
    program = build("emulation_race_test", "-DLORA_KERNELS_SANITIZE=thread", F16_ALONE)
    # Where addresses are laid out at random beyond what the sanitizer expects, it cannot start.
    run = subprocess.run(
        ["setarch", "-R", program, what], capture_output=True, text=True, timeout=300
    )
    text = run.stdout + run.stderr
    assert ("WARNING: ThreadSanitizer: data race" in text) != silent, text[-3000:]
    if silent:
        assert run.returncode == 0, text[-3000:]
        assert "all checks passed" in text


@pytest.mark.slow
def test_kernels_of_sm_75(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp16 in products of eight steps of depth, all that sm_75 has."""
    flags = os.environ.get("CXXFLAGS", "") + " -DLORA_KERNELS_EMULATED_ARCH=75"
    options = (F16_ALONE, f"-DCMAKE_CXX_FLAGS={flags.strip()}")
    library = build("libcuda_emulated.so", *options)
    monkeypatch.setenv("LORA_KERNELS_EMULATED_WITHOUT_WGMMA", "1")
    run = run_shapes(library, "--dtype", "float16")
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]


@pytest.fixture(scope="session")
def run_without_sanitizers(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[..., tuple[int, str]]]:
    """run_shapes on a library, in a process that has torch already."""
    script = ROOT / "tests" / "cuda" / "run_shapes.py"
    output = tmp_path_factory.mktemp("planted") / "output"
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, script, "--serve"], stdin=pipe, stdout=pipe, text=True
    ) as server:
        assert server.stdin is not None and server.stdout is not None

        def run(library: Path, *options: str) -> tuple[int, str]:
            print(json.dumps([str(library), str(output), *options]), file=server.stdin, flush=True)
            return int(server.stdout.readline()), output.read_text()

        yield run
        server.stdin.close()


@pytest.fixture(scope="session")
def copy_of_sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all faults, so that each builds what it touches and not everything."""
    folder = tmp_path_factory.mktemp("planted")
    for part in ("csrc", "tests/cpp"):
        shutil.copytree(ROOT / part, folder / part)
    shutil.copy(ROOT / "CMakeLists.txt", folder)
    return folder


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("fault", BY_FILE, ids=lambda fault: fault.name.replace(" ", "-"))
def test_planted_faults_are_caught(
    fault: Fault, copy_of_sources: Path, run_without_sanitizers: Callable[..., tuple[int, str]]
) -> None:
    path = copy_of_sources / "csrc" / "cuda" / fault.file
    source = path.read_text()
    assert source.count(fault.before) == 1, f"{fault.file} no longer has {fault.before!r} once"
    options = [F16_ALONE, QUICKLY]
    options += ["-DLORA_KERNELS_SANITIZE=address"] if fault.sanitized else []
    folder = copy_of_sources / ("sanitized" if fault.sanitized else "plain")
    path.write_text(source.replace(fault.before, fault.after))
    try:
        library = build("libcuda_emulated.so", *options, sources=copy_of_sources, folder=folder)
        shapes = ["--dtype", "float16", "--operator", fault.operator, "--first"]
        if fault.sanitized:
            run = run_shapes(library, *shapes, sanitized=True)
            status, text = run.returncode, run.stdout + run.stderr
        else:
            status, text = run_without_sanitizers(library, *shapes)
    finally:
        path.write_text(source)
    assert status != 0, f"{fault.name} was not caught"
    assert "WRONG: " in text or "AddressSanitizer" in text, text[-3000:]
    found = [word in text for word in fault.words]
    assert all(found) if fault.sanitized else any(found), text[-3000:]
