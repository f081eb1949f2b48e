"""The library with its CUDA kernels compiles and loads where torch is a CPU build."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from emulated import ROOT, TOOLKIT

NVCC = shutil.which("nvcc") or shutil.which("nvcc", path=str(TOOLKIT / "bin"))

# For machines without a GPU, or from which CUDA_VISIBLE_DEVICES hides it.
LOADED = """
import sys, torch, lora_kernels as lk
from lora_kernels import implementations, ops
build, rows = implementations.describe()
assert build.without_cuda == "", build.without_cuda
has = torch._C._dispatch_has_kernel_for_dispatch_key
assert has("lora_kernels::lora_linear", "CUDA")
assert has("lora_kernels::lora_linear_backward", "CUDA")
assert ops.Composite.runs_on(torch.device("cuda"))
row = next(r for r in rows if r.op == "lora_linear" and r.name == "cuda")
assert not row.available and "could not be asked" in row.reason, row  # there is no driver here
x, w = torch.randn(3, 5), torch.randn(4, 5)
assert torch.allclose(ops.lora_linear(x, w), x @ w.T, atol=1e-5)
assert not torch.cuda.is_initialized()
print("loaded")
"""


pytestmark = pytest.mark.timeout(1800)  # whoever comes first builds the whole library


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both bindings, with the kernels of one architecture."""
    if NVCC is None or shutil.which("cmake") is None:
        pytest.skip("nvcc or cmake is not installed")
    include = Path(sysconfig.get_paths()["include"], "Python.h")
    raw = "ON" if include.is_file() else "OFF"
    folder = Path(os.environ.get("LORA_KERNELS_CUDA_BUILD") or tmp_path_factory.mktemp("cuda"))
    configure = ["cmake", "-S", ROOT, "-B", folder, "-DLORA_KERNELS_CUDA=ON"]
    configure += ["-DCMAKE_CUDA_ARCHITECTURES=80-real", f"-DCMAKE_CUDA_COMPILER={NVCC}"]
    # No kernel runs here; as shipped they take four times as long (`make cuda-check`).
    configure += ["-DCMAKE_CUDA_FLAGS=-Xcicc -O0 -Xptxas -O0"]
    configure += [f"-DLORA_KERNELS_RAW={raw}", f"-DPython_EXECUTABLE={sys.executable}"]
    configure += [f"-DLORA_KERNELS_TORCH={torch.__path__[0]}"]
    configure += ["-G", "Ninja"] if shutil.which("ninja") else []
    jobs = os.environ.get("MAX_JOBS", "2")
    for command in (configure, ["cmake", "--build", folder, "-j", jobs]):
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-2000:]
    return folder


