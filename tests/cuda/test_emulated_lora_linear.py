"""lora_linear's CUDA kernels, run on the host by csrc/cuda/emulation, against the reference."""

from __future__ import annotations

import itertools

import pytest
import torch
from emulated import Emulated, EmulationError, missing
from lora_operands import base
from tolerances import assert_close

from lora_kernels import reference

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (rows, in, out): one row, primes, both sides of every tile, step of depth and path.
SHAPES = [
    (1, 1, 1),
    (1, 64, 64),
    (3, 37, 53),
    (8, 513, 77),
    (17, 128, 130),
    (31, 64, 200),
    (33, 40, 16),
    (65, 136, 65),
    (129, 257, 191),
    (130, 96, 260),
    (600, 24, 70),
]
# By wgmma: one row, both sides of a tile and of its step of depth, more steps than places.
WGMMA_SHAPES = [(1, 64, 64), (33, 40, 16), (129, 257, 191), (140, 520, 260)]
# path, large tiles (in few_rows: blocks make t; 128, 256: by wgmma), splits of K (blocks of a
# cluster, which make t together)
PLANS = [
    ("two_steps", False, 1),
    ("two_steps", True, 1),
    ("two_steps", 128, 1),
    ("two_steps", 256, 1),
    ("in_tile", False, 1),
    ("in_tile", True, 1),
    ("few_rows", False, 1),
    ("few_rows", False, 3),
    ("few_rows", True, 1),
    ("few_rows", True, 2),
    ("few_rows", True, 8),
]
ORDERS = [("forward", 1), ("reverse", 1), ("shuffled", 1), ("shuffled", 2)]


def bank(mode: str, rows: int, k: int, n: int, dtype: torch.dtype, rank: int = 5) -> dict:
    """LoRA operands: PEFT's own layout, by rank row, a ragged bank, dropout, factors in fp32, rows
    of one adapter among rows without.
    """
    if mode == "none":
        return {}
    if mode == "bank":
        ranks = [4, 0, 17, 40]
        operands = {
            "lora_a": (torch.randn(61, k) / k**0.5).to(dtype),
            "lora_b": torch.randn(61, n).to(dtype),
            "scales": torch.tensor([0.7, 1.0, 2.0, -1.0]),
            "offsets": torch.tensor([0, *itertools.accumulate(ranks)], dtype=torch.int32),
            "adapter_ids": torch.randint(-1, 4, (rows,), dtype=torch.int32),
        }
        return operands
    factors = torch.float32 if mode == "fp32" else dtype
    by_rank = mode == "by_rank"
    operands = {
        "lora_a": (torch.randn(rank, k) / k**0.5).to(factors),
        "lora_b": torch.randn(rank, n).to(factors)
        if by_rank
        else torch.randn(n, rank).to(factors).t(),
        "scales": torch.tensor([0.7]),
    }
    if mode == "some":
        operands["adapter_ids"] = torch.randint(-1, 1, (rows,), dtype=torch.int32)
    if mode == "dropout":
        operands |= {"dropout_p": 0.3, "dropout_seed": torch.tensor([-1234567])}
    return operands


def possible(path: str, mode: str, rows: int, large: bool = False) -> bool:
    if path == "few_rows":
        return rows <= 32 and not (large and mode not in ("none", "peft", "by_rank"))
    return path != "in_tile" or mode in ("peft", "by_rank")


def check_forward(emulated: Emulated, shape, dtype, mode, activation, rank: int = 5) -> None:
    rows, k, n = shape
    x, weight, bias, residual = base(rows, k, n, dtype)
    operands = bank(mode, rows, k, n, dtype, rank) | {
        "residual": residual,
        "activation": activation,
    }
    got = emulated.forward(x, weight, bias, **operands)
    exact = reference.lora_linear(x, weight, bias, **operands)
    plain = exact
    if mode != "fp32":
        plain = reference.lora_linear(x, weight, bias, **operands, compute_dtype=dtype)
    assert_close(got, exact, plain.to(dtype), what=f"{rows}x{k}x{n} {activation} {emulated.plan}")


