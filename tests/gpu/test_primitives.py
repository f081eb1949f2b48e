"""Every primitive on random registers, on the GPU and in the emulation, which share one reading of
the PTX ISA: the first thing to run where there is a GPU.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cuda"))

from emulated import ROOT, TOOLKIT, missing

PRIMITIVES = [
    "ldmatrix",
    "ldmatrix.trans",
    "mma.f16",
    "mma.bf16",
    "mma.tf32",
    "mma.f16.k8",
    "mma.s8",
    "warp functions",
    "cp.async",
    "conversions",
    "activations",
    "dropout",
    "wgmma.f16.n128",
    "wgmma.f16.n256",
    "wgmma.bf16.n128",
    "wgmma.bf16.n256",
    "tma",
    "wgmma.f16.n128 across",
    "wgmma.f16.n256 across",
    "wgmma.bf16.n128 across",
    "wgmma.bf16.n256 across",
    "wgmma.s8.n128",
    "tma of planes",
    "tma of a cluster",
    "send16 in a cluster",
    "wgmma.s8.n256",
    "wgmma.s8.n160",
]
# Sums in another order, and approximations of exp2 and the reciprocal; everything else is exact.
ROUNDED = {"mma.f16", "mma.bf16", "mma.tf32", "mma.f16.k8", "activations"}
ROUNDED |= {name for name in PRIMITIVES if name.startswith("wgmma") and "s8" not in name}

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())


def compiled(folder: Path, *, device: bool) -> ctypes.CDLL:
    source = ROOT / "tests" / "cpp" / "cuda_primitives.cu"
    includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}"]
    out = folder / f"primitives_{'device' if device else 'host'}.so"
    if device:
        nvcc = shutil.which("nvcc") or str(TOOLKIT / "bin" / "nvcc")
        major, minor = torch.cuda.get_device_capability()
        feature = "a" if (major, minor) == (9, 0) else ""  # wgmma is of sm_90a alone
        arch = f"-arch=sm_{major}{minor}{feature}"
        command = [nvcc, "-std=c++17", arch, "-shared", "-Xcompiler", "-fPIC"]
        command += [*includes, "-o", str(out), str(source)]
    else:
        emulation = ROOT / "csrc" / "cuda" / "emulation"
        command = ["g++", "-std=c++17", "-O1", "-fPIC", "-shared", "-w", "-DLORA_KERNELS_EMULATION"]
        command += [*includes, f"-I{TOOLKIT / 'include'}", "-o", str(out)]
        command += [str(part) for part in emulation.glob("*.cpp")]
        command += ["-x", "c++", str(source)]
    subprocess.run(command, check=True, capture_output=True, env=os.environ)
    return ctypes.CDLL(str(out))


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compiled(tmp_path_factory.mktemp("host"), device=False)


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if not torch.cuda.is_available():
        pytest.skip("no GPU: the emulation alone was checked")
    return compiled(tmp_path_factory.mktemp("device"), device=True)


def registers(name: str, seed: int) -> torch.Tensor:
    """512 words: small numbers of the right type where they are multiplied, else anything."""
    g = torch.Generator().manual_seed(seed)
    words = torch.randint(-(2**31), 2**31 - 1, (32, 16), generator=g, dtype=torch.int32)
    if name.startswith("wgmma") and "s8" not in name:
        kind = torch.bfloat16 if "bf16" in name else torch.float16
        chosen = words[0, :2].clone()
        words = torch.randn(32, 32, generator=g).to(kind).view(torch.int32)
        words[0, :2] = chosen & 0x3FFF3FFF  # which sums are looked at, and small numbers
    if name.startswith("mma") and name != "mma.s8":
        kind = {"mma.bf16": torch.bfloat16, "mma.tf32": torch.float32}.get(name, torch.float16)
        per_word = 4 // torch.empty(0, dtype=kind).element_size()
        values = torch.randn(32, 6 * per_word, generator=g).to(kind)
        words[:, :6] = values.view(torch.int32)
        words[:, 6:10] = torch.randn(32, 4, generator=g).view(torch.int32)
    if name == "mma.s8":
        words[:, 6:10] = torch.randint(-1000, 1000, (32, 4), generator=g, dtype=torch.int32)
    if name in ("activations", "conversions"):
        words[:] = (8 * torch.randn(32, 16, generator=g)).view(torch.int32)
    return words.contiguous()


def run(library: ctypes.CDLL, which: int, words: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(32, 8, dtype=torch.int32)
    failed = library.run_primitive(
        which, ctypes.c_void_p(words.data_ptr()), ctypes.c_void_p(out.data_ptr())
    )
    assert failed == 0, f"{PRIMITIVES[which]} did not run"
    return out


@pytest.mark.parametrize("name", PRIMITIVES)
def test_primitives_run_in_the_emulation(host: ctypes.CDLL, name: str) -> None:
    which = PRIMITIVES.index(name)
    out = run(host, which, registers(name, 1))
    assert out.any(), "it writes something"
    assert torch.equal(out, run(host, which, registers(name, 1)))
    assert not torch.equal(out, run(host, which, registers(name, 2)))


@pytest.mark.parametrize("name", PRIMITIVES)
def test_device_and_emulation_agree(device: ctypes.CDLL, host: ctypes.CDLL, name: str) -> None:
    which = PRIMITIVES.index(name)
    if name in ("mma.bf16", "mma.tf32", "mma.s8") and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("sm_80 has it, this device does not")
    if name.startswith(("tma", "send16")) and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("sm_90 has it, this device does not")
    if name.startswith("wgmma") and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("sm_90 has it, this device does not")
    for seed in range(20):
        words = registers(name, seed)
        got, want = run(device, which, words), run(host, which, words)
        if name not in ROUNDED:
            assert torch.equal(got, want)
            continue
        got, want = got.view(torch.float32).double(), want.view(torch.float32).double()
        assert (got - want).abs().max() <= 2e-5 * want.abs().max().clamp_min(1)
        if name == "activations":  # which keep their precision far below zero (activation.h)
            assert ((got - want).abs() <= 2e-6 * want.abs() + 2.0**-127).all()
