"""Tiles by wgmma: dx, whose second operand has its depth across its rows, and t beside y."""

from __future__ import annotations

import itertools

import pytest
import torch
from emulated import Emulated, missing
from test_emulated_lora_linear import ORDERS, bank, base, check_backward, gradients
from tolerances import assert_close

from lora_kernels import reference

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

DTYPES = [torch.float16, torch.bfloat16]
# (rows, in, out): one row, both sides of a tile and of its step of depth, more steps than places;
# sizes in eights come by TMA, others by copies.
SHAPES = [(1, 64, 64), (33, 16, 40), (129, 191, 257), (130, 264, 456)]


def dx_alone(emulated: Emulated, x, weight, dy, operands) -> torch.Tensor:
    return emulated.backward(dy, x, weight, **operands, needs="dx")["dx"]


def check_dx(emulated: Emulated, x, weight, dy, operands, what: str) -> None:
    got = dx_alone(emulated, x, weight, dy, operands)
    exact = gradients(x, weight, operands, dy, torch.float64)["dx"]
    plain = gradients(x, weight, operands, dy, x.dtype)["dx"]
    assert "wgmma" in emulated.plan
    assert_close(got, exact, plain, what=f"dx {what}")


@pytest.mark.parametrize("columns", [128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_gradients_quickly(dtype: torch.dtype, columns: int) -> None:
    for mode, shape in [("peft", (70, 72, 104)), ("bank", (70, 71, 101)), ("dropout", (9, 72, 67))]:
        emulated = Emulated("shuffled", path="two_steps", large=columns)
        check_backward(emulated, shape, dtype, mode)
        assert f"wgmma dx_tile=128x{columns}" in emulated.plan


@pytest.mark.slow
@pytest.mark.parametrize("columns", [128, 256])
@pytest.mark.parametrize("mode", ["none", "peft", "by_rank", "bank", "some", "dropout", "fp32"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_gradients(dtype: torch.dtype, mode: str, columns: int) -> None:
    orders = itertools.cycle(ORDERS)
    for shape in SHAPES:
        rows, k, n = shape
        x, weight, _, dy = base(rows, k, n, dtype)
        operands = bank(mode, rows, k, n, dtype, 29 if k > 100 else 5)
        emulated = Emulated(*next(orders), path="two_steps", large=columns)
        check_dx(emulated, x, weight, dy, operands, f"at {shape} {mode}")


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_ranks_beyond_a_step_and_adapters_that_share_a_tile(dropout: float) -> None:
    """Whole and broken steps of 64 ranks, in sixteens and between them, rows of the base alone."""
    rows, k, n = 140, 72, 80
    ranks = [70, 0, 130, 16, 33, 64]
    x, weight, _, dy = base(rows, k, n, torch.float16)
    adapter_ids = torch.randint(-1, len(ranks), (rows,), dtype=torch.int32)
    adapter_ids[128:] = 3  # the second tile has fewer steps than the first, with which it shares W
    operands = {
        "lora_a": (torch.randn(sum(ranks), k) / k**0.5).half(),
        "lora_b": torch.randn(sum(ranks), n).half(),
        "offsets": torch.tensor([0, *itertools.accumulate(ranks)], dtype=torch.int32),
        "scales": torch.tensor([0.7, 1.0, -0.2, 2.0, 0.1, 0.4]),
        "adapter_ids": adapter_ids,
    }
    if dropout:
        operands |= {"dropout_p": dropout, "dropout_seed": torch.tensor([5])}
    for order in ORDERS[:3]:
        emulated = Emulated(*order, path="two_steps", large=128)
        check_dx(emulated, x, weight, dy, operands, "of a bank")


@pytest.mark.parametrize(("columns", "boxes"), [(128, 2), (256, 3)])
def test_operands_come_by_tma_where_their_alignment_allows_it(columns: int, boxes: int) -> None:
    """A box of dy in each step, and one of W for every 64 columns of half of a tile of dx."""
    emulated = Emulated(path="two_steps", large=columns)
    emulated.lib.emulated_boxes()
    for mode in ("peft", "dropout"):
        x, weight, _, dy = base(130, 136, 456, torch.float16)
        check_dx(emulated, x, weight, dy, bank(mode, 130, 136, 456, torch.float16), mode)
        # Two tiles of rows; 136 columns are two tiles of 128; eight steps.
        assert emulated.lib.emulated_boxes() == 2 * (2 if columns == 128 else 1) * 8 * boxes
    # dy of an odd width, W of an odd stride, and W that begins between multiples of sixteen bytes.
    x, weight, _, dy = base(130, 136, 457, torch.float16)
    check_dx(emulated, x, weight, dy, {}, "of an odd width")
    x, weight, _, dy = base(40, 64, 72, torch.float16)
    for wide, begin in ((71, 0), (72, 3)):
        view = torch.randn(72, wide).half()[:, begin : begin + 64]
        check_dx(emulated, x, view, dy, {}, "of a view of W")
    assert emulated.lib.emulated_boxes() == 0


@pytest.mark.parametrize("mode", ["bank", "dropout"])
def test_thread_order_does_not_change_a_bit(mode: str) -> None:
    x, weight, _, dy = base(70, 72, 200, torch.float16)
    operands = bank(mode, 70, 72, 200, torch.float16, 16)
    results = [
        dx_alone(Emulated(*order, path="two_steps", large=128), x, weight, dy, operands)
        for order in [*ORDERS, ("shuffled", 99)]
    ]
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("k", [48, 50, 300])
@pytest.mark.parametrize("columns", [128, 256])
def test_the_mask_of_dropout_is_the_cpu_s(k: int, columns: int) -> None:
    """Bit for bit, with the identity as A and B; rows are whole counters, or are not."""
    ones, eye = torch.ones(50, k).half(), torch.eye(k).half()
    operands = {
        "lora_a": eye,
        "lora_b": eye,
        "dropout_p": 0.25,
        "dropout_seed": torch.tensor([7]),
    }
    emulated = Emulated(path="two_steps", large=columns)
    dx = dx_alone(emulated, ones, torch.zeros(k, k).half(), ones, operands)
    assert torch.equal(dx != 0, reference.dropout_keep_mask(50, k, 0.25, 7))


def test_the_branch_of_rows_without_an_adapter_is_zero_under_dropout() -> None:
    """No branch at all: nothing is masked, and the base is whole."""
    x, weight, _, dy = base(20, 72, 80, torch.float16)
    operands = bank("dropout", 20, 72, 80, torch.float16)
    operands["adapter_ids"] = torch.full((20,), -1, dtype=torch.int32)
    dx = dx_alone(Emulated(path="two_steps", large=128), x, weight, dy, operands)
    assert_close(dx, dy.double() @ weight.double(), dy @ weight)


def test_infinities_and_nans_stay_in_their_row() -> None:
    x, weight, _, dy = base(40, 64, 72, torch.float16)
    dy[3, 5], dy[7, 0] = float("inf"), float("nan")
    operands = bank("peft", 40, 64, 72, torch.float16)
    dx = dx_alone(Emulated(path="two_steps", large=128), x, weight, dy, operands)
    assert (~dx.isfinite().all(1)).nonzero().flatten().tolist() == [3, 7]


@pytest.mark.parametrize("mode", ["peft", "bank", "some"])
def test_t_beside_the_product_has_the_same_bits(mode: str) -> None:
    """Few blocks make t of all rows in turn, with fewer loads in flight: the same sums."""
    x, weight, bias, _ = base(150, 200, 70, torch.float16)
    operands = bank(mode, 150, 200, 70, torch.float16, 16)
    plain = Emulated(path="two_steps", large=128).forward(x, weight, bias, **operands)
    for order in ORDERS:
        beside = Emulated(*order, path="two_steps", large=128, t_blocks=3)
        assert torch.equal(beside.forward(x, weight, bias, **operands), plain)
        assert "t_blocks=3" in beside.plan
