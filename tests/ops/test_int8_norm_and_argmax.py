"""LayerNorm before and the greedy choice after int8_lora_linear, every implementation in turn."""

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
def test_argmax_is_that_of_the_result(shape: tuple[int, int, int], threads: int) -> None:
    x, q, scales, norm = operands(*shape)
    packed, bias = ops.int8_pack(q, scales), torch.randn(shape[2])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y = ops.int8_lora_linear(x, packed, shape[2], bias, norm=norm)
        best = ops.int8_lora_linear(x, packed, shape[2], bias, norm=norm, argmax=True)
    finally:
        torch.set_num_threads(before)
    assert best.dtype == torch.int64
    assert best.tolist() == y.argmax(-1).tolist()


@pytest.mark.usefixtures("implementation")
def test_argmax_of_ties_suppressed_and_nan() -> None:
    n, k = 200, 16
    packed = ops.int8_pack(torch.ones(n, k, dtype=torch.int8), torch.ones(n))
    x = torch.ones(3, k)
    assert ops.int8_lora_linear(x, packed, n, argmax=True).tolist() == [0, 0, 0]
    bias = torch.full((n,), -torch.inf)
    assert ops.int8_lora_linear(x, packed, n, bias, argmax=True).tolist() == [0, 0, 0]
    bias[[70, 150]] = 1.0
    assert ops.int8_lora_linear(x, packed, n, bias, argmax=True).tolist() == [70, 70, 70]
    bias[[130, 140]] = torch.nan
    assert ops.int8_lora_linear(x, packed, n, bias, argmax=True).tolist() == [130, 130, 130]
    x[1] = torch.nan
    assert ops.int8_lora_linear(x, packed, n, argmax=True).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"argmax": True, "activation": "gelu"}, "argmax: expected neither an activation"),
        ({"argmax": True, "residual": torch.zeros(2, 8)}, "argmax: expected neither"),
        ({"norm": (torch.ones(5), torch.ones(4), 1e-5)}, "norm_weight: expected a contiguous"),
        ({"norm": (torch.ones(4), torch.ones(4).half(), 1e-5)}, "norm_bias: expected float32"),
        ({"norm": (torch.ones(4), torch.ones(4), -1.0)}, "norm_eps: expected a finite number"),
    ],
)
def test_bad_input_is_named(change: dict, text: str) -> None:
    packed = ops.int8_pack(torch.ones(8, 4, dtype=torch.int8), torch.ones(8))
    with pytest.raises(RuntimeError, match=text):
        ops.int8_lora_linear(torch.ones(2, 4), packed, 8, **change)


@pytest.mark.parametrize("argmax", [False, True])
def test_opcheck_and_compile(argmax: bool) -> None:
    x, q, scales, norm = operands(3, 16, 24)
    packed = ops.int8_pack(q, scales)
    arguments = (x, packed, 24, *[None] * 7, "none", None, *norm, argmax)
    torch.library.opcheck(torch.ops.lora_kernels.int8_lora_linear.default, arguments)

    def call(x: torch.Tensor) -> torch.Tensor:
        return ops.int8_lora_linear(x, packed, 24, norm=norm, argmax=argmax)

    assert torch.equal(torch.compile(call, fullgraph=True)(x), call(x))
