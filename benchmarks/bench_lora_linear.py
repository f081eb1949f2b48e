"""lora_linear against F.linear alone, the eager formula, oneDNN prepacked, and PEFT's layer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lora_kernels import ops
from lora_kernels.benchmarking.cold import copies, cycling

from .conftest import Work
from .shapes import DECODING, ENCODING, RANK, Shape


def peft_layer(shape: Shape, dtype: torch.dtype) -> torch.nn.Module:
    """PEFT's own LoRA layer over one nn.Linear."""
    from peft import LoraConfig, get_peft_model

    holder = torch.nn.Sequential(
        torch.nn.Linear(shape.in_features, shape.out_features, dtype=dtype)
    )
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["0"], init_lora_weights=False)
    return get_peft_model(holder, config, autocast_adapter_dtype=False).eval().base_model.model[0]


@pytest.mark.parametrize("shape", DECODING + ENCODING, ids=lambda s: s.label)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_forward(compare, shape: Shape, dtype: torch.dtype) -> None:
    k, n, rows = shape.in_features, shape.out_features, shape.rows
    size = torch.empty(0, dtype=dtype).element_size()
    layers = [peft_layer(shape, dtype) for _ in range(1 if rows > 100 else copies(k * n * size))]
    scale = torch.tensor([2.0])
    x = torch.randn(rows, k).to(dtype)
    operands = [
        (
            p.base_layer.weight,
            p.base_layer.bias,
            p.lora_A["default"].weight,
            p.lora_B["default"].weight,
        )
        for p in layers
    ]
    packed = [
        (torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows), bias.detach())
        for weight, bias, _, _ in operands
    ]

    def eager(w: torch.Tensor, b: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor):
        return F.linear(x, w, b) + F.linear(F.linear(x, lora_a), lora_b) * 2.0

    peers = {
        "linear_alone": cycling(lambda w, b, *_: F.linear(x, w, b), operands),
        "onednn_alone": cycling(
            lambda w, b: torch.ops.mkldnn._linear_pointwise(x, w, b, "none", [], ""), packed
        ),
        "eager": cycling(eager, operands),
        "peft": cycling(lambda layer: layer(x), [(layer,) for layer in layers]),
    }
    ours = cycling(
        lambda w, b, lora_a, lora_b: ops.lora_linear(x, w, b, lora_a, lora_b.t(), scales=scale),
        operands,
    )
    weights = n * k + RANK * (k + n) + n
    kind = "float32" if dtype == torch.float32 else "bfloat16"
    work = Work((weights + rows * (k + n)) * size, 2.0 * rows * (n * k + RANK * (k + n)), kind)
    compare("lora_linear", ours, peers, work)


@pytest.mark.parametrize("shape", ENCODING[:2], ids=lambda s: s.label)
def test_training_step(compare, shape: Shape) -> None:
    """Forward and backward with a frozen base: dx, dA and dB."""
    k, n, rows = shape.in_features, shape.out_features, shape.rows
    layer = peft_layer(shape, torch.float32).train()
    layer.base_layer.requires_grad_(False)
    x = torch.randn(rows, k, requires_grad=True)
    dy = torch.randn(rows, n)
    scale = torch.tensor([2.0])
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    leaves = [x, a, b]

    def ours():
        with torch.enable_grad():
            y = ops.lora_linear(
                x, layer.base_layer.weight, layer.base_layer.bias, a, b.t(), scales=scale
            )
            return torch.autograd.grad(y, leaves, dy)

    def peft():
        with torch.enable_grad():
            return torch.autograd.grad(layer(x), leaves, dy)

    def base():
        with torch.enable_grad():
            y = F.linear(x, layer.base_layer.weight, layer.base_layer.bias)
            return torch.autograd.grad(y, [x], dy)

    operations = 4.0 * rows * n * k + 12.0 * rows * RANK * (k + n)
    bytes_read = 4.0 * (2 * n * k + 2 * RANK * (k + n) + 2 * rows * (k + n))
    work = Work(bytes_read, operations, "float32")
    compare("lora_linear", ours, {"linear_alone": base, "peft": peft}, work)
