"""What decoding takes from linears about their banks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from operator_calls import OperatorCalls

import lora_kernels as lk
from lora_kernels import ops
from lora_kernels.adapters import AdapterRegistry
from lora_speech.decoding.adapter_rows import AdapterRows
from lora_speech.decoding.linear_parts import linear_parts
from lora_speech.decoding.projections import joint_projection, projection
from lora_speech.decoding.recorded_parts import record_linear

K, N = 24, 32


def with_bank(kind: str, ranks: tuple[int, ...]) -> Any:
    linear: Any = lk.LoraLinear(K, N)
    if kind == "int8":
        linear = lk.Int8LoraLinear.from_linear(linear)
    registry = AdapterRegistry()
    layers = [lk.AdapterLayer(torch.randn(r, K), torch.randn(N, r), 1.0) for r in ranks]
    for index, layer in enumerate(layers):
        registry.put(str(index), lk.Adapter({"m": layer}))
    linear.set_bank(linear.pack_bank(layers), registry)
    return linear.eval()


@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_projections_pass_the_largest_rank(kind: str) -> None:
    module, other = with_bank(kind, (3, 7)), with_bank(kind, (4, 5))
    x, name = torch.randn(2, 1, K), "int8_lora_linear" if kind == "int8" else "lora_linear"
    rows = AdapterRows(["0", "0"], torch.zeros(2, dtype=torch.int32))
    with torch.no_grad(), OperatorCalls() as calls:
        projection(module, rows)(x, None)
        joint_projection([module, other], rows, 2)(x)
    # Of linears in one, an adapter has the rank rows that it has in all of them: 3 + 4, 7 + 5.
    given = [rank for called, rank in calls.values("max_rank") if called == name]
    assert given == [7, 12]


def test_recordings_pass_the_largest_rank() -> None:
    parts = linear_parts(with_bank("int8", (3, 7)))
    assert parts is not None
    x, out, ids = torch.randn(2, K), torch.empty(2, N), torch.zeros(2, dtype=torch.int32)
    with torch.no_grad(), OperatorCalls() as calls:
        record_linear(ops.Composite(), x, parts, ids, out)
        record_linear(ops.Composite(), x, parts, None, out)
    assert calls.values("max_rank") == [("composite_int8_lora_linear", rank) for rank in (7, 0)]
