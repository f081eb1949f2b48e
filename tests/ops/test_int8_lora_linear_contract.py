"""What int8_lora_linear and its packing refuse, and in which words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from int8_operands import quantized, ragged_bank

from lora_kernels import ops


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.randn(6, 32)}, ["packed_weight", "expected uint8", "got [", "columns of x"]),
        ({"x": torch.zeros(6, 33, dtype=torch.int8)}, ["x: expected float32", "got int8"]),
        ({"x": torch.zeros(6, 33, dtype=torch.float64)}, ["x: expected float32", ".to("]),
        ({"x": torch.tensor(1.0)}, ["x: expected at least one dimension"]),
        ({"out_features": 130}, ["packed_weight", "[130, 33]", "check out_features"]),
        ({"out_features": -1}, ["out_features", "at least 0", "got -1"]),
        (
            {"packed_weight": torch.zeros(5120, dtype=torch.int8)},
            ["packed_weight", "expected uint8"],
        ),
        ({"packed_weight": torch.zeros(8, dtype=torch.uint8)}, ["packed_weight", "got [8]"]),
        ({"bias": torch.randn(69)}, ["bias", "expected [70]", "got [69]"]),
        ({"bias": torch.randn(70, dtype=torch.float64)}, ["bias", "expected float32"]),
        ({"residual": torch.randn(6, 69)}, ["residual", "expected the shape of the result"]),
        ({"residual": torch.randn(6, 70).half()}, ["residual", "dtype of x"]),
        ({"lora_b": None}, ["lora_b", "expected both factors"]),
        (
            {"lora_a": torch.randn(22, 32)},
            ["lora_a", "[rank, 33]", "got [22, 32]", "another layer"],
        ),
        ({"lora_b": torch.randn(21, 70)}, ["lora_b", "[22, 70]", "got [21, 70]"]),
        ({"scales": torch.ones(3)}, ["scales", "[4]", "got [3]"]),
        ({"scales": torch.tensor([1.0, float("nan"), 1, 1])}, ["scales", "entry 1", "not finite"]),
        (
            {"offsets": torch.tensor([0, 4, 4, 21, 21], dtype=torch.int32)},
            ["offsets", "22", "disagree"],
        ),
        ({"offsets": torch.tensor([0, 5, 4, 21, 22], dtype=torch.int32)}, ["offsets", "rank -1"]),
        (
            {"adapter_ids": torch.tensor([0, 4], dtype=torch.int32)},
            ["adapter_ids", "entry 1 is 4", "-1"],
        ),
        (
            {"adapter_ids": torch.zeros(4, dtype=torch.int32)},
            ["adapter_ids", "divide", "(6)", "got 4"],
        ),
        ({"adapter_ids": torch.zeros(6)}, ["adapter_ids", "expected int32"]),
        ({"max_rank": -3}, ["max_rank", "largest rank", "got -3", "leave it out"]),
        ({"max_rank": 16}, ["max_rank", "at least 17", "of offsets", "got 16", "or 0"]),
        ({"activation": "relu"}, ["activation", "'gelu'", "got 'relu'"]),
        ({"x_scale": torch.tensor([0.0])}, ["x_scale", "positive finite", "got 0.0"]),
        ({"x_scale": torch.tensor([float("nan")])}, ["x_scale", "positive finite", "nan"]),
        ({"x_scale": torch.tensor([1e-45])}, ["x_scale", "positive finite"]),
        ({"x_scale": torch.ones(2)}, ["x_scale", "[1]", "got [2]"]),
    ],
)
def test_bad_input(change: dict[str, Any], words: list[str]) -> None:
    packed, _, _ = quantized(70, 33)
    arguments: dict[str, Any] = {
        "x": torch.randn(6, 33),
        "packed_weight": packed,
        "out_features": 70,
    }
    arguments |= ragged_bank(6, 33, 70, torch.float32)
    arguments["adapter_ids"] = torch.zeros(6, dtype=torch.int32)
    with pytest.raises(RuntimeError) as error:
        ops.int8_lora_linear(**(arguments | change))
    for word in ["int8_lora_linear", *words]:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("weight", "scales", "words"),
    [
        (torch.full((3, 4), -128, dtype=torch.int8), torch.ones(3), ["weight", "-127", "got -128"]),
        (torch.zeros(3, 4), torch.ones(3), ["weight", "expected int8"]),
        (torch.zeros(3, dtype=torch.int8), torch.ones(3), ["weight", "expected shape", "got [3]"]),
        (torch.zeros(3, 4, dtype=torch.int8), torch.ones(4), ["scales", "[3]", "got [4]"]),
        (
            torch.zeros(3, 4, dtype=torch.int8),
            torch.tensor([1, float("inf"), 1]),
            ["scales", "finite", "got inf", "channel 1"],
        ),
    ],
)
def test_bad_packing(weight: torch.Tensor, scales: torch.Tensor, words: list[str]) -> None:
    with pytest.raises(RuntimeError) as error:
        ops.int8_pack(weight, scales)
    for word in ["int8_pack", *words]:
        assert word in str(error.value)


def test_bad_unpacking() -> None:
    with pytest.raises(RuntimeError, match=r"int8_unpack: packed_weight: expected uint8 \[1024\]"):
        ops.int8_unpack(torch.zeros(8, dtype=torch.uint8), 3, 5)
