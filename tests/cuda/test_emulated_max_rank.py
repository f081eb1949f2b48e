"""Ranks beyond the max_rank of a call, which a device alone can see: cut to it, on every path."""

from __future__ import annotations

import itertools

import pytest
import torch
from emulated import Emulated, missing
from emulated_int8 import EmulatedInt8
from lora_operands import base
from test_emulated_int8_lora_linear import weight_of
from test_emulated_lora_linear import bank

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

MOST = 8


def cut(operands: dict) -> tuple[dict, torch.Tensor]:
    """The bank with MOST rank rows of each adapter at most, and which rows those are."""
    bounds = operands["offsets"].tolist()
    kept = [range(b, min(e, b + MOST)) for b, e in itertools.pairwise(bounds)]
    rows = torch.tensor([row for adapter in kept for row in adapter])
    ends = torch.tensor([0, *map(len, kept)]).cumsum(0).to(torch.int32)
    a, b = operands["lora_a"][rows].contiguous(), operands["lora_b"][rows].contiguous()
    return operands | {"lora_a": a, "lora_b": b, "offsets": ends}, rows


def ragged(rows: int, k: int, n: int, adapters: int) -> dict:
    """A bank of ranks 4, 0, 17 and 40, or one adapter of rank 17, in fp16."""
    operands = bank("bank", rows, k, n, torch.float16)
    if adapters > 1:
        return operands
    del operands["adapter_ids"]
    offsets = torch.tensor([0, 17], dtype=torch.int32)
    factors = {name: operands[name][:17].contiguous() for name in ("lora_a", "lora_b")}
    return operands | factors | {"scales": torch.tensor([0.7]), "offsets": offsets}


@pytest.mark.parametrize(
    ("path", "large", "adapters", "t_blocks"),
    [
        ("two_steps", False, 4, 0),
        ("two_steps", True, 4, 0),
        ("two_steps", 128, 4, 0),
        ("two_steps", 128, 4, 2),
        ("in_tile", False, 1, 0),
        ("in_tile", True, 1, 0),
        ("few_rows", False, 4, 0),
        ("few_rows", True, 1, 0),
    ],
)
def test_forward(path: str, large: int, adapters: int, t_blocks: int) -> None:
    rows, k, n = 30, 64, 40
    x, weight, bias, _ = base(rows, k, n, torch.float16)
    operands = ragged(rows, k, n, adapters)
    emulated = Emulated(path=path, large=large, t_blocks=t_blocks, max_rank=MOST)
    got = emulated.forward(x, weight, bias, **operands)
    assert torch.equal(got, emulated.forward(x, weight, bias, **cut(operands)[0]))
    assert not torch.equal(got, Emulated(path=path, large=large).forward(x, weight, **operands))


@pytest.mark.parametrize(("adapters", "dy_once"), [(4, False), (1, False), (1, True)])
@pytest.mark.parametrize("keeps_t", [False, True])
def test_gradients(adapters: int, dy_once: bool, keeps_t: bool) -> None:
    rows, k, n = 70, 64, 40
    x, weight, _, dy = base(rows, k, n, torch.float16)
    operands = ragged(rows, k, n, adapters)
    same, kept = cut(operands)
    emulated = Emulated(path="two_steps", keeps_t=keeps_t, dy_once=dy_once, max_rank=MOST)
    emulated.forward(x, weight, **operands)
    got = emulated.backward(dy, x, weight, **operands)
    emulated.forward(x, weight, **same)
    want = emulated.backward(dy, x, weight, **same)
    assert torch.equal(got["dx"], want["dx"])
    for factor in ("dlora_a", "dlora_b"):
        assert torch.equal(got[factor][kept], want[factor])


@pytest.mark.parametrize(
    ("path", "large"),
    [("tiled", False), ("tiled", True), ("tiled", 128), ("few_rows", False), ("fused", False)],
)
def test_int8(path: str, large: int) -> None:
    rows, k, n = 14, 64, 70
    _, _, packed = weight_of(k, n)
    x = torch.randn(rows, k).half()
    operands = ragged(rows, k, n, 4)
    emulated = EmulatedInt8(path=path, large=large, max_rank=MOST)
    got = emulated.forward(x, packed, n, **operands)
    assert torch.equal(got, emulated.forward(x, packed, n, **cut(operands)[0]))
    whole = EmulatedInt8(path=path, large=large).forward(x, packed, n, **operands)
    assert not torch.equal(got, whole)
