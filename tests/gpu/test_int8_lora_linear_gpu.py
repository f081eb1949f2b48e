"""int8_lora_linear on a GPU: against the reference and the CPU, in graphs, twice the same."""

from __future__ import annotations

import functools
import re
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cuda"))

from kernels import by_wgmma_and_by_mma, kernels_of
from test_emulated_int8_lora_linear import rounded, weight_of
from test_emulated_lora_linear import bank
from test_lora_linear_gpu import dtypes, there
from tolerances import assert_close

from lora_kernels import nn, ops, reference


def _without() -> str:
    if not torch.cuda.is_available():
        return "no GPU"
    name = "lora_kernels::int8_lora_linear"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"):
        return "the library was built without its CUDA kernels (LORA_KERNELS_CUDA=ON)"
    return ""


pytestmark = pytest.mark.skipif(bool(_without()), reason=_without())

SHAPES = [(1, 1, 1), (1, 1280, 1280), (3, 37, 53), (32, 513, 77), (33, 40, 16), (129, 257, 191)]
SHAPES += [(375, 1024, 4096), (1500, 512, 2048), (4096, 1280, 1280)]


@pytest.mark.parametrize("dtype", dtypes(), ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("mode", ["none", "peft", "by_rank", "bank", "fp32"])
def test_forward(dtype: torch.dtype, mode: str) -> None:
    for index, (rows, k, n) in enumerate(SHAPES):
        q, scales, packed = weight_of(k, n)
        x, bias = torch.randn(rows, k).to(dtype), torch.randn(n).to(dtype)
        operands = bank(mode, rows, k, n, dtype, 16)
        operands["residual"] = torch.randn(rows, n).to(dtype)
        operands["activation"] = ["none", "gelu", "silu"][index % 3]
        got = ops.int8_lora_linear(x.cuda(), packed.cuda(), n, bias.cuda(), **there(operands)).cpu()
        exact = reference.int8_lora_linear(x, q, scales, bias, **operands)
        assert_close(got, exact, rounded(exact, dtype), what=f"{rows}x{k}x{n} {mode}")


def test_integer_sums_are_those_of_the_cpu() -> None:
    for rows, k, n in SHAPES:
        q = torch.randint(-127, 128, (n, k), dtype=torch.int8)
        packed = ops.int8_pack(q.cuda(), torch.ones(n).cuda())
        x = torch.randint(-3, 4, (rows, k)).to(dtypes()[-1]).float()
        if torch.cuda.get_device_capability() < (8, 0):
            x = x.half()
        got = ops.int8_lora_linear(x.cuda(), packed, n, x_scale=torch.ones(1))
        want = reference.int8_accumulators(x.to(torch.int8), q)
        assert torch.equal(got.cpu().float(), want.to(x.dtype).float())


@pytest.mark.parametrize("dtype", dtypes(), ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("mode", ["none", "peft", "bank"])
def test_tiles_by_wgmma_agree_with_those_by_mma(dtype: torch.dtype, mode: str) -> None:
    """At sizes whose plan takes wgmma, in uneven tiles; without LoRA to the bit."""
    # With the rows of a tile that the plans take.
    cases = [(4001, 2561, 2563, "none", 128), (12000, 2560, 2560, "none", 320)]
    cases += [(4001, 1285, 5122, "none", 256)]
    cases += [(4096, 1280, 5120, activation, 256) for activation in ("gelu", "silu")]
    if torch.cuda.get_device_properties(0).multi_processor_count >= 130:  # of fewer: not so
        cases += [(4096, 5120, 1280, "none", 320), (4096, 1280, 1280, "gelu", 320)]
    # Blocks that stay are for 16 bits and, where several adapters share their tiles, for none.
    stay = dtype != torch.float32 and mode != "bank"
    for rows, k, n, activation, tall in cases:
        _, _, packed = weight_of(k, n)
        x, bias = torch.randn(rows, k).to(dtype), torch.randn(n).to(dtype)
        operands = there(bank(mode, rows, k, n, dtype, 16) | {"activation": activation})
        arguments = [x.cuda(), packed.cuda(), n, bias.cuda()]
        run = functools.partial(ops.int8_lora_linear, *arguments, **operands)
        small = tall == 128 or not stay
        got, plain = by_wgmma_and_by_mma(run, "int8_wgmma" if small else "int8_persistent")
        if not small:
            assert re.search(rf"int8_persistent<\w+, (\(int\))?{tall}>", kernels_of(run))
        if mode == "none" and activation == "none":
            assert torch.equal(got, plain)
        assert_close(got, plain.double(), plain, what=f"{rows}x{k}x{n} {mode} {activation}")


def test_topk_is_the_cpu_s() -> None:
    _, _, packed = weight_of(384, 51865)
    x = torch.randn(5, 384).to(dtypes()[0])
    got = ops.int8_lora_topk(x.cuda(), packed.cuda(), 51865, 5, log_sum=True)
    want = ops.int8_lora_topk(x, packed, 51865, 5, log_sum=True)
    for mine, cpu in zip(got, want, strict=True):
        assert mine is not None
        assert torch.allclose(mine.cpu().double(), cpu.double(), rtol=1e-5)


@pytest.mark.parametrize(("max_rank", "seen"), [(40, 40), (0, 61)])
def test_plans_see_the_largest_rank_of_a_bank(max_rank: int, seen: int) -> None:
    """Offsets on the device are not waited for: else it is the sum of the ranks."""
    _, _, packed = weight_of(256, 256)
    x, step = torch.randn(8, 256).half().cuda(), ops.Composite()
    operands = there(bank("bank", 8, 256, 256, torch.float16))
    out = torch.empty_like(x)
    step.int8_lora_linear(x, packed.cuda(), 256, out=out, max_rank=max_rank, **operands)
    assert f"rank=61 (largest {seen})" in repr(step)


def test_a_captured_graph_follows_its_ids() -> None:
    for rows in (8, 24, 300):
        _, _, packed = weight_of(256, 256)
        x, packed = torch.randn(rows, 256).half().cuda(), packed.cuda()
        operands = there(bank("bank", rows, 256, 256, torch.float16))
        ids = operands["adapter_ids"]
        with torch.no_grad():
            ops.int8_lora_linear(x, packed, 256, **operands)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = ops.int8_lora_linear(x, packed, 256, **operands)
            for _ in range(3):
                ids.copy_(torch.randint(-1, 4, (rows,), dtype=torch.int32))
                graph.replay()
                assert torch.equal(y, ops.int8_lora_linear(x, packed, 256, **operands))


def test_a_layer_moves_and_trains() -> None:
    layer = nn.Int8LoraLinear.from_linear(torch.nn.Linear(64, 48))
    x = torch.randn(7, 64).half()
    want = layer(x.float())
    moved = layer.to("cuda")
    leaf = x.cuda().requires_grad_()
    y = moved(leaf)
    assert_close(y.detach().cpu(), want.detach().double(), want.detach().half())
    (grad,) = torch.autograd.grad(y.float().sum(), leaf)
    assert_close(grad.cpu(), layer.weight.sum(0).expand(7, 64).double().cpu(), extra=1e-2)
    assert torch.equal(moved.quantized_weight()[0].cpu(), layer.quantized_weight()[0].cpu())


def test_bad_scales_are_refused_before_the_launch() -> None:
    _, _, packed = weight_of(8, 8)
    x = torch.randn(2, 8).half().cuda()
    for bad in (0.0, float("nan"), float("inf")):
        with pytest.raises(RuntimeError, match=r"x_scale: expected a positive finite scale"):
            ops.int8_lora_linear(x, packed.cuda(), 8, x_scale=torch.tensor([bad]))
