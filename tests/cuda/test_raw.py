"""The raw module: every operator on addresses, and what it says where a launch fails."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attention_steps import check, int32, make_blocked_step, make_step
from emulated import ROOT
from raw_calls import Raw
from relative_steps import make_chunk
from tolerances import assert_close

from lora_kernels import ops, reference

pytestmark = [pytest.mark.timeout(1800), pytest.mark.slow]  # whoever comes first builds the library


@pytest.fixture(scope="module")
def folder(built: Path) -> Path:
    if not list(built.glob("_raw*.so")):
        pytest.skip("Python.h is not installed")
    return built


@pytest.fixture(scope="module")
def raw(folder: Path) -> Raw:
    spec = importlib.util.spec_from_file_location("_raw", next(folder.glob("_raw*.so")))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Raw(module, module.host_device())


def without_gpu(folder: Path, *command: str | Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(folder), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True
    )


ROWS = ("identity", "per row", "per position")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slots", ROWS)
def test_attention_appends_and_attends(raw: Raw, dtype: torch.dtype, slots: str) -> None:
    table = {"identity": None, "per row": int32(2, 0, 1), "per position": slots}[slots]
    step = make_step(tokens=2, dtype=dtype, slots=table, chosen=[1, 0])
    check(step, raw.kv_attention_step)


def test_attention_over_int8_caches(raw: Raw) -> None:
    check(make_step(cache_dtype=torch.int8), raw.kv_attention_step)
    per_channel = make_step(cache_dtype=torch.int8, per_channel=True, append=False)
    check(per_channel, raw.kv_attention_step)
    beams = torch.arange(2, dtype=torch.int32).repeat_interleave(3)
    blocked = make_blocked_step(rows=6, cache_rows=2, positions=70, slots=beams, chosen=[1])
    # A multiple of four: only then are the weights of the specification as many as the cache's.
    blocked.lengths[:] = 68
    check(blocked, raw.kv_attention_step)


def test_attention_has_the_heads_of_its_plan(raw: Raw) -> None:
    step = make_step()
    m = raw.module
    problem = m.KvAttentionStepProblem(
        rows=3, heads=2, head_size=64, cache_rows=3, capacity=21, append=True, weight_heads=2
    )
    names = ("q", "k", "v", "k_cache", "v_cache", "lengths")
    operands = {name: getattr(step, name).data_ptr() for name in names}
    with pytest.raises(ValueError, match="expected the 2 heads of the plan's problem, got 1"):
        m.run(m.plan(problem, raw.device), **operands, out=0, weight_heads=[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_packed_states_are_those_of_the_reference(raw: Raw, dtype: torch.dtype) -> None:
    fused = torch.randn(2, 37, 2 * 3 * 20).to(dtype)
    k, v = fused.split(3 * 20, dim=2)  # slices: rows of another stride than their width
    want = reference.kv_pack(k, v, 3)
    for ours, theirs in zip(raw.kv_pack(k, v, 3), want, strict=True):
        assert torch.equal(ours.flatten(), theirs.flatten())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_of_streams(raw: Raw, dtype: torch.dtype) -> None:
    chunk = make_chunk(counts=int32(5, 2, 0), slots=int32(3, 0, 1), rings=4, dtype=dtype).poison()
    want_in = chunk.clone()
    want = want_in.run(reference.kv_relative_step)
    plain = chunk.clone().run(reference.kv_relative_step, dtype=dtype)
    got = chunk.run(raw.kv_relative_step)
    assert_close(got, want, plain)
    for ours, theirs in zip(chunk.caches(), want_in.caches(), strict=True):
        assert torch.equal(ours.nan_to_num(nan=77), theirs.nan_to_num(nan=77))


def test_weights_are_unpacked(raw: Raw) -> None:
    weight, scales = reference.quantize_weight(torch.randn(70, 21))
    got = raw.int8_unpack(ops.int8_pack(weight, scales), 70, 21)
    assert torch.equal(got[0], weight)
    assert torch.equal(got[1], scales)


def test_a_screen_is_that_of_the_operator(raw: Raw) -> None:
    packed = ops.int8_pack(*reference.quantize_weight(torch.randn(70, 21)))
    screen = torch.empty(raw.module.int8_screen_bytes(70, 21), dtype=torch.uint8)
    raw.module.int8_pack_screen(
        packed=packed.data_ptr(), out_features=70, in_features=21, screen=screen.data_ptr()
    )
    assert torch.equal(screen, ops.int8_pack_screen(packed, 70, 21))


def test_linear_layers(raw: Raw) -> None:
    """As raw_calls.py calls them, which tests on a GPU rely on."""
    x, w, a, b = (torch.randn(s) for s in ((5, 21), (70, 21), (3, 21), (3, 70)))
    want = reference.lora_linear(x, w, lora_a=a, lora_b=b)
    assert_close(raw.lora_linear(x, w, a, b), want)
    leaves = [t.double().requires_grad_() for t in (x, a, b)]
    y = reference.lora_linear(leaves[0], w, lora_a=leaves[1], lora_b=leaves[2])
    dy = torch.randn(5, 70)
    gradients = torch.autograd.grad(y, leaves, dy.double())
    for got, exact in zip(raw.lora_linear_backward(dy, x, w, a, b), gradients, strict=True):
        assert_close(got, exact)
    q, scales = reference.quantize_weight(w)
    want = reference.int8_lora_linear(x, q, scales, lora_a=a, lora_b=b)
    assert_close(raw.int8_lora_linear(x, ops.int8_pack(q, scales), 70, a, b), want)


# Each operator's plan for an H100, launched where there is no GPU. No address is followed.
LAUNCHES = """
import _raw as r
H, T = r.DType.float16, 4096
device = r.on_cuda(r.CudaDevice(arch=90, multiprocessors=132, shared_bytes=227 << 10))
lora = r.LoraShape(adapters=1, total_rank=64, max_rank=64, dtype=H)
linear = dict(rows=T, in_features=1280, out_features=1280, dtype=H, lora=lora)
strides = dict(x_stride=1280, weight_stride=1280)
chunk = dict(rows=4, tokens=16, heads=8, head_size=64, dtype=H, cache_dtype=H, cache_rows=4)
forward = r.LoraLinearProblem(**linear)
cases = dict(
    lora_linear=(forward, dict(x=0, weight=0, y=0, **strides)),
    lora_linear_backward=(
        r.LoraLinearBackwardProblem(forward=forward, needs_dx=True),
        dict(dy=0, x=0, weight=0, **strides),
    ),
    int8_lora_linear=(
        r.Int8LoraLinearProblem(**linear), dict(x=0, x_stride=1280, packed_weight=0)
    ),
    kv_attention_step=(
        r.KvAttentionStepProblem(**chunk, capacity=448, append=True),
        dict(q=0, k_cache=0, v_cache=0, lengths=0, out=0),
    ),
    kv_pack=(
        r.KvPackProblem(cache_rows=2, positions=1500, heads=8, head_size=64, dtype=H),
        dict(
            k=0, k_stride=512, k_row_stride=768000, v=0, v_stride=512, v_row_stride=768000,
            packed_k=0, packed_v=0, k_scales=0, v_scales=0,
        ),
    ),
    kv_relative_step=(
        r.KvRelativeStepProblem(**chunk, capacity=80, left=64),
        # the one operator that looks for null, and for two caches in one place
        {
            name: 4096 * i
            for i, name in enumerate(
                "q k v k_cache v_cache positions bias_u bias_v lengths out".split(), 1
            )
        },
    ),
)
for name, (problem, operands) in cases.items():
    plan = r.plan(problem, device)
    try:
        r.run(plan, **operands)
    except RuntimeError as error:
        print(name, plan, error, sep="\t")
    else:
        raise AssertionError(name + ": launched without a GPU")
