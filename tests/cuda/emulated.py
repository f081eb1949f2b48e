"""The CUDA kernels of ``lora_linear`` compiled for the host, and calls of them on CPU tensors."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
TOOLKIT = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
ACTIVATIONS = {"none": 0, "gelu": 1, "silu": 2}
PATHS = {"base": 0, "two_steps": 1, "in_tile": 2, "few_rows": 3}
ORDERS = {"forward": 0, "reverse": 1, "shuffled": 2}

_INTEGERS = """rows in_features out_features dtype bias_dtype activation has_bias has_residual
adapters total_rank max_rank groups lora_dtype allow_tf32 arch path large_tiles splits x_stride
weight_stride
a_stride b_stride_rank b_stride_out dropout_seed needs_dx needs_dweight needs_dbias
needs_dlora with_t dy_once t_blocks"""
_POINTERS = """x weight bias lora_a lora_b scales offsets adapter_ids residual dy t y dx dweight
dbias dlora_a dlora_b"""


class Call(ctypes.Structure):
    """The twin of ``Call`` in tests/cpp/cuda_emulated.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _INTEGERS.split()),
        ("dropout_p", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in _POINTERS.split()),
    ]


def missing() -> str:
    """Why the kernels cannot be emulated here; empty if they can."""
    if shutil.which("g++") is None or shutil.which("cmake") is None:
        return "g++ or cmake is not installed"
    if not (TOOLKIT / "include" / "cuda_fp16.h").is_file():
        return f"no CUDA toolkit headers in {TOOLKIT} (set CUDA_HOME)"
    return ""


def build(target: str, *options: str, sources: Path = ROOT, folder: Path | None = None) -> Path:
    """Build a target of the emulation; kept under build/ for as long as the sources stay.

    A folder of the caller's own is brought up to date with its sources.
    """
    own = folder is not None
    folder = folder or ROOT / "build" / "emulation" / _digest(sources, options)
    built = folder / target
    folder.mkdir(parents=True, exist_ok=True)
    # Tests run in several processes, which want the same build: the first makes it, others wait.
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if own or not built.is_file():
            _make(target, options, sources, folder)
    return built


def _digest(sources: Path, options: tuple[str, ...]) -> str:
    digest = hashlib.sha256(" ".join(options).encode())
    for part in ("csrc", "tests/cpp"):
        for path in sorted((sources / part).rglob("*")):
            if path.suffix in {".h", ".cuh", ".cu", ".cpp"}:
                digest.update(path.read_bytes())
    digest.update((sources / "CMakeLists.txt").read_bytes())
    return digest.hexdigest()[:16]


def _make(target: str, options: tuple[str, ...], sources: Path, folder: Path) -> None:
    configure = ["cmake", "-S", sources, "-B", folder, "-DLORA_KERNELS_EMULATION=ON", *options]
    configure += ["-G", "Ninja"] if shutil.which("ninja") else []
    jobs = os.environ.get("MAX_JOBS", "2")
    name = Path(target).stem.removeprefix("lib")
    make = ["cmake", "--build", folder, "-j", jobs, "--target", name]
    for command in ([*configure, f"-DCUDA_HOME={TOOLKIT}"], make):
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]


@cache
def library() -> ctypes.CDLL:
    """The emulated library, built on first use; LORA_KERNELS_EMULATED names another one."""
    return ctypes.CDLL(os.environ.get("LORA_KERNELS_EMULATED") or build("libcuda_emulated.so"))


class EmulationError(RuntimeError):
    """The emulation refused what a kernel did, or a plan could not be made."""


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _call(
    x, weight, bias, lora_a, lora_b, scales, offsets, adapter_ids, dropout_p, dropout_seed, path,
    large, splits, arch, allow_tf32, max_rank,
) -> Call:  # fmt: skip
    call = Call()
    call.rows, call.in_features = x.shape
    call.out_features = weight.shape[0]
    call.dtype = DTYPES[x.dtype]
    call.x_stride, call.weight_stride = x.stride(0), weight.stride(0)
    call.arch, call.allow_tf32 = arch, allow_tf32
    call.path = PATHS[path] if path else -1
    call.large_tiles, call.splits = large, splits
    call.x, call.weight = x.data_ptr(), weight.data_ptr()
    if bias is not None:
        call.has_bias, call.bias, call.bias_dtype = 1, bias.data_ptr(), DTYPES[bias.dtype]
    if lora_a is not None:
        call.adapters = 1 if offsets is None else offsets.numel() - 1
        call.total_rank = lora_a.shape[0]
        ranks = [call.total_rank] if offsets is None else offsets.diff().tolist()
        call.max_rank = max_rank or max(ranks)
        call.groups = 0 if adapter_ids is None else adapter_ids.numel()
        call.lora_dtype = DTYPES[lora_a.dtype]
        call.a_stride = lora_a.stride(0)
        call.b_stride_rank, call.b_stride_out = lora_b.stride()
        call.lora_a, call.lora_b = lora_a.data_ptr(), lora_b.data_ptr()
        call.scales, call.offsets = _pointer(scales), _pointer(offsets)
        call.adapter_ids = _pointer(adapter_ids)
    call.dropout_p = dropout_p
    call.dropout_seed = 0 if dropout_seed is None else int(dropout_seed)
    return call


