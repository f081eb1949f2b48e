"""int8_lora_linear as torch sees it: opcheck, compile, export, gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from int8_operands import quantized, ragged_bank
from operator_calls import OperatorCalls
from tolerances import assert_close

from lora_kernels import ops, reference


def operands_for_torch() -> tuple[Any, ...]:
    packed, _, _ = quantized(70, 33)
    lora = ragged_bank(6, 33, 70, torch.float32)
    names = ("lora_a", "lora_b", "scales", "offsets", "adapter_ids")
    x = torch.randn(2, 3, 33)
    return (x, packed, 70, torch.randn(70), *(lora[n] for n in names), torch.randn(2, 3, 70))


def test_opcheck() -> None:
    library = torch.ops.lora_kernels
    full = operands_for_torch()
    torch.library.opcheck(library.int8_lora_linear.default, (*full, "gelu", None))
    bare = (*full[:3], *[None] * 7)
    torch.library.opcheck(library.int8_lora_linear.default, (*bare, "none", torch.tensor([0.1])))
    q = torch.randint(-127, 128, (65, 9), dtype=torch.int8)
    torch.library.opcheck(library.int8_pack.default, (q, torch.rand(65)))
    packed = ops.int8_pack(q, torch.rand(65))
    torch.library.opcheck(library.int8_unpack.default, (packed, 65, 9))


class Layer(torch.nn.Module):
    """All operands but x are buffers."""

    def __init__(self) -> None:
        super().__init__()
        _, packed, _, bias, a, b, scales, offsets, _, _ = operands_for_torch()
        for name, value in dict(p=packed, bias=bias, a=a, b=b, s=scales, o=offsets).items():
            self.register_buffer(name, value)

    def forward(self, x: torch.Tensor, ids: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        y = ops.int8_lora_linear(
            x * 2,
            self.p,
            70,
            self.bias,
            self.a,
            self.b,
            scales=self.s,
            offsets=self.o,
            adapter_ids=ids,
            residual=residual,
            activation="silu",
        )
        return y + 1


def test_compile_and_export() -> None:
    layer = Layer()
    inputs = (
        torch.randn(2, 3, 33),
        torch.tensor([1, -1], dtype=torch.int32),
        torch.randn(2, 3, 70),
    )
    want = layer(*inputs)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(*inputs), want)
    exported = torch.export.export(layer, inputs)
    assert torch.equal(exported.module()(*inputs), want)


def test_export_with_a_dynamic_number_of_rows() -> None:
    packed, _, _ = quantized(70, 33)

    class Base(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return ops.int8_lora_linear(x, packed, 70)

    rows = torch.export.Dim("rows", min=1)
    exported = torch.export.export(Base(), (torch.randn(5, 33),), dynamic_shapes=({0: rows},))
    x = torch.randn(11, 33)
    assert torch.equal(exported.module()(x), ops.int8_lora_linear(x, packed, 70))


# ---------- Gradients


@pytest.mark.parametrize("activation", ["none", "gelu", "silu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_pass_straight_through(dtype: torch.dtype, activation: str) -> None:
    rows, k, n = 12, 33, 70
    packed, q, scales = quantized(n, k)
    operands = ragged_bank(rows, k, n, dtype)
    leaves = {
        "x": torch.randn(rows, k).to(dtype),
        "bias": torch.randn(n).to(dtype),
        "residual": torch.randn(rows, n).to(dtype),
        "lora_a": operands.pop("lora_a"),
        "lora_b": operands.pop("lora_b"),
    }
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    dy = torch.randn(rows, n).to(dtype)
    for x_scale in (None, torch.tensor([0.02])):
        rest = operands | {"activation": activation, "x_scale": x_scale}
        y = ops.int8_lora_linear(packed_weight=packed, out_features=n, **leaves, **rest)
        got = torch.autograd.grad(y, list(leaves.values()), dy)
        for compute in (torch.float64, torch.float32):
            y = reference.int8_lora_linear(
                q_weight=q,
                weight_scales=scales,
                **leaves,
                **rest,
                compute_dtype=compute,
                straight_through=True,
            )
            exact = torch.autograd.grad(y, list(leaves.values()), dy.to(compute))
            for name, mine, want in zip(leaves, got, exact, strict=True):
                plain = want.to(dtype) if dtype != torch.float32 else None
                # W and dy before the activation are rounded to the dtype of x, as training has it.
                assert_close(
                    mine, want.double(), plain, extra=2e-3 * (dtype != torch.float32), what=name
                )


def test_gradients_compile_and_pass_opcheck() -> None:
    packed, _, _ = quantized(8, 16)
    x = torch.randn(3, 16, requires_grad=True)
    a = torch.randn(2, 16, requires_grad=True)
    b = torch.randn(2, 8, requires_grad=True)
    arguments = (x, packed, 8, None, a, b, None, None, None, None, "gelu", None)
    torch.library.opcheck(torch.ops.lora_kernels.int8_lora_linear.default, arguments)


def test_the_largest_rank_goes_on_to_the_gradients() -> None:
    packed, _, _ = quantized(8, 16)
    operands = ragged_bank(6, 16, 8, torch.float32)
    leaf = operands["lora_a"].requires_grad_()
    x = torch.randn(6, 16)
    with OperatorCalls() as calls:
        y = ops.int8_lora_linear(x, packed, 8, activation="gelu", max_rank=18, **operands)
        torch.autograd.grad(y.sum(), leaf)
    names = ["int8_lora_linear", "int8_lora_linear", "lora_linear_backward"]
    assert calls.values("max_rank") == [(name, 18) for name in names]
    bank = [operands[name] for name in ("lora_a", "lora_b", "scales", "offsets", "adapter_ids")]
    arguments = (x, packed, 8, None, *bank, None, "gelu", None, None, None, 0.0, 18)
    torch.library.opcheck(torch.ops.lora_kernels.int8_lora_linear.default, arguments)


def test_gradients_that_do_not_exist_are_refused() -> None:
    packed, _, _ = quantized(8, 8)
    x = torch.randn(2, 8, requires_grad=True)
    norm = (torch.ones(8), torch.zeros(8), 1e-5)
    with pytest.raises(RuntimeError, match=r"norm: expected None .*layer_norm to x first"):
        ops.int8_lora_linear(x, packed, 8, norm=norm).sum().backward()
    scale = torch.ones(1, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"x_scale: expected a scale that needs no gradient"):
        ops.int8_lora_linear(x, packed, 8, x_scale=scale).sum().backward()
    blocks = torch.randn(1, 2, 64, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"lora_b: expected \[rank, out_features\].*blocks"):
        ops.int8_lora_linear(x, packed, 8, None, torch.randn(2, 8), blocks).sum().backward()
    frozen = blocks.detach()
    a = torch.randn(2, 8)
    by_rank_row = frozen[0, :, :8].contiguous()
    got = [
        torch.autograd.grad(ops.int8_lora_linear(x, packed, 8, None, a, f).sum(), x)[0]
        for f in (frozen, by_rank_row)
    ]
    assert torch.equal(*got)
