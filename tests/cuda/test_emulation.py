"""Faults that are planted in real kernels are caught by the emulation, each of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from emulated import ROOT, build, missing

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

ADDRESS = "-DLORA_KERNELS_SANITIZE=address,undefined"


def run_shapes(library: Path, *dtypes: str, sanitized: bool) -> subprocess.CompletedProcess[str]:
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
        [sys.executable, script, *dtypes], env=environment, capture_output=True, text=True
    )


def test_primitives_and_faults_in_small_kernels() -> None:
    """tests/cpp/emulation_test.cpp under AddressSanitizer and UndefinedBehaviorSanitizer."""
    program = build("emulation_test", ADDRESS)
    run = subprocess.run(
        [program],
        env=os.environ | {"ASAN_OPTIONS": "detect_leaks=0"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert "all checks passed" in run.stdout


@pytest.mark.slow
def test_kernels_under_sanitizers() -> None:
    """Every path on odd shapes; tensors and workspace end where their allocations do."""
    run = run_shapes(build("libcuda_emulated.so", ADDRESS), sanitized=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert "all right" in run.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "silent"), [("ordered", True), ("race", False), ("kernels", True)]
)
def test_races_under_thread_sanitizer(what: str, silent: bool) -> None:
    """A race that changes no result is seen; writes in order are none; our kernels have none."""
    program = build("emulation_race_test", "-DLORA_KERNELS_SANITIZE=thread")
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
    library = build("libcuda_emulated.so", f"-DCMAKE_CXX_FLAGS={flags.strip()}")
    monkeypatch.setenv("LORA_KERNELS_EMULATED_WITHOUT_WGMMA", "1")
    run = run_shapes(library, "float16", sanitized=False)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]


@dataclass(frozen=True)
class Fault:
    """A change of one place in csrc/cuda, and the words by which it must be found."""

    name: str
    file: str
    before: str
    after: str
    words: tuple[str, ...]
    sanitized: bool = False


FAULTS = [
    Fault(
        "missing barrier",
        "gemm.cuh",
        "      __syncthreads();  // step k has landed",
        "      // step k has landed",
        ("nothing has written", "relative error"),
    ),
    Fault(
        "wait too weak",
        "gemm.cuh",
        "wait_copies<kStages - 2>();",
        "wait_copies<kStages - 1>();",
        ("nothing has written", "relative error"),
    ),
    Fault(
        "buffer filled while it is read",
        "gemm.cuh",
        "fetch(k + kStages - 1, steps, adapters);",
        "fetch(k + kStages, steps, adapters);",
        ("relative error", "nothing has written"),
    ),
    Fault(
        "wrong fragment layout",
        "tile.h",
        "Tile::offset(row + lane / 16 * 8 + lane % 8, half * 2 + lane / 8 % 2)",
        "Tile::offset(row + lane / 8 % 2 * 8 + lane % 8, half * 2 + lane / 16)",
        ("relative error",),
    ),
    Fault(
        "registers in another order",
        "gemm.cuh",
        "product<T>(c_[i][j + 1], a[i], b[2], b[3], p_.precise);",
        "product<T>(c_[i][j + 1], a[i], b[3], b[2], p_.precise);",
        ("relative error",),
    ),
    Fault(
        "read of what nothing wrote",
        "gemm.cuh",
        "if (k == base_steps_ - 1) keep_t();",
        "if (k == base_steps_) keep_t();",
        ("nothing has written",),
    ),
    Fault(
        "parts read before all are there",
        "skinny.cuh",
        "c[j][e];\n  __syncthreads();",
        "c[j][e];",
        ("relative error", "nan"),
    ),
    Fault(
        "swizzle that one side lacks",
        "tile.h",
        "char* to = tile + Tile::offset(r, chunk);",
        "char* to = tile + (r * Tile::kChunks + chunk) * 16;",
        ("relative error",),
    ),
    Fault(
        "swizzle that spreads nothing",
        "tile.h",
        "if constexpr (kChunks == 4) return row >> 1 & 3;",
        "if constexpr (kChunks == 4) return 0;",
        ("bank conflicts",),
    ),
    Fault(
        "step of an adapter left out",
        "gemm.cuh",
        "m < row + kStep<T>;",
        "m < row + 1;",
        ("relative error",),
    ),
    Fault(
        "rows of dy read before all are there",
        "dy_once.cuh",
        "      __syncthreads();  // step k has landed",
        "      // step k has landed",
        ("gradients",),
    ),
    Fault(
        "factor replaced while it is read",
        "dy_once.cuh",
        "b_ + k / rows_ % kStages * B::kBytes, b, begin_, column",
        "b_, b, begin_, column",
        ("gradients",),
    ),
    Fault(
        "products taken before they are done",
        "gemm_wgmma.cuh",
        "    wait_products<0>();\n",
        "",
        ("wgmma",),
    ),
    Fault(
        "operands replaced while products read them",
        "gemm_wgmma.cuh",
        "wait_products<1>();  // step k - 1",
        "wait_products<3>();  // step k - 1",
        ("wgmma",),
    ),
    Fault(
        "boxes that are not waited for",
        "gemm_wgmma.cuh",
        "wait_for_bytes(landed_ + k % kStages, k / kStages & 1);",
        "wait_copies<0>();",
        ("wgmma",),
    ),
    Fault(
        "products without their fence",
        "gemm_wgmma.cuh",
        "    wgmma_fence();\n",
        "",
        ("wgmma without wgmma_fence()",),
    ),
    Fault(
        "copies that the products' proxy does not see",
        "gemm_wgmma.cuh",
        "      fence_proxy();\n",
        "",
        ("has not fenced for its proxy",),
    ),
    Fault(
        "wrong stride in a descriptor",
        "primitives/wgmma.h",
        "uint64_t{1024 >> 4} << 32",
        "uint64_t{512 >> 4} << 32",
        ("wgmma",),
    ),
    Fault(
        "wrong swizzle in a descriptor",
        "primitives/wgmma.h",
        "uint64_t{1} << 62",
        "uint64_t{2} << 62",
        ("128-byte swizzle alone",),
    ),
    Fault(
        "more shared memory than asked for",
        "gemm_shapes.h",
        "kTSteps * A::kBytes +",
        "0 +",
        ("bytes of shared memory, launched with",),
    ),
    Fault(
        "missing barrier of INT8 tiles",
        "int8_gemm.cuh",
        "    __syncthreads();\n    fetch(k + kStages - 1);",
        "    fetch(k + kStages - 1);",
        ("int8 tiled",),
    ),
    Fault(
        "steps of INT8 in another order",
        "int8_skinny.cuh",
        "at = s * 16 + t * 4 + i;",
        "at = s * 16 + t + i * 4;",
        ("int8 few_rows", "int8 fused"),
    ),
    Fault(
        "channels of B as they lie",
        "int8_gemm.cuh",
        "place / 32 * 32 + place % 8 * 4 + place % 32 / 8;",
        "place;",
        ("int8 tiled",),
    ),
    Fault(
        "statistics read before all are there",
        "int8_rows.cuh",
        "    if (lane_ == 0) memory[warp_] = v;\n    __syncthreads();",
        "    if (lane_ == 0) memory[warp_] = v;",
        ("int8",),
    ),
    Fault(
        "weight beyond its last block",
        "int8_gemm.cuh",
        "k * 16 + step < p_.w.steps && channel / 64 < p_.w.blocks();",
        "k * 16 + step < p_.w.steps;",
        ("heap-buffer-overflow", "lora_kernels::cuda::Int8Gemm<"),
        sanitized=True,
    ),
    Fault(
        "sums of warps read before all are there",
        "kv_attend.cuh",
        "    store_parts();\n    __syncthreads();",
        "    store_parts();",
        ("kv",),
    ),
    Fault(
        "places read before all are found",
        "kv_attend.cuh",
        "append(row);\n      __syncthreads();",
        "append(row);",
        ("kv",),
    ),
    Fault(
        "new tokens of other rows read from the cache",
        "kv_rows.cuh",
        "p >= first_new && place >= 0",
        "p > rows.capacity && place >= 0",
        ("others' new tokens",),
    ),
    Fault(
        "channels of V as they lie",
        "kv_attend.cuh",
        "j / 8 * 64 + (2 * t_ + e) * 8 + j % 8",
        "j * 8 + 2 * t_ + e",
        ("kv",),
    ),
    Fault(
        "positions of blocked scores as they lie",
        "kv_blocked.cuh",
        "const int position = at + 8 * t_ + 4 * e + j;",
        "const int position = at + 8 * j + 2 * t_ + e;",
        ("kv blocked",),
    ),
    Fault(
        "halves of weights exchanged",
        "kv_blocked.cuh",
        "128 * sum[e] + sum[2 + e]",
        "128 * sum[2 + e] + sum[e]",
        ("kv blocked",),
    ),
    Fault(
        "sums that no larger score scales",
        "kv_attend.cuh",
        "sums_[j][2 * i] *= share, sums_[j][2 * i + 1] *= share;",
        "sums_[j][2 * i] *= 1, sums_[j][2 * i + 1] *= 1;",
        ("kv",),
    ),
    Fault(
        "what one query does not see reaches it",
        "kv_attend.cuh",
        "if (g_ + 8 * (e / 2) != only) sums_",
        "if (false) sums_",
        ("not see",),
    ),
    Fault(
        "bytes of a tile overwritten while they are read",
        "kv_pack.cuh",
        "word;\n      }\n    }\n    __syncthreads();",
        "word;\n      }\n    }",
        ("kv pack",),
    ),
    Fault(
        "slot that is followed",
        "kv_rows.cuh",
        "slot >= 0 && slot < cache_rows ? slot : -1;",
        "slot;",
        ("AddressSanitizer", "lora_kernels::cuda::"),
        sanitized=True,
    ),
    Fault(
        "position beyond V",
        "kv_blocked.cuh",
        "step < p_.value_steps && channel",
        "step < p_.value_steps + 1 && channel",
        ("heap-buffer-overflow", "lora_kernels::cuda::KvBlocked<"),
        sanitized=True,
    ),
    Fault(
        "row beyond the result",
        "gemm.cuh",
        "if (row < p_.rows && column < p_.columns)",
        "if (row <= p_.rows && column < p_.columns)",
        ("heap-buffer-overflow", "lora_kernels::cuda::gemm<"),
        sanitized=True,
    ),
    Fault(
        "index beyond the factor",
        "gemm_shapes.h",
        "left = n + column < columns ? rank - r : 0;",
        "left = rank - r;",
        ("heap-buffer-overflow", "lora_kernels::cuda::gemm<"),
        sanitized=True,
    ),
    Fault(
        "shared memory of a neighbour",
        "skinny.cuh",
        "mine[(g + e / 2 * 8) * kWidth",
        "mine[(g + 1 + e / 2 * 8) * kWidth",
        ("use-after-poison", "lora_kernels::cuda::"),
        sanitized=True,
    ),
]


@pytest.fixture(scope="session")
def copy_of_sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all faults, so that each builds what it touches and not everything."""
    folder = tmp_path_factory.mktemp("planted")
    for part in ("csrc", "tests/cpp"):
        shutil.copytree(ROOT / part, folder / part)
    shutil.copy(ROOT / "CMakeLists.txt", folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name.replace(" ", "-"))
def test_planted_faults_are_caught(fault: Fault, copy_of_sources: Path) -> None:
    path = copy_of_sources / "csrc" / "cuda" / fault.file
    source = path.read_text()
    assert source.count(fault.before) == 1, f"{fault.file} no longer has {fault.before!r} once"
    options = ["-DLORA_KERNELS_F16_ALONE=ON", *([ADDRESS] if fault.sanitized else [])]
    folder = copy_of_sources / ("sanitized" if fault.sanitized else "plain")
    path.write_text(source.replace(fault.before, fault.after))
    try:
        library = build("libcuda_emulated.so", *options, sources=copy_of_sources, folder=folder)
        run = run_shapes(library, "float16", sanitized=fault.sanitized)
    finally:
        path.write_text(source)
    text = run.stdout + run.stderr
    assert run.returncode != 0, f"{fault.name} was not caught"
    found = [word in text for word in fault.words]
    assert all(found) if fault.sanitized else any(found), text[-3000:]
