"""``int8_lora_topk`` with a screen: the columns and the bits that it gives without one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_kernels import ops, reference
from lora_kernels.implementations import describe, force_implementation

SHAPES = [(1, 1, 1), (1, 512, 5000), (2, 384, 1000), (3, 37, 71), (4, 130, 128), (6, 61, 131)]
"""Rows, columns of x, columns of the vocabulary; from five rows on no screen is read."""


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def packed_random(n: int, k: int) -> torch.Tensor:
    return ops.int8_pack(*reference.quantize_weight(torch.randn(n, k)))


def both(
    x: torch.Tensor, packed: torch.Tensor, n: int, k: int, bias: torch.Tensor | None = None, **extra
) -> list[tuple[torch.Tensor, ...]]:
    """Values and columns without and with a screen."""
    screen = ops.int8_pack_screen(packed, n, x.shape[-1])
    return [
        ops.int8_lora_topk(x, packed, n, k, bias, screen=s, **extra)[:2] for s in (None, screen)
    ]


def assert_same(pair: list[tuple[torch.Tensor, ...]]) -> None:
    for plain, screened in zip(*pair, strict=True):
        # Bits: a NaN equals itself, and 0 is not -0.
        kind = torch.int32 if plain.dtype == torch.float32 else torch.int64
        assert torch.equal(plain.view(kind), screened.view(kind))


@pytest.mark.usefixtures("implementation", "threads")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_random(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, depth, n = shape
    packed = packed_random(n, depth)
    norm = (1 + torch.randn(depth) / 4, torch.randn(depth) / 4, 1e-5)
    for k in {1, min(3, n), min(8, n)}:
        x = torch.randn(rows, depth).to(dtype)
        assert_same(both(x, packed, n, k))
        assert_same(both(x, packed, n, k, torch.randn(n), norm=norm))
        assert_same(both(x, packed, n, k, torch.randn(n).to(dtype), x_scale=torch.tensor([0.02])))


@pytest.mark.usefixtures("implementation", "threads")
def test_peaked_tied_and_duplicated_rows() -> None:
    n, depth = 3000, 256
    q, scales = reference.quantize_weight(torch.randn(n, depth))
    q[[5, 700, 701, 2999]] = q[123].clone()  # the largest outputs are equal
    scales[[5, 700, 701, 2999]] = scales[123].clone()
    packed = ops.int8_pack(q, scales)
    x = q[[123, 1234, 0]].float() + torch.randn(3, depth)
    for k in range(1, 9):
        pair = both(x, packed, n, k)
        assert_same(pair)
        assert pair[1][1][0, : min(k, 5)].tolist() == [5, 123, 700, 701, 2999][:k]
        assert_same(both(x, packed, n, k, torch.randn(n)))
    coarse = torch.randn(n).round()  # many equal outputs, of a weight that is all zeros
    zeros = ops.int8_pack(torch.zeros(n, depth, dtype=torch.int8), torch.ones(n))
    assert_same(both(x, zeros, n, 8, coarse))
    assert_same(both(torch.zeros(2, depth), packed, n, 8, coarse))
    assert_same(both(torch.zeros(2, depth), packed, n, 8))


@pytest.mark.usefixtures("implementation", "threads")
def test_what_is_not_finite() -> None:
    n, depth = 1001, 96
    packed = packed_random(n, depth)
    for value in (torch.nan, torch.inf, -torch.inf):
        x = torch.randn(3, depth)
        x[1, 7] = value
        assert_same(both(x, packed, n, 3))
        bias = torch.randn(n)
        bias[[3, 500, 1000]] = value
        assert_same(both(x, packed, n, 5, bias))
    bias = torch.full((n,), -torch.inf)
    for left in ([], [700], [64, 700, 1000]):  # fewer than k have a finite bias
        bias[left] = 1.0
        for k in (1, 2, 5):
            assert_same(both(torch.randn(2, depth), packed, n, k, bias))
    q, scales = reference.quantize_weight(torch.randn(n, depth))
    for scale in (1e36, 1e-44, -1.0):  # products beyond fp32, below it, and turned round
        assert_same(both(torch.randn(2, depth), ops.int8_pack(q, scales * scale), n, 4))


@pytest.mark.usefixtures("implementation")
def test_channels_of_small_weights_keep_their_own_spread() -> None:
    """Beside one large weight the others are of one bit: their low nibbles are 0, 1 and 15."""
    n, depth = 2000, 320
    q = torch.randint(-1, 2, (n, depth), dtype=torch.int8)
    q[torch.arange(n), torch.randint(depth, (n,))] = 127
    packed = ops.int8_pack(q, torch.rand(n) + 0.5)
    for _ in range(20):
        assert_same(both(torch.randn(4, depth), packed, n, 3))


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("centred", [True, False])
def test_low_nibbles_that_go_with_the_weight(seed: int, centred: bool) -> None:
    """Beside an outlier the low nibbles are the weights, and x resembles them: not noise to it."""
    n, depth = 1000, 512
    torch.manual_seed(seed)
    weight = torch.randn(n, depth) * 0.3
    weight[0] = torch.randn(depth).abs()
    weight[0, -1] = 25
    x = weight[0] - (weight[0, :-1].mean() if centred else 0)
    x[-1] = 0
    weight[1] = 0.8 * x + 0.3 * torch.randn(depth)
    packed = ops.int8_pack(*reference.quantize_weight(weight))
    assert_same(both(x[None], packed, n, 1))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape_any_implementation(data: st.DataObject) -> None:
    names = [r.name for r in describe()[1] if r.op == "int8_lora_linear" and r.available]
    rows, depth = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 200))
    n = data.draw(st.integers(1, 400))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    q, scales = reference.quantize_weight(torch.randn(n, depth) ** data.draw(st.integers(1, 4)))
    source = torch.randint(data.draw(st.integers(1, n)), (n,))  # some channels twice
    q, scales = q[source], scales[source]
    bias = data.draw(st.sampled_from([None, torch.zeros(n), torch.randn(n) * 10]))
    with force_implementation(data.draw(st.sampled_from(names))):
        assert_same(both(torch.randn(rows, depth), ops.int8_pack(q, scales), n, min(n, 8), bias))


# A screen of another weight tells whether it is read, and what is computed in spite of it.


def hiding(
    x: torch.Tensor, n: int, depth: int, count: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """A packed weight, and a screen that takes the first choices of x for the last."""
    q, scales = reference.quantize_weight(torch.randn(n, depth))
    packed = ops.int8_pack(q, scales)
    first = ops.int8_lora_topk(x, packed, n, count)[1].flatten().unique()
    q[first] = -q[first]
    return packed, ops.int8_pack_screen(ops.int8_pack(q, scales), n, depth)


@pytest.mark.usefixtures("implementation", "threads")
def test_the_screen_is_read() -> None:
    n, depth = 3000, 256
    for rows in (1, 4):
        missed = 0
        for _ in range(6):  # what is hidden comes to light where its neighbours are looked at
            x = torch.randn(rows, depth)
            packed, wrong = hiding(x, n, depth)
            plain = ops.int8_lora_topk(x, packed, n)
            fooled = ops.int8_lora_topk(x, packed, n, screen=wrong)
            missed += int((plain[1] != fooled[1]).sum())
            y = ops.int8_lora_linear(x, packed, n)
            assert torch.equal(fooled[0], y.gather(1, fooled[1])), "values are the weight's own"
        assert missed > 3 * rows


@pytest.mark.usefixtures("implementation", "threads")
def test_all_is_computed_where_the_screen_cannot_tell() -> None:
    n, depth = 3000, 256
    packed = packed_random(n, depth)
    equal = ops.int8_pack(torch.full((n, depth), 8, dtype=torch.int8), torch.ones(n))
    useless = ops.int8_pack_screen(equal, n, depth)
    x = torch.zeros(2, depth)
    x[0, 0], x[1, :9] = 1, torch.nan
    for k in (1, 8):
        plain = ops.int8_lora_topk(x, packed, n, k)
        assert_same([plain[:2], ops.int8_lora_topk(x, packed, n, k, screen=useless)[:2]])


@pytest.mark.usefixtures("implementation")
def test_many_rows_lora_and_log_sum_leave_it_alone() -> None:
    n, depth = 3000, 256
    # An adapter of zeros: with any other the screen would not hide what is largest.
    lora = {"lora_a": torch.zeros(2, depth), "lora_b": torch.zeros(2, n)}
    for rows, extra in ((5, {}), (1, lora), (1, {"log_sum": True})):
        x = torch.randn(rows, depth)
        packed, wrong = hiding(x, n, depth)
        plain = ops.int8_lora_topk(x, packed, n, 2, **extra)
        screened = ops.int8_lora_topk(x, packed, n, 2, screen=wrong, **extra)
        for a, b in zip(plain, screened, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.usefixtures("implementation")
def test_threads_and_other_rows_change_nothing() -> None:
    """Also where the screen is wrong, and what is found depends on which columns are looked at."""
    n, depth = 3000, 256
    x = torch.randn(4, depth)
    packed, wrong = hiding(x, n, depth, 3)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = ops.int8_lora_topk(x, packed, n, 5, screen=wrong)[:2]
        rows = [ops.int8_lora_topk(row, packed, n, 5, screen=wrong)[:2] for row in x]
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            assert_same([one, ops.int8_lora_topk(x, packed, n, 5, screen=wrong)[:2]])
    finally:
        torch.set_num_threads(before)
    assert_same([one, tuple(torch.stack(part) for part in zip(*rows, strict=True))])


@pytest.mark.usefixtures("implementation", "threads")
def test_in_a_composite() -> None:
    n, depth = 3000, 256
    packed, x = packed_random(n, depth), torch.empty(2, depth)
    values, columns = torch.empty(2, 3), torch.empty(2, 3, dtype=torch.int64)
    step = ops.Composite()
    for _ in range(3):  # stages share their memory
        step.int8_lora_topk(
            x, packed, n, values=values, columns=columns,
            screen=ops.int8_pack_screen(packed, n, depth),
        )  # fmt: skip
    assert repr(step).count("top_k=3 screen") == 3
    for _ in range(20):
        x.normal_()
        step.run()
        assert_same([ops.int8_lora_topk(x, packed, n, 3)[:2], (values, columns)])


def test_what_a_screen_holds() -> None:
    n, depth = 70, 13
    q, scales = reference.quantize_weight(torch.randn(n, depth))
    screen = ops.int8_pack_screen(ops.int8_pack(q, scales), n, depth).view(2, -1)
    steps = 2  # of eight columns
    nibbles = screen[:, : steps * 256].view(2, steps, 64, 4)
    halves = torch.stack([nibbles & 15, nibbles >> 4], 3)  # [blocks, steps, channels, 2, 4]
    high = halves.permute(0, 2, 1, 3, 4).reshape(128, -1)[:n, :depth]
    assert torch.equal(high.int(), (q.int() >> 4) + 8)
    of_block = screen[:, steps * 256 :].contiguous().view(torch.float32).view(2, 3, 64)
    low = (q.int() & 15).double()
    expected = (scales, low.mean(1).float(), low.std(1, correction=0).float())
    for i, values in enumerate(expected):
        torch.testing.assert_close(of_block[:, i].reshape(-1)[:n], values)


@pytest.mark.parametrize(
    ("screen", "text"),
    [
        (torch.zeros(5, dtype=torch.uint8), r"screen: expected contiguous uint8 \[1024\]"),
        (torch.zeros(1024), r"screen: expected .* of another dtype"),
        (torch.zeros(2048, dtype=torch.uint8)[::2], "screen: expected contiguous"),
    ],
)
def test_bad_input_is_named(screen: torch.Tensor, text: str) -> None:
    packed = ops.int8_pack(torch.ones(8, 4, dtype=torch.int8), torch.ones(8))
    with pytest.raises(RuntimeError, match=text):
        ops.int8_lora_topk(torch.ones(2, 4), packed, 8, screen=screen)
    with pytest.raises(RuntimeError, match="int8_pack_screen: packed_weight: expected uint8"):
        ops.int8_pack_screen(packed, 8, 5)
    with pytest.raises(RuntimeError, match="in_features: expected at least 0"):
        ops.int8_pack_screen(packed, 8, -1)


def test_opcheck_and_compile() -> None:
    packed, x = packed_random(100, 20), torch.randn(2, 20)
    check, own = torch.library.opcheck, torch.ops.lora_kernels
    check(own.int8_pack_screen.default, (packed, 100, 20))
    screen = ops.int8_pack_screen(packed, 100, 20)
    arguments = (x, packed, 100, 2, *[None] * 9, 0.0, False, screen)
    check(own.int8_lora_topk.default, arguments)

    def call(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return ops.int8_lora_topk(x, packed, 100, 2, screen=screen)[:2]

    assert_same([torch.compile(call, fullgraph=True)(x), call(x)])