@pytest.mark.slow
def test_the_library_loads_without_a_gpu(built: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", LOADED],
        env=os.environ
        | {"LORA_KERNELS_LIBRARY": str(built / "_torch.so"), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "loaded" in run.stdout


# Every way in which a bank and a seed are given to the raw module, on the CPU.
RAW_ARGUMENTS = """
import numpy as np, _raw as r
M, K, N, R = 3, 8, 70, 2
draw = np.random.default_rng(0).standard_normal
x, w, a, b = (draw(s).astype(np.float32) for s in ((M, K), (N, K), (R, K), (R, N)))
blocks = np.zeros((2, R, 64), np.float32)  # b in blocks of 64 columns
blocks[0], blocks[1, :, : N - 64] = b[:, :64], b[:, 64:]
lora = r.LoraShape(adapters=1, total_rank=R, max_rank=R, dtype=r.DType.float32)
problem = r.LoraLinearProblem(rows=M, in_features=K, out_features=N, lora=lora, dropout_p=0.0)
plan = r.plan(problem, r.host_device())
memory = np.empty(plan.workspace_bytes + 64, np.uint8)
fixed = dict(
    x=x.ctypes.data, x_stride=K, weight=w.ctypes.data, weight_stride=K, lora_a=a.ctypes.data,
    a_stride=K, b_stride_out=1, workspace=memory.ctypes.data + -memory.ctypes.data % 64,
)
want = x @ w.T + (x @ a.T) @ b
for bank in (
    dict(lora_b=b.ctypes.data, b_stride_rank=N),
    dict(lora_b=blocks.ctypes.data, b_stride_rank=64, b_stride_block=R * 64),
):
    y = np.full((M, N), np.nan, np.float32)
    r.run(plan, **fixed, **bank, y=y.ctypes.data)
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4)
backward = r.plan(
    r.LoraLinearBackwardProblem(forward=problem, needs_dx=True), r.host_device()
)
dx, seed = np.empty((M, K), np.float32), np.zeros(1, np.int64)
for chosen, more in (
    (plan, dict(y=y.ctypes.data)), (backward, dict(dy=y.ctypes.data, dx=dx.ctypes.data))
):
    try:
        r.run(
            chosen, **fixed, **more, lora_b=b.ctypes.data, b_stride_rank=N,
            dropout_seed_on_device=seed.ctypes.data,
        )
    except RuntimeError as error:
        assert "dropout_seed_on_device: expected null on a CPU" in str(error), error
    else:
        raise AssertionError("a seed on a device was left unread")
try:
    r.run(
        backward, **fixed, dy=y.ctypes.data, dx=dx.ctypes.data, lora_b=blocks.ctypes.data,
        b_stride_rank=64, b_stride_block=R * 64,
    )
except RuntimeError as error:
    assert "where gradients are needed" in str(error), error
else:
    raise AssertionError("gradients took a bank of blocks")
# t of the forward pass, handed to the backward pass.
t = np.full((M, r.kept_t_columns(lora)), np.nan, np.float32)
keeping = r.LoraLinearProblem(
    rows=M, in_features=K, out_features=N, lora=lora, keeps_t=True
)
by_rank = dict(lora_b=b.ctypes.data, b_stride_rank=N)
r.run(r.plan(keeping, r.host_device()), **fixed, **by_rank, y=y.ctypes.data, t=t.ctypes.data)
np.testing.assert_allclose(t[:, :R], x @ a.T, rtol=1e-4, atol=1e-4)
da, db = np.empty((R, K), np.float32), np.empty((R, N), np.float32)
backward = r.plan(
    r.LoraLinearBackwardProblem(forward=problem, needs_dlora=True, has_t=True), r.host_device()
)
more = np.empty(backward.workspace_bytes + 64, np.uint8)
fixed["workspace"] = more.ctypes.data + -more.ctypes.data % 64
dy = draw((M, N)).astype(np.float32)
results = dict(dy=dy.ctypes.data, dlora_a=da.ctypes.data, dlora_b=db.ctypes.data)
r.run(backward, **fixed, **by_rank, **results, t=t.ctypes.data)
np.testing.assert_allclose(db, t[:, :R].T @ dy, rtol=1e-4, atol=1e-4)
np.testing.assert_allclose(da, (dy @ b.T).T @ x, rtol=1e-4, atol=1e-4)
try:
    r.run(backward, **fixed, **by_rank, **results)
except RuntimeError as error:
    assert "t: expected the address" in str(error), error
else:
    raise AssertionError("a t that was promised and not given was followed")
print("arguments")
"""

# int8_lora_linear, from a weight to y and to the largest outputs.
RAW_INT8 = """
import numpy as np, _raw as r
M, K, N, R = 3, 20, 70, 2
rng = np.random.default_rng(0)
x, a, b, bias, residual = (
    rng.standard_normal(s).astype(np.float32) for s in ((M, K), (R, K), (R, N), (N,), (M, N))
)
w = rng.integers(-127, 128, (N, K)).astype(np.int8)
w_scales = rng.random(N).astype(np.float32) / 127
def aligned(size):
    memory = np.zeros(size + 64, np.uint8)
    return memory, memory.ctypes.data + -memory.ctypes.data % 64
keep, packed = aligned(r.int8_packed_bytes(N, K))
r.int8_pack(
    weight=w.ctypes.data, scales=w_scales.ctypes.data, out_features=N, in_features=K, packed=packed
)
lora = r.LoraShape(adapters=1, total_rank=R, max_rank=R, dtype=r.DType.float32)
sizes = dict(rows=M, in_features=K, out_features=N, lora=lora, has_bias=True)
bank = dict(
    lora_a=a.ctypes.data, a_stride=K, lora_b=b.ctypes.data, b_stride_rank=N, b_stride_out=1
)
fixed = dict(x=x.ctypes.data, x_stride=K, packed_weight=packed, bias=bias.ctypes.data, **bank)
s_x = np.abs(x).max(1, keepdims=True) / 127
want = (np.rint(x / s_x) @ w.T.astype(np.float64)) * s_x * w_scales + bias + (x @ a.T) @ b
plan = r.plan(r.Int8LoraLinearProblem(**sizes, has_residual=True), r.host_device())
also_keep, workspace = aligned(plan.workspace_bytes)
y = np.full((M, N), np.nan, np.float32)
r.run(plan, **fixed, residual=residual.ctypes.data, y=y.ctypes.data, workspace=workspace)
np.testing.assert_allclose(y, want + residual, rtol=1e-3, atol=1e-3)
plan = r.plan(r.Int8LoraLinearProblem(**sizes, top_k=2, log_sum=True), r.host_device())
also_keep, workspace = aligned(plan.workspace_bytes)
columns, values = np.empty((M, 2), np.int64), np.empty((M, 2), np.float32)
log_sum = np.empty(M, np.float32)
r.run(
    plan, **fixed, top_columns=columns.ctypes.data, top_values=values.ctypes.data,
    log_sum=log_sum.ctypes.data, workspace=workspace,
)
assert (columns == np.argsort(-want, axis=1)[:, :2]).all()
np.testing.assert_allclose(log_sum, np.log(np.exp(want).sum(1)), rtol=1e-3)
static = r.plan(r.Int8LoraLinearProblem(**sizes, static_scale=True), r.host_device())
also_keep, workspace = aligned(static.workspace_bytes)
scale = np.array([s_x.max()], np.float32)
r.run(static, **fixed, x_scale=scale.ctypes.data, y=y.ctypes.data, workspace=workspace)
want = (np.rint(x / scale) @ w.T.astype(np.float64)) * scale * w_scales + bias + (x @ a.T) @ b
np.testing.assert_allclose(y, want, rtol=1e-3, atol=1e-3)
device = r.on_cuda(r.CudaDevice(arch=90, multiprocessors=132, shared_bytes=227 << 10))
there = r.plan(r.Int8LoraLinearProblem(**sizes), device)
assert "cuda sm_90" in str(there), there
try:
    r.run(there, **fixed, y=y.ctypes.data, workspace=workspace)
except RuntimeError as error:
    assert "could not be launched" in str(error), error
    assert "the plan was: int8_lora_linear rows=3" in str(error), error
else:
    raise AssertionError("a kernel was launched without a GPU")
print("int8")
"""


@pytest.mark.slow
@pytest.mark.parametrize(("code", "word"), [(RAW_ARGUMENTS, "arguments"), (RAW_INT8, "int8")])
def test_the_raw_module_passes_on_every_argument(built: Path, code: str, word: str) -> None:
    if not list(built.glob("_raw*.so")):
        pytest.skip("Python.h is not installed")
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(built), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert word in run.stdout


@pytest.mark.slow
def test_the_raw_module_runs_on_numpy_and_refuses_a_missing_gpu(built: Path) -> None:
    if not list(built.glob("_raw*.so")):
        pytest.skip("Python.h is not installed")
    environment = os.environ | {"PYTHONPATH": str(built), "CUDA_VISIBLE_DEVICES": ""}
    example = ROOT / "examples" / "raw_lora_linear.py"
    run = subprocess.run([sys.executable, example], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "relative error" in run.stdout
    assert "PyCUDA: skipped" in run.stdout
    code = "import _raw; print(_raw.on_cuda(_raw.CudaDevice(arch=90))); _raw.cuda_device(0)"
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert run.returncode != 0
    assert "cuda_device: device 0 could not be asked" in run.stderr
    plan = (
        "import _raw as r; L = r.LoraShape(adapters=1, total_rank=16, max_rank=16, "
        "dtype=r.DType.float16); p = r.LoraLinearProblem(rows=4096, in_features=1280, "
        "out_features=1280, dtype=r.DType.float16, lora=L); "
        "d = r.on_cuda(r.CudaDevice(arch=90, multiprocessors=132)); c = r.plan(p, d); print(c); "
        "r.run(c, x=0, x_stride=1280, weight=0, weight_stride=1280, y=0)"
    )
    run = subprocess.run(
        [sys.executable, "-c", plan], env=environment, capture_output=True, text=True
    )
    assert run.returncode != 0
    assert "cuda sm_90" in run.stdout
    assert "could not be launched" in run.stderr
    assert "the plan was: lora_linear rows=4096" in run.stderr
