"""LayerNorm before and the largest outputs after int8_lora_linear, in every implementation."""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_close

from lora_kernels import ops, reference

SHAPES = [(1, 1, 1), (1, 384, 1000), (3, 37, 71), (7, 130, 128), (97, 61, 131)]


def operands(rows: int, k: int, n: int, dtype: torch.dtype = torch.float32):
    q, scales = reference.quantize_weight(torch.randn(n, k) / k**0.5)
    # An offset and a spread that a naive variance loses in rounding.
    x = (100 + torch.randn(rows, k) * torch.rand(rows, 1)).to(dtype)
    norm = (1 + torch.randn(k) / 4, torch.randn(k) / 4, 1e-5)
    return x, q, scales, norm


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norm_then_product(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, q, scales, norm = operands(*shape, dtype=dtype)
    lora = {
        "lora_a": torch.randn(5, shape[1]) / shape[1] ** 0.5,
        "lora_b": torch.randn(5, shape[2]),
        "scales": torch.tensor([0.5, 2.0]),
        "offsets": torch.tensor([0, 2, 5], dtype=torch.int32),
        "adapter_ids": torch.arange(shape[0], dtype=torch.int32) % 3 - 1,
    }
    got = ops.int8_lora_linear(x, ops.int8_pack(q, scales), shape[2], norm=norm, **lora)
    # The norm rounds a little differently everywhere, and where that crosses an edge of the
    # quantization an integer moves by one, and all outputs of its row by one step.
    exact = reference.int8_lora_linear(x, q, scales, norm=norm, **lora)
    assert got.dtype == dtype
    normal = torch.nn.functional.layer_norm(x.float(), x.shape[-1:], *norm[:2], norm[2])
    step = normal.abs().amax(-1, keepdim=True) / 127 * (q.abs().amax(1) * scales)
    error = (got.double() - exact).abs()
    allowed = torch.finfo(dtype).eps * exact.abs() + 1e-4 * exact.abs().amax()
    assert bool((error <= allowed + step.double()).all())


@pytest.mark.usefixtures("implementation")
def test_norm_is_exact_where_quantization_cannot_move() -> None:
    """With a static scale far above the values all integers are 0: only LoRA sees the norm."""
    x, q, scales, norm = operands(4, 96, 33)
    a, b = torch.randn(3, 96), torch.randn(3, 33)
    far = torch.tensor([1e6])
    got = ops.int8_lora_linear(x, ops.int8_pack(q, scales), 33, None, a, b, x_scale=far, norm=norm)
    exact, plain = (
        torch.nn.functional.layer_norm(
            x.to(dtype), (96,), norm[0].to(dtype), norm[1].to(dtype), norm[2]
        )
        @ a.to(dtype).t()
        @ b.to(dtype)
        for dtype in (torch.float64, torch.float32)
    )
    assert_close(got, exact, plain, what="LayerNorm, then LoRA")


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("shape", [*SHAPES, (2, 64, 51865)], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("k", [1, 10])
def test_largest_of_the_outputs(shape: tuple[int, int, int], threads: int, k: int) -> None:
    rows, _, n = shape
    k = min(k, n)
    x, q, scales, norm = operands(*shape)
    packed, bias = ops.int8_pack(q, scales), torch.randn(n)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y = ops.int8_lora_linear(x, packed, n, bias, norm=norm)
        values, columns, log_sum = ops.int8_lora_topk(
            x, packed, n, k, bias, norm=norm, log_sum=True
        )
    finally:
        torch.set_num_threads(before)
    assert values.shape == columns.shape == (rows, k)
    assert torch.equal(values, y.topk(k).values)
    assert torch.equal(columns, y.sort(dim=-1, descending=True, stable=True).indices[:, :k])
    assert_close(log_sum, y.double().logsumexp(-1), what="log of the sum of exponentials")


@pytest.mark.usefixtures("implementation")
def test_ties_suppressed_columns_and_nan() -> None:
    n, k = 200, 16
    packed = ops.int8_pack(torch.ones(n, k, dtype=torch.int8), torch.ones(n))
    x = torch.ones(2, k)

    def columns(bias: torch.Tensor | None, count: int) -> list[int]:
        first, second = ops.int8_lora_topk(x, packed, n, count, bias)[1].tolist()
        assert first == second or not torch.equal(x[0], x[1])
        return second

    assert columns(None, 3) == [0, 1, 2]
    bias = torch.full((n,), -torch.inf)
    assert columns(bias, 2) == [0, 1]
    bias[[70, 150]] = 1.0
    assert columns(bias, 3) == [70, 150, 0]
    bias[[130, 140]] = torch.nan
    assert columns(bias, 3) == [130, 140, 70]
    x[1] = torch.nan
    assert columns(None, 2) == [0, 1]
    assert ops.int8_lora_topk(x, packed, n, log_sum=True)[2].isnan().tolist() == [False, True]


def test_log_sum_of_suppressed_columns_leaves_them_out() -> None:
    packed = ops.int8_pack(torch.zeros(100, 4, dtype=torch.int8), torch.ones(100))
    bias = torch.full((100,), -torch.inf)
    bias[[3, 99]] = torch.tensor([-200.0, -200.0])
    _, _, log_sum = ops.int8_lora_topk(torch.ones(1, 4), packed, 100, 1, bias, log_sum=True)
    assert log_sum is not None
    assert log_sum.item() == pytest.approx(-200 + torch.log(torch.tensor(2.0)).item())


@pytest.mark.parametrize(
    ("call", "change", "text"),
    [
        ("topk", {"k": 0}, "k: expected at least 1"),
        ("topk", {"k": 9}, "top_k: expected 1 to 8"),
        ("topk", {"max_rank": -1}, "int8_lora_topk: max_rank: expected the largest rank .*got -1"),
        ("linear", {"norm": (torch.ones(5), torch.ones(4), 1e-5)}, "norm_weight: expected a cont"),
        ("topk", {"norm": (torch.ones(5), torch.ones(4), 1e-5)}, "int8_lora_topk: norm_weight"),
        ("linear", {"norm": (torch.ones(4), torch.ones(4).half(), 1e-5)}, "norm_bias: expected fl"),
        ("linear", {"norm": (torch.ones(4), torch.ones(4), -1.0)}, "norm_eps: expected a finite"),
    ],
)
def test_bad_input_is_named(call: str, change: dict, text: str) -> None:
    packed = ops.int8_pack(torch.ones(8, 4, dtype=torch.int8), torch.ones(8))
    with pytest.raises(RuntimeError, match=text):
        getattr(ops, f"int8_lora_{call}")(torch.ones(2, 4), packed, 8, **change)


def test_opcheck_and_compile() -> None:
    x, q, scales, norm = operands(3, 16, 24)
    packed = ops.int8_pack(q, scales)
    arguments = (x, packed, 24, *[None] * 7, "none", None, *norm)
    torch.library.opcheck(torch.ops.lora_kernels.int8_lora_linear.default, arguments)
    for log_sum in (False, True):
        arguments = (x, packed, 24, 2, *[None] * 7, *norm, log_sum, None, 3)
        torch.library.opcheck(torch.ops.lora_kernels.int8_lora_topk.default, arguments)

    def call(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = ops.int8_lora_linear(x, packed, 24, norm=norm)
        return y, *ops.int8_lora_topk(x, packed, 24, 2, norm=norm)[:2]

    compiled = torch.compile(call, fullgraph=True)(x)
    assert all(torch.equal(a, b) for a, b in zip(compiled, call(x), strict=True))


@pytest.mark.parametrize("output", ["values", "log_sum"])
def test_backward_is_refused_by_name(output: str) -> None:
    packed = ops.int8_pack(torch.ones(8, 4, dtype=torch.int8), torch.ones(8))
    x = torch.randn(2, 4, requires_grad=True)
    values, _, log_sum = ops.int8_lora_topk(x, packed, 8, 2, log_sum=True)
    assert log_sum is not None
    with pytest.raises(RuntimeError, match=r"int8_lora_topk: x, .* forward only"):
        {"values": values, "log_sum": log_sum}[output].sum().backward()