def _run(function, call: Call) -> str:
    message = ctypes.create_string_buffer(4000)
    failed = function(ctypes.byref(call), message, ctypes.c_int64(len(message)))
    text = message.value.decode()
    if failed:
        raise EmulationError(text)
    return text


class Emulated:
    """The kernels of one build, in one order of threads.

    Parameters
    ----------
    order, seed
        "forward", "reverse" or "shuffled" (drawn by the seed).
    path, large, splits
        The plan, chosen by hand; ``path=None``: what the heuristic takes. ``large`` 128 or 256:
        tiles by wgmma, so wide.
    keeps_t
        The forward pass hands out its t, and the backward pass behind it takes it from there.
    t_blocks
        So many blocks make t in half the registers, for at most sixteen ranks; 0: a block for each
        sixteen rows.
    dy_once
        With a path: whether u and dB come from one reading of dy, where they can.
    """

    def __init__(
        self,
        order: str = "forward",
        seed: int = 1,
        *,
        path: str | None = None,
        large: int = False,
        splits: int = 1,
        arch: int = 90,
        allow_tf32: bool = False,
        max_rank: int = 0,
        keeps_t: bool = False,
        dy_once: bool | None = None,
        t_blocks: int = 0,
        lib: ctypes.CDLL | None = None,
    ) -> None:
        self.lib = lib or library()
        self.order, self.seed = ORDERS[order], seed
        self.plan = ""
        self.keeps_t, self.dy_once = keeps_t, -1 if dy_once is None else int(dy_once)
        self.t_blocks = t_blocks
        self.t: torch.Tensor | None = None
        self.wishes = (path, large, splits, arch, allow_tf32, max_rank)

    def _prepare(self) -> None:
        self.lib.emulated_order(ctypes.c_int(self.order), ctypes.c_uint64(self.seed))

    def forward(
        self, x, weight, bias=None, *, lora_a=None, lora_b=None, scales=None, offsets=None,
        adapter_ids=None, residual=None, activation="none", dropout_p=0.0, dropout_seed=None,
    ) -> torch.Tensor:  # fmt: skip
        """``lora_linear`` with the arguments of the reference, on rows [M, K]."""
        call = _call(
            x, weight, bias, lora_a, lora_b, scales, offsets, adapter_ids, dropout_p, dropout_seed,
            *self.wishes,
        )  # fmt: skip
        y = torch.full((x.shape[0], weight.shape[0]), float("nan"), dtype=x.dtype)
        call.activation = ACTIVATIONS[activation]
        call.has_residual, call.residual = int(residual is not None), _pointer(residual)
        call.y, call.t_blocks = y.data_ptr(), self.t_blocks
        if self.keeps_t and lora_a is not None:
            width = (lora_a.shape[0] + 15) // 16 * 16
            self.t = torch.full((x.shape[0], width), float("nan"), dtype=x.dtype)
            call.with_t, call.t = 1, self.t.data_ptr()
        self._prepare()
        self.plan = _run(self.lib.emulated_forward, call)
        return y

    def backward(
        self, dy, x, weight, *, lora_a=None, lora_b=None, scales=None, offsets=None,
        adapter_ids=None, dropout_p=0.0, dropout_seed=None, needs="dx dweight dbias dlora",
    ) -> dict[str, torch.Tensor]:  # fmt: skip
        """The gradients that ``needs`` names."""
        call = _call(
            x, weight, None, lora_a, lora_b, scales, offsets, adapter_ids, dropout_p, dropout_seed,
            *self.wishes,
        )  # fmt: skip
        nan = float("nan")
        out = {
            "dx": torch.full(x.shape, nan, dtype=x.dtype),
            "dweight": torch.full(weight.shape, nan),
            "dbias": torch.full((weight.shape[0],), nan),
        }
        if lora_a is not None:
            out["dlora_a"] = torch.full(lora_a.shape, nan)
            out["dlora_b"] = torch.full(lora_b.shape, nan)
        for name in needs.split():
            setattr(call, f"needs_{name}", 1)
        for name, tensor in out.items():
            setattr(call, name, tensor.data_ptr())
        call.dy, call.dy_once = dy.data_ptr(), self.dy_once
        if self.keeps_t and lora_a is not None:
            assert self.t is not None, "the forward pass comes first"
            call.with_t, call.t = 1, self.t.data_ptr()
        self._prepare()
        self.plan = _run(self.lib.emulated_backward, call)
        return out


@contextmanager
def held() -> Iterator[None]:
    """Calls whose last kernel runs only when the next call's first is there, or at the end.

    A block of a kernel that may start early then runs before the kernel before it, as far as to
    its wait. Operands and results have to be kept until the end, and not be looked at before.
    """
    lib = library()
    lib.emulated_hold()
    message = ctypes.create_string_buffer(4000)
    try:
        yield
    finally:
        failed = lib.emulated_finish(message, ctypes.c_int64(len(message)))
    if failed:
        raise EmulationError(message.value.decode())