def plan_id(plan: tuple[str, int, int]) -> str:
    path, large, splits = plan
    return f"{path}-{f'wgmma{large}' if large > 1 else f'large{splits}' if large else splits}"


@pytest.mark.parametrize("plan", PLANS, ids=plan_id)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_forward_quickly(dtype: torch.dtype, plan: tuple[str, int, int]) -> None:
    path, large, splits = plan
    if large > 1 and dtype == torch.float32:
        pytest.skip("wgmma is for 16 bits")
    shape = (9, 101, 67) if path == "few_rows" else (70, 101, 67)
    for mode in ("peft", "bank"):
        if possible(path, mode, shape[0], large):
            emulated = Emulated("shuffled", path=path, large=large, splits=splits)
            check_forward(emulated, shape, dtype, mode, "gelu")


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS, ids=plan_id)
@pytest.mark.parametrize("mode", ["none", "peft", "by_rank", "bank", "dropout", "fp32"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_forward(dtype: torch.dtype, mode: str, plan: tuple[str, int, int]) -> None:
    path, large, splits = plan
    if large > 1 and dtype == torch.float32:
        pytest.skip("wgmma is for 16 bits")
    orders = itertools.cycle(ORDERS)
    activations = itertools.cycle(["none", "gelu", "silu"])
    ran = 0
    for shape in WGMMA_SHAPES if large > 1 else SHAPES:
        if not possible(path, mode, shape[0], large):
            continue
        emulated = Emulated(*next(orders), path=path, large=large, splits=splits)
        rank = (16 if path == "few_rows" and large else 29) if shape[1] > 100 else 5
        check_forward(emulated, shape, dtype, mode, next(activations), rank)
        ran += 1
    if not ran:
        pytest.skip("this path does not take such operands")


def test_operands_of_wgmma_come_by_tma_where_their_alignment_allows_it() -> None:
    emulated = Emulated(path="two_steps", large=128)
    emulated.lib.emulated_boxes()
    check_forward(emulated, (130, 520, 136), torch.float16, "peft", "none")
    # Two tiles of rows and two of columns, nine steps of x and W each.
    assert emulated.lib.emulated_boxes() == 2 * 2 * 9 * 2
    check_forward(emulated, (130, 521, 136), torch.float16, "peft", "none")
    x, weight = torch.randn(40, 71).half()[:, 3:67], torch.randn(30, 64).half()
    got = emulated.forward(x, weight)
    assert_close(got, x.double() @ weight.double().T, x @ weight.T)
    assert emulated.lib.emulated_boxes() == 0


def gradients(x, weight, operands, dy, dtype) -> dict[str, torch.Tensor]:
    leaves = {"dx": x, "dweight": weight}
    if "lora_a" in operands:
        leaves |= {"dlora_a": operands["lora_a"], "dlora_b": operands["lora_b"]}
    leaves = {name: leaf.to(dtype).clone().requires_grad_() for name, leaf in leaves.items()}
    rest = {name: v for name, v in operands.items() if name not in ("lora_a", "lora_b")}
    y = reference.lora_linear(
        leaves["dx"],
        leaves["dweight"],
        lora_a=leaves.get("dlora_a"),
        lora_b=leaves.get("dlora_b"),
        compute_dtype=dtype,
        **rest,
    )
    y.backward(dy.to(dtype))
    found = {n: torch.zeros_like(v) if v.grad is None else v.grad for n, v in leaves.items()}
    return found | {"dbias": dy.to(dtype).sum(0)}


def check_backward(emulated: Emulated, shape, dtype, mode, rank: int = 5) -> None:
    rows, k, n = shape
    x, weight, _, dy = base(rows, k, n, dtype)
    operands = bank(mode, rows, k, n, dtype, rank)
    if emulated.keeps_t:
        emulated.forward(x, weight, **operands)
    got = emulated.backward(dy, x, weight, **operands)
    exact = gradients(x, weight, operands, dy, torch.float64)
    plain = gradients(x, weight, operands, dy, dtype)
    for name, want in exact.items():
        budget = got[name].to(dtype)  # rounding is that of the storage type
        assert not got[name].isnan().any(), f"{name} at {shape}"
        assert_close(budget, want, plain[name], what=f"{name} at {rows}x{k}x{n} {mode}")


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_gradients_quickly(dtype: torch.dtype) -> None:
    emulated = Emulated("shuffled", path="two_steps", splits=2)
    check_backward(emulated, (70, 72, 101), dtype, "dropout")


@pytest.mark.slow
@pytest.mark.parametrize(("large", "splits"), [(False, 1), (True, 1), (False, 3)])
@pytest.mark.parametrize("mode", ["none", "peft", "by_rank", "bank", "dropout", "fp32"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_gradients(dtype: torch.dtype, mode: str, large: bool, splits: int) -> None:
    orders = itertools.cycle(ORDERS)
    for shape in [(1, 64, 64), (3, 37, 53), (9, 101, 67), (300, 72, 136)]:
        emulated = Emulated(*next(orders), path="two_steps", large=large, splits=splits)
        check_backward(emulated, shape, dtype, mode)


@pytest.mark.parametrize("mode", ["peft", "dropout", "some"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_gradients_from_one_reading_of_dy(dtype: torch.dtype, mode: str) -> None:
    """Uneven tiles of rows and columns, in one block and in several; t handed over or not."""
    orders = itertools.cycle(ORDERS)
    for shape, splits, rank, keeps_t in [
        ((1, 8, 1), 1, 1, False),
        ((70, 40, 67), 1, 5, True),
        ((200, 24, 200), 3, 16, False),
        ((150, 24, 130), 2, 29, True),
    ]:
        emulated = Emulated(
            *next(orders), path="two_steps", splits=splits, keeps_t=keeps_t, dy_once=True
        )
        check_backward(emulated, shape, dtype, mode, rank)
        assert "dy_once" in emulated.plan


@pytest.mark.parametrize("path", ["two_steps", "few_rows"])
def test_t_of_the_forward_pass_gives_the_same_bits(path: str) -> None:
    for mode in ("peft", "bank", "dropout"):
        rows = 30
        x, weight, _, dy = base(rows, 200, 70, torch.float16)
        operands = bank(mode, rows, 200, 70, torch.float16)
        keeping = Emulated(path=path, keeps_t=True)
        plain = Emulated(path=path)
        y = keeping.forward(x, weight, **operands)
        assert torch.equal(y, plain.forward(x, weight, **operands))
        handed_over = keeping.backward(dy, x, weight, **operands)
        for name, gradient in plain.backward(dy, x, weight, **operands).items():
            assert torch.equal(gradient, handed_over[name]), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=lambda d: str(d)[6:])
def test_sums_over_rows_of_an_adapter_go_segment_by_segment(dtype: torch.dtype) -> None:
    """Steps without a row of the adapter are left out; runs of rows cross every boundary."""
    rows, k, n = 4300, 8, 8
    x, weight, _, dy = base(rows, k, n, dtype)
    operands = bank("bank", rows, k, n, dtype)
    operands["adapter_ids"] = torch.tensor([0, -1, 2, 2, 3, -1, 0, 0, 2, 3], dtype=torch.int32)
    emulated = Emulated("shuffled", path="two_steps")
    got = emulated.backward(dy, x, weight, **operands, needs="dlora")
    exact = gradients(x, weight, operands, dy, torch.float64)
    plain = gradients(x, weight, operands, dy, dtype)
    for name in ("dlora_a", "dlora_b"):
        assert_close(got[name].to(dtype), exact[name], plain[name], what=name)


def test_only_wanted_gradients_are_written() -> None:
    x, weight, _, dy = base(40, 32, 48, torch.float16)
    operands = bank("peft", 40, 32, 48, torch.float16)
    got = Emulated().backward(dy, x, weight, **operands, needs="dlora")
    assert not got["dlora_a"].isnan().any()
    assert not got["dlora_b"].isnan().any()
    assert got["dx"].isnan().all()
    assert got["dweight"].isnan().all()
    assert got["dbias"].isnan().all()


@pytest.mark.parametrize("path", ["two_steps", "in_tile", "few_rows"])
def test_thread_order_does_not_change_a_bit(path: str) -> None:
    """A race, or an atomic whose order matters, would."""
    x, weight, bias, _ = base(30, 200, 70, torch.float16)
    operands = bank("peft", 30, 200, 70, torch.float16, 16)
    results = [
        Emulated(*order, path=path).forward(x, weight, bias, **operands)
        for order in [*ORDERS, ("shuffled", 99)]
    ]
    assert all(torch.equal(result, results[0]) for result in results)


def test_the_mask_of_dropout_is_the_cpu_s() -> None:
    """Bit for bit: with the identity as A and B, y is the mask."""
    k = 48
    x, eye, seed = torch.ones(50, k), torch.eye(k), torch.tensor([7])
    operands = {"lora_a": eye, "lora_b": eye, "dropout_p": 0.25, "dropout_seed": seed}
    kept = reference.dropout_keep_mask(50, k, 0.25, 7)
    y = Emulated(path="two_steps").forward(x, torch.zeros(k, k), None, **operands)
    assert torch.equal(y != 0, kept)
    back = Emulated(path="two_steps").backward(x, x, torch.zeros(k, k), **operands, needs="dx")
    assert torch.equal(back["dx"] != 0, kept)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_no_bank_conflicts(dtype: torch.dtype) -> None:
    """The swizzle spreads the rows that ldmatrix reads together over all banks."""
    emulated = Emulated(path="two_steps")
    emulated.lib.emulated_bank_conflicts()
    for large in (False, True):
        for path in ("two_steps", "in_tile"):
            emulated = Emulated(path=path, large=large)
            check_forward(emulated, (130, 96, 136), dtype, "peft", "none")
        for once in (False, True):
            emulated = Emulated(path="two_steps", large=large, dy_once=once)
            check_backward(emulated, (130, 96, 136), dtype, "peft")
    assert emulated.lib.emulated_bank_conflicts() == 0


@pytest.mark.parametrize("path", ["two_steps", "few_rows"])
def test_ids_and_offsets_out_of_range_are_never_followed(path: str) -> None:
    """Those of a replayed graph are seen by the device alone: an unknown id is the base alone."""
    x, weight, _, _ = base(6, 64, 40, torch.float16)
    operands = bank("bank", 6, 64, 40, torch.float16)
    ids = torch.tensor([7, -9, 2, 2**31 - 1, -(2**31), 0], dtype=torch.int32)
    got = Emulated(path=path).forward(x, weight, **(operands | {"adapter_ids": ids}))
    known = torch.tensor([-1, -1, 2, -1, -1, 0], dtype=torch.int32)
    want = Emulated(path=path).forward(x, weight, **(operands | {"adapter_ids": known}))
    assert torch.equal(got, want)
    broken = torch.tensor([0, 10**6, -5, 4, 61], dtype=torch.int32)
    Emulated(path=path, max_rank=40).forward(x, weight, **(operands | {"offsets": broken}))


def test_a_bound_on_the_rank_is_enough() -> None:
    """Offsets on a device are not waited for: their sum bounds every rank."""
    x, weight, _, _ = base(40, 64, 40, torch.float16)
    operands = bank("bank", 40, 64, 40, torch.float16)
    want = Emulated(path="two_steps").forward(x, weight, **operands)
    got = Emulated(path="two_steps", max_rank=61).forward(x, weight, **operands)
    assert torch.equal(got, want)


def test_misaligned_rows_and_odd_strides() -> None:
    for dtype in DTYPES:
        x = torch.randn(40, 71).to(dtype)[:, 3:67]
        weight = (torch.randn(30, 65) / 8).to(dtype)[:, 1:]
        for path in ("two_steps", "in_tile"):
            got = Emulated(path=path).forward(x, weight, **bank("peft", 40, 64, 30, dtype))
            assert got.shape == (40, 30)
            assert not got.isnan().any()
        exact = x.double() @ weight.double().T
        got = Emulated(path="base").forward(x, weight)
        assert_close(got, exact, (x @ weight.T))


def test_infinities_and_nans_stay_in_their_row() -> None:
    x, weight, _, _ = base(40, 64, 32, torch.float32)
    x[3, 5], x[7, 0] = float("inf"), float("nan")
    for activation in ("none", "gelu", "silu"):
        got = Emulated(path="base").forward(x, weight, activation=activation)
        bad = ~got.isfinite().all(1)
        assert bad.nonzero().flatten().tolist() == [3, 7]


@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_activations_over_their_whole_range(activation: str) -> None:
    special = [0.0, -0.0, 1e-30, -1e-30, 20.0, -20.0, 88.0, -88.0, 1e4, -1e4, 3e38, -3e38]
    values = torch.cat([torch.linspace(-12, 12, 1001), torch.tensor(special)]).reshape(-1, 1)
    got = Emulated(path="base").forward(values, torch.ones(1, 1), activation=activation)
    exact = reference.lora_linear(values, torch.ones(1, 1), activation=activation)
    error = (got.double() - exact).abs() / values.double().abs().clamp_min(1.0)
    assert error.max() < 4e-7
    # fp32 in three products makes NaN of an infinity (its smaller part is infinity - infinity).
    infinite = torch.tensor([[float("inf")], [float("-inf")], [float("nan")]]).half()
    y = Emulated(path="few_rows").forward(infinite, torch.ones(1, 1).half(), activation=activation)
    assert y[0] == float("inf")
    assert y[1] == 0
    assert y[2].isnan()


def test_tf32_rounds_more_and_fp32_does_not() -> None:
    x, weight, _, _ = base(40, 512, 40, torch.float32)
    exact = x.double() @ weight.double().T
    error = {
        tf32: (Emulated(path="base", allow_tf32=tf32).forward(x, weight) - exact).abs().max()
        for tf32 in (False, True)
    }
    assert error[False] < 1e-5 < 1e-4 < error[True] < 1e-2


def test_empty_sizes() -> None:
    """No columns of x: the bias alone. No rows: gradients of parameters are zero."""
    bias = torch.randn(6).half()
    x, weight = torch.empty(5, 0).half(), torch.empty(6, 0).half()
    a, b = torch.empty(2, 0).half(), torch.randn(2, 6).half()
    got = Emulated().forward(x, weight, bias, lora_a=a, lora_b=b)
    assert torch.equal(got, bias.expand(5, 6))
    x, weight, _, dy = base(0, 40, 24, torch.float16)
    got = Emulated().backward(dy, x, weight, **bank("peft", 0, 40, 24, torch.float16))
    for name in ("dweight", "dbias", "dlora_a", "dlora_b"):
        assert (got[name] == 0).all()


def test_the_heuristic_s_own_plans_run() -> None:
    for shape, words in [((1, 1024, 512), "few_rows"), ((200, 128, 96), "tile=64x64")]:
        emulated = Emulated()
        check_forward(emulated, shape, torch.float16, "peft", "none")
        assert words in emulated.plan


def test_refusals_name_every_reason() -> None:
    x, weight, _, _ = base(4, 8, 8, torch.bfloat16)
    with pytest.raises(EmulationError, match=r"on sm_75 expected float16.*got bfloat16.*CPU"):
        Emulated(arch=75).forward(x, weight)
    with pytest.raises(EmulationError, match=r"expected sm_75 or later.*got sm_61"):
        Emulated(arch=61).forward(x, weight)


def test_a_failed_launch_names_kernel_plan_and_cause() -> None:
    x, weight, _, _ = base(300, 8, 8, torch.float16)
    x = x[:1].expand(70000 * 64, 8)  # more tiles than a grid has rows
    with pytest.raises(
        EmulationError, match=r"lora_linear: .*few_rows.*invalid.*the plan was: cuda"
    ):
        Emulated(path="few_rows", splits=70000).forward(x[:1], weight)
