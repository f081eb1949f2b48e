"""int8_lora_linear against torch's dynamic INT8 (x86 and oneDNN), alone and with eager LoRA."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lora_kernels import ops
from lora_kernels.benchmarking import torch_int8
from lora_kernels.benchmarking.cold import copies, cycling
from lora_kernels.reference import quantize_weight

from .conftest import Work
from .shapes import DECODING, ENCODING, RANK, Shape


@pytest.mark.parametrize("lora", [False, True], ids=["base", "lora"])
@pytest.mark.parametrize("shape", DECODING + ENCODING, ids=lambda s: s.label)
def test_forward(compare, shape: Shape, lora: bool) -> None:
    k, n, rows = shape.in_features, shape.out_features, shape.rows
    count = 1 if rows > 100 else copies(k * n)
    x, bias, scale = torch.randn(rows, k), torch.randn(n), torch.tensor([2.0])
    weights = [torch.randn(n, k) / k**0.5 for _ in range(min(count, 8))]
    factors = [(torch.randn(RANK, k) / k**0.5, torch.randn(RANK, n)) for _ in range(count)]
    if not lora:
        factors = [(None, None)] * count
    packed = [ops.int8_pack(*quantize_weight(weights[i % len(weights)])) for i in range(count)]

    def ours(weight, lora_a, lora_b):
        return ops.int8_lora_linear(
            x, weight, n, bias, lora_a, lora_b, scales=scale if lora else None
        )

    def peer(engine: str):
        theirs = [
            (torch_int8.pack(weights[i % len(weights)], bias, engine), *factors[i])
            for i in range(count)
        ]

        def call(weight, lora_a, lora_b):
            y = torch_int8.linear(x, weight, engine)
            return y if lora_a is None else y + F.linear(F.linear(x, lora_a), lora_b.t()) * 2.0

        return cycling(call, theirs)

    rank = RANK if lora else 0
    work = Work(
        n * k + 8.0 * n + 4.0 * (rank * (k + n) + rows * (k + n)),
        2.0 * rows * (n * k + rank * (k + n)),
        "int8",
    )
    operands = [(packed[i], *factors[i]) for i in range(count)]
    peers = {f"torch_{engine}": peer(engine) for engine in torch_int8.ENGINES}
    compare("int8_lora_linear", cycling(ours, operands), peers, work)
