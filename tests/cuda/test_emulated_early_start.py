"""Kernels that start before the one before them has finished, across a decoder layer's calls."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from attention_steps import int32
from emulated import held, missing
from emulated_int8 import EmulatedInt8
from emulated_kv import EmulatedKv

from lora_kernels import ops, reference

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

ORDERS = [("forward", 1), ("reverse", 1), ("shuffled", 1), ("shuffled", 2)]
ROWS, HEADS, WIDTH, FRAMES, WORDS, RANK = 3, 2, 128, 300, 300, 5


def _packed(outputs: int) -> torch.Tensor:
    return ops.int8_pack(*reference.quantize_rows(torch.randn(outputs, WIDTH) / 11))


class Layer:
    """The calls that a recorded step of Whisper makes for a layer, and the choice behind it.

    What every call returns is kept, since kernels may still have to write it.
    """

    def __init__(self) -> None:
        names = ("q", "k", "v", "out", "cross_q", "cross_out", "up", "down")
        self.weights = {name: _packed(WIDTH) for name in names} | {"words": _packed(WORDS)}
        self.norm = (torch.rand(WIDTH) + 0.5, torch.randn(WIDTH), 1e-5)
        self.lora = {
            "lora_a": torch.randn(2 * RANK, WIDTH).half() / 11,
            "lora_b": torch.randn(2 * RANK, WIDTH).half() / 11,
            "scales": torch.tensor([1.0, 2.0]),
            "offsets": int32(0, RANK, 2 * RANK),
            "adapter_ids": int32(0, -1, 1),
        }
        self.x = torch.randn(ROWS, WIDTH).half()
        self.cross = ops.kv_pack(*torch.randn(2, ROWS, FRAMES, WIDTH).half(), HEADS)
        self.slots, self.lengths = int32(2, 0, 1), int32(3, 3, 3)
        self.frames = torch.full((ROWS,), FRAMES, dtype=torch.int32)

    def run(self, int8: EmulatedInt8, kv: EmulatedKv, cache: torch.dtype) -> list[torch.Tensor]:
        kept: list[torch.Tensor] = []

        def keep(made):
            kept.extend(made if isinstance(made, tuple) else (made,))
            return made

        def linear(x, name, **more) -> torch.Tensor:
            return keep(int8.forward(x, self.weights[name], WIDTH, **self.lora, **more))

        shape = (ROWS, 1, HEADS, WIDTH // HEADS)
        with int8.together() if int8.path == "fused" else nullcontext():
            q, k, v = (linear(self.x, name, norm=self.norm).view(shape) for name in "qkv")
        caches = keep(tuple(torch.zeros(2, ROWS, HEADS, 20, WIDTH // HEADS, dtype=cache)))
        scales = {}
        if cache == torch.int8:
            of_position = keep(tuple(torch.ones(2, ROWS, HEADS, 20, 1)))
            scales = dict(zip(("k_scales", "v_scales"), of_position, strict=True))
        out = keep(kv.step(
            q, k, v, *caches, self.lengths, slots=self.slots, scale=0.125, heads=[1], **scales
        ))[0]  # fmt: skip
        y = linear(out.view(ROWS, WIDTH), "out", residual=self.x)
        keys, values, k_scales, v_scales = self.cross
        q = linear(y, "cross_q", norm=self.norm).view(shape)
        out = keep(kv.step(
            q, None, None, keys, values, self.frames, k_scales=k_scales, v_scales=v_scales,
            slots=self.slots, scale=0.125,
        ))[0]  # fmt: skip
        y = linear(out.view(ROWS, WIDTH), "cross_out", residual=y)
        up = linear(y, "up", norm=self.norm, activation="gelu")
        y = linear(up, "down", residual=y)
        keep(int8.topk(y, self.weights["words"], WORDS, 3, norm=self.norm))
        return kept


# Paths of the products and of attention: with a kernel more for each, and with as few as there are.
PLANS = {
    "fused": ({"path": "fused"}, {}, torch.float16),
    "few rows": ({"path": "few_rows"}, {"split_positions": 128}, torch.int8),
    "split": ({"path": "few_rows", "splits": 2}, {"split_positions": 128}, torch.float16),
    "own choice": ({}, {}, torch.float16),
}


def check_layer(plan: str, order: tuple[str, int]) -> None:
    of_products, of_attention, cache = PLANS[plan]
    layer = Layer()
    int8, kv = EmulatedInt8(*order, **of_products), EmulatedKv(*order, **of_attention)
    one_by_one = layer.run(int8, kv, cache)
    with held():
        early = layer.run(int8, kv, cache)
    for mine, other in zip(early, one_by_one, strict=True):
        if not torch.equal(mine.nan_to_num(nan=77), other.nan_to_num(nan=77)):
            raise AssertionError(f"early start, {plan}: a kernel did not wait for the one before")


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: f"{order[0]}-{order[1]}")
@pytest.mark.parametrize("plan", PLANS)
def test_kernels_wait_for_those_before_them(plan: str, order: tuple[str, int]) -> None:
    """A block that runs first, as far as to its wait, changes no bit of any result."""
    check_layer(plan, order)
