"""lora_linear on a GPU: against the reference, in graphs, on streams, twice the same."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cuda"))

from kernels import by_wgmma_and_by_mma, kernels_of
from test_emulated_lora_linear import bank, base, gradients
from tolerances import assert_close

import lora_kernels as lk
from lora_kernels import implementations, ops, reference


def _without() -> str:
    if not torch.cuda.is_available():
        return "no GPU"
    if not torch._C._dispatch_has_kernel_for_dispatch_key("lora_kernels::lora_linear", "CUDA"):
        return "the library was built without its CUDA kernels (LORA_KERNELS_CUDA=ON)"
    return ""


pytestmark = pytest.mark.skipif(bool(_without()), reason=_without())

SHAPES = [(1, 1, 1), (1, 1280, 1280), (3, 37, 53), (32, 513, 77), (33, 40, 16), (129, 257, 191)]
SHAPES += [(375, 1024, 4096), (1500, 512, 2048), (4096, 1280, 1280)]


def dtypes() -> list[torch.dtype]:
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        return [torch.float16]
    return [torch.float16, torch.bfloat16, torch.float32]


def there(operands: dict) -> dict:
    return {
        name: value.cuda() if isinstance(value, torch.Tensor) else value
        for name, value in operands.items()
    }


@pytest.mark.parametrize("dtype", dtypes(), ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("mode", ["none", "peft", "by_rank", "bank", "dropout", "fp32"])
def test_forward(dtype: torch.dtype, mode: str) -> None:
    for index, (rows, k, n) in enumerate(SHAPES):
        x, weight, bias, residual = base(rows, k, n, dtype)
        activation = ["none", "gelu", "silu"][index % 3]
        operands = bank(mode, rows, k, n, dtype, 16)
        operands |= {"residual": residual, "activation": activation}
        got = ops.lora_linear(x.cuda(), weight.cuda(), bias.cuda(), **there(operands)).cpu()
        exact = reference.lora_linear(x, weight, bias, **operands)
        plain = exact
        if mode != "fp32":
            plain = reference.lora_linear(x, weight, bias, **operands, compute_dtype=dtype)
        assert_close(got, exact, plain.to(dtype), what=f"{rows}x{k}x{n} {mode}")


@pytest.mark.parametrize("dtype", dtypes(), ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("mode", ["peft", "bank", "dropout"])
def test_gradients(dtype: torch.dtype, mode: str) -> None:
    for rows, k, n in [(3, 37, 53), (300, 72, 136), (1500, 512, 512)]:
        x, weight, bias, dy = base(rows, k, n, dtype)
        operands = bank(mode, rows, k, n, dtype, 16)
        leaves = there({"x": x, "weight": weight, "bias": bias})
        factors = there({"lora_a": operands["lora_a"], "lora_b": operands["lora_b"]})
        everything = leaves | factors
        for leaf in everything.values():
            leaf.requires_grad_()
        rest = {n: v for n, v in operands.items() if n not in factors}
        y = ops.lora_linear(**everything, **there(rest))
        y.backward(dy.cuda())
        exact = gradients(x, weight, operands, dy, torch.float64)
        plain = gradients(x, weight, operands, dy, dtype)
        names = {"dx": "x", "dweight": "weight", "dbias": "bias"}
        names |= {"dlora_a": "lora_a", "dlora_b": "lora_b"}
        for name, leaf in names.items():
            got = everything[leaf].grad.cpu()
            assert_close(got, exact[name], plain[name], what=f"{name} at {rows}x{k}x{n}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("mode", ["none", "peft", "bank", "dropout"])
def test_tiles_by_wgmma_agree_with_those_by_mma(dtype: torch.dtype, mode: str) -> None:
    """At sizes whose plan takes wgmma, in uneven tiles, against the same call without it."""
    for rows, k, n in [(4096, 1280, 1280), (4001, 1001, 1283), (12000, 512, 2560)]:
        x, weight, bias, _ = base(rows, k, n, dtype)
        operands = there(bank(mode, rows, k, n, dtype, 16))
        arguments = [x.cuda(), weight.cuda(), bias.cuda()]
        run = functools.partial(ops.lora_linear, *arguments, **operands)
        got, plain = by_wgmma_and_by_mma(run, "gemm_wgmma")
        assert_close(got, plain.double(), plain, what=f"{rows}x{k}x{n} {mode}")


def input_gradient(x, weight, dy, operands) -> torch.Tensor:
    return torch.autograd.grad(ops.lora_linear(x, weight, **operands), x, dy)[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("mode", ["none", "peft", "bank", "dropout"])
def test_input_gradients_by_wgmma_agree_with_those_by_mma(dtype: torch.dtype, mode: str) -> None:
    """At sizes whose plan takes wgmma, in uneven tiles, by TMA or (odd sizes) by copies."""
    for rows, k, n in [(4096, 1280, 1280), (4001, 1283, 1001), (12000, 2560, 520)]:
        x, weight, _, dy = base(rows, k, n, dtype)
        operands = there(bank(mode, rows, k, n, dtype, 16))
        arguments = x.cuda().requires_grad_(), weight.cuda(), dy.cuda(), operands
        y = ops.lora_linear(*arguments[:2], **operands)
        backward = functools.partial(
            torch.autograd.grad, y, arguments[0], arguments[2], retain_graph=True
        )
        run = functools.partial(input_gradient, *arguments)
        got, plain = by_wgmma_and_by_mma(run, "gemm_wgmma", part=backward)
        assert_close(got, plain.double(), plain, what=f"{rows}x{k}x{n} {mode}")


def test_same_bits_every_time() -> None:
    x, weight, bias, _ = base(1500, 512, 512, torch.float16)
    operands = there(bank("bank", 1500, 512, 512, torch.float16))
    arguments = [x.cuda(), weight.cuda(), bias.cuda()]
    first = ops.lora_linear(*arguments, **operands)
    for _ in range(50):
        assert torch.equal(ops.lora_linear(*arguments, **operands), first)


@pytest.mark.parametrize("mode", ["peft", "bank", "dropout"])
def test_the_same_gradients_every_time(mode: str) -> None:
    x, weight, bias, dy = base(1500, 512, 512, torch.float16)
    operands = there(bank(mode, 1500, 512, 512, torch.float16))
    leaves = [t.cuda().requires_grad_() for t in (x, weight, bias)]
    leaves += [operands[name].requires_grad_() for name in ("lora_a", "lora_b")]
    dy = dy.cuda()

    def step() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(ops.lora_linear(*leaves[:3], **operands), leaves, dy)

    first = step()
    for _ in range(20):
        for got, want in zip(step(), first, strict=True):
            assert torch.equal(got, want)


def test_a_captured_graph_follows_its_ids() -> None:
    """Nothing synchronises or allocates outside of the pool, and ids are read when it replays."""
    for rows in (8, 300):
        x, weight, _, _ = base(rows, 256, 256, torch.float16)
        operands = there(bank("bank", rows, 256, 256, torch.float16))
        x, weight, ids = x.cuda(), weight.cuda(), operands["adapter_ids"]
        with torch.no_grad():
            ops.lora_linear(x, weight, **operands)  # attributes of kernels are set once
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = ops.lora_linear(x, weight, **operands)
            for _ in range(3):
                ids.copy_(torch.randint(-1, 4, (rows,), dtype=torch.int32))
                graph.replay()
                assert torch.equal(y, ops.lora_linear(x, weight, **operands))


def test_on_another_stream() -> None:
    x, weight, _, _ = base(64, 256, 256, torch.float16)
    x, weight = x.cuda(), weight.cuda()
    want = ops.lora_linear(x, weight)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = ops.lora_linear(x, weight)
    stream.synchronize()
    assert torch.equal(got, want)


def test_operands_elsewhere_are_named() -> None:
    x = torch.randn(4, 8, device="cuda", dtype=torch.float16)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"weight: expected .* CUDA device 0"):
        ops.lora_linear(x, torch.randn(6, 8).half())


# LoRA, rows, in and out features; kernels that a call launches, and those that it does not. The
# plans are the same on every device that tools/cuda_predict.py knows.
PLANS = {
    "base": ("none", (72, 136, 130), ("gemm<", "SmallShape"), ("down", "few_rows")),
    "few_rows": ("peft", (9, 512, 512), ("few_rows",), ("gemm", "down")),
    "few_rows of a bank": ("bank", (8, 512, 512), ("few_rows", "down"), ("gemm",)),
    "in_tile": ("peft", (72, 136, 130), ("gemm<", "SmallShape"), ("down", "few_rows")),
    "two_steps": ("bank", (72, 136, 130), ("gemm<", "SmallShape", "down"), ("few_rows",)),
    "large tiles": ("bank", (4000, 1000, 1290), ("gemm<", "LargeShape", "down"), ("few_rows",)),
}


@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_runs_and_counts(plan: str) -> None:
    """By mma.sync, which every device has; wgmma's kernels are compared with it above."""
    mode, size, launched, others = PLANS[plan]
    x, weight, bias, _ = (t.cuda() for t in base(*size, torch.float16))
    operands = there(bank(mode, *size, torch.float16))
    hopper = torch.cuda.get_device_capability() == (9, 0)
    row = "cuda_mma" if hopper else "cuda"

    def runs() -> int:
        rows = implementations.describe()[1]
        return next(r.runs for r in rows if r.op == "lora_linear" and r.name == row)

    with torch.no_grad(), lk.force_implementation(row):
        before = runs()
        ops.lora_linear(x, weight, bias, **operands)
        assert runs() == before + 1
        names = kernels_of(lambda: ops.lora_linear(x, weight, bias, **operands))
    for kernel in launched:
        assert kernel in names
    for kernel in others:
        assert kernel not in names