try:
    r.int8_unpack(device, packed=0, out_features=70, in_features=21, weight=0, scales=0)
except RuntimeError as error:
    print("int8_unpack", "", error, sep="\t")
else:
    raise AssertionError("int8_unpack: launched without a GPU")
"""

KERNELS = {
    "lora_linear": "down<32>",
    "lora_linear_backward": "convert_factor",
    "int8_lora_linear": "int8_rows<32>",
    "kv_attention_step": "kv_attend",
    "kv_pack": "kv_pack",
    "kv_relative_step": "kv_relative",
    "int8_unpack": "int8_unpack",
}
"""The first kernel of each of LAUNCHES."""


def test_a_launch_that_fails_says_which_kernel_of_which_plan_and_why(folder: Path) -> None:
    run = without_gpu(folder, "-c", LAUNCHES)
    assert run.returncode == 0, run.stderr[-3000:]
    texts = [line.split("\t") for line in run.stdout.splitlines()]
    assert [name for name, *_ in texts] == list(KERNELS)
    for name, plan, text in texts:
        assert f"kernel {KERNELS[name]} could not be launched with" in text, text
        # Without a driver, and with one whose GPUs are hidden.
        assert re.search(
            r"bytes of shared memory: cudaError(InsufficientDriver|NoDevice), \w+", text
        ), text
        if plan:  # int8_unpack has none
            assert text.startswith(name.removesuffix("_backward")), text
            assert f"the plan was: {plan}" in text, text
            assert "cuda sm_90" in plan, plan


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
print("int8")
"""


@pytest.mark.parametrize(("code", "word"), [(RAW_ARGUMENTS, "arguments"), (RAW_INT8, "int8")])
def test_every_argument_is_passed_on(folder: Path, code: str, word: str) -> None:
    run = without_gpu(folder, "-c", code)
    assert run.returncode == 0, run.stderr[-3000:]
    assert word in run.stdout


def test_numpy_is_served_and_a_missing_gpu_is_refused(folder: Path) -> None:
    run = without_gpu(folder, ROOT / "examples" / "raw_lora_linear.py")
    assert run.returncode == 0, run.stderr[-3000:]
    assert "relative error" in run.stdout
    assert "PyCUDA: skipped" in run.stdout
    code = "import _raw; print(_raw.on_cuda(_raw.CudaDevice(arch=90))); _raw.cuda_device(0)"
    run = without_gpu(folder, "-c", code)
    assert run.returncode != 0
    assert "cuda_device: device 0 could not be asked" in run.stderr
