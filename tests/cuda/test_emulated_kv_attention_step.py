"""kv_attention_step's and kv_pack's CUDA kernels, run on the host by the emulation."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from attention_steps import Step, int32, make_blocked_step, make_step
from emulated import missing
from emulated_int8 import EmulatedInt8
from emulated_kv import EmulatedKv, EmulationError
from tolerances import FOURTEEN_BITS, assert_close

from lora_kernels import ops, reference

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ORDERS = [("forward", 1), ("reverse", 1), ("shuffled", 1), ("shuffled", 2)]
SLOTS = ("none", "per row", "per position")
# Multiples of nothing, both sides of a tile, of a chunk of queries, of 64 channels, of a split.
SHAPES = [
    {"rows": 3, "tokens": 1, "heads": 2, "head_size": 64, "capacity": 70},
    {"rows": 2, "tokens": 1, "heads": 1, "head_size": 37, "capacity": 16},
    {"rows": 5, "tokens": 3, "heads": 1, "head_size": 20, "capacity": 33},
    {"rows": 2, "tokens": 1, "heads": 1, "head_size": 128, "capacity": 150},
    {"rows": 1, "tokens": 19, "heads": 2, "head_size": 72, "capacity": 40},
    {"rows": 1, "tokens": 1, "heads": 1, "head_size": 1, "capacity": 1},
    {"rows": 2, "tokens": 3, "heads": 1, "head_size": 61, "capacity": 290},
]


def step_of(shape: dict, dtype, cache_dtype, append: bool, slots: str, seed: int = 0) -> Step:
    """A step whose rows differ in length; with slots there are more cache rows than rows."""
    rows = shape["rows"]
    cache_rows = rows + 1
    per_channel = not append and slots != "per position"
    where = None if slots == "none" else slots
    if slots == "per row":
        where = torch.arange(rows, 0, -1, dtype=torch.int32)
        if not append:  # some share theirs
            where = where.clamp_max(2)
    most = shape["capacity"] - (shape["tokens"] if append else 0)
    lengths = torch.tensor([max(0, most - 5 * i) for i in range(rows)], dtype=torch.int32)
    return make_step(
        **shape, cache_rows=cache_rows, dtype=dtype, cache_dtype=cache_dtype, lengths=lengths,
        per_channel=per_channel, append=append, slots=where, seed=seed,
    )  # fmt: skip


def check(emulated: EmulatedKv, step: Step, what: str = "") -> None:
    """One call of the kernels, against the reference."""
    ours = step.clone()
    got, weights = ours.run(emulated.step)
    check_against(step, ours, got, weights, f"kv {what} {emulated.plan}")


def check_against(step: Step, ours: Step, got: torch.Tensor, weights: torch.Tensor, what: str):
    """Result, weights and what was written to the caches of ``ours``, against the reference."""
    theirs = step.clone()
    exact, exact_weights = theirs.run(reference.kv_attention_step)
    if step.k_cache.dim() == 6:
        units = step.v_scales.nan_to_num(posinf=0).flatten().tolist()
        averaged = max(units) * 127 / 10
        assert_close(got, exact, extra=FOURTEEN_BITS, averaged=averaged, what=what)
    else:
        plain, _ = reference.kv_attention_step(**vars(step.clone()), compute_dtype=step.q.dtype)
        assert_close(got, exact, plain, what=what)
    if step.heads:
        # Scores come from q, or from q times the scales of K, rounded to the type of the products.
        extra = 1e-4 if step.k_scales is None else 2e-2
        assert_close(weights, exact_weights, extra=extra, what=f"weights of {what}")
    for mine, expected in zip(ours.caches(), theirs.caches(), strict=True):
        assert torch.equal(mine.nan_to_num(nan=77), expected.nan_to_num(nan=77)), f"caches: {what}"


def kinds(dtype: torch.dtype) -> list[tuple[torch.dtype, bool, str]]:
    """Types of caches that go with one of q, with and without append, every kind of slots."""
    cached = [dtype, torch.int8, *(DTYPES[1:] if dtype == torch.float32 else [])]
    return list(itertools.product(cached, (True, False), SLOTS))


def check_steps(dtype: torch.dtype, order: tuple[str, int], **wishes: int) -> None:
    """Every kind, a shape for each in turn."""
    for (cached, append, slots), shape in zip(kinds(dtype), itertools.cycle(SHAPES)):
        step = step_of(shape, dtype, cached, append, slots)
        check(EmulatedKv(*order, **wishes), step, f"{cached} append={append} slots={slots}")


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_steps(dtype: torch.dtype) -> None:
    check_steps(dtype, ("shuffled", 1))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_all_steps(dtype: torch.dtype) -> None:
    orders = itertools.cycle(ORDERS)
    for shape, (cached, append, slots) in itertools.product(SHAPES, kinds(dtype)):
        step = step_of(shape, dtype, cached, append, slots, seed=1)
        step.heads = [shape["heads"] - 1]
        emulated = EmulatedKv(*next(orders), split_positions=128, apart=True)
        check(emulated, step, f"{shape} {cached} append={append} slots={slots}")


def blocked_steps(dtype: torch.dtype) -> list[Step]:
    """One query, beams of an utterance that also differ in length, more than a chunk has."""
    return [
        make_blocked_step(rows=2, dtype=dtype, positions=70, lengths=int32(70, 33)),
        make_blocked_step(
            rows=7, cache_rows=3, head_size=37, dtype=dtype, positions=150, chosen=[1, 0],
            slots=int32(2, 0, 2, 2, 0, 2, 2), lengths=int32(150, 9, 150, 31, 0, 149, 150),
        ),
        make_blocked_step(rows=1, tokens=19, heads=1, head_size=72, dtype=dtype, positions=41),
        make_blocked_step(rows=1, heads=1, head_size=128, dtype=dtype, positions=3),
    ]  # fmt: skip


def check_blocked(dtype: torch.dtype, order: tuple[str, int], **wishes: int) -> None:
    for step in blocked_steps(dtype):
        check(EmulatedKv(*order, **wishes), step, "blocked")


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_blocked(dtype: torch.dtype) -> None:
    check_blocked(dtype, ("shuffled", 1))
    check_blocked(dtype, ("reverse", 1), split_positions=128)


def check_clusters(dtype: torch.dtype, order: tuple[str, int]) -> None:
    """Blocks without positions, lists that follow one another; the bits that kv_combine makes."""
    tokens, positions = 19, 290
    cross = make_blocked_step(rows=1, tokens=tokens, head_size=70, dtype=dtype, positions=positions)
    own = make_step(rows=2, tokens=tokens, head_size=29, capacity=positions, dtype=dtype)
    for step, cluster, chunks in itertools.product((cross, own), (2, 4, 8), (1, 2)):
        emulated = EmulatedKv(*order, cluster=cluster, chunks=chunks)
        check(emulated, step, "cluster")
        assert f"splits={cluster}x{256 if cluster == 2 else 128} cluster" in emulated.plan
        ours, _ = step.clone().run(emulated.step)
        apart = EmulatedKv(*order, split_positions=256 if cluster == 2 else 128)
        by_memory, _ = step.clone().run(apart.step)
        assert "cluster" not in apart.plan
        assert torch.equal(ours, by_memory), f"kv cluster of {cluster}"


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: f"{order[0]}-{order[1]}")
def test_clusters(order: tuple[str, int]) -> None:
    check_clusters(torch.float16, order)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_all_steps_in_clusters(dtype: torch.dtype) -> None:
    check_clusters(dtype, ("shuffled", 1))
    for cluster, order in zip((2, 4, 8), ORDERS, strict=False):
        check_steps(dtype, order, cluster=cluster)
        check_blocked(dtype, order, cluster=cluster)


def test_blocked_sums_are_integers() -> None:
    """One position is all that is seen: V as it is, whatever the score, in every bit."""
    step = make_blocked_step(rows=2, positions=9, lengths=int32(1, 1))
    step.v_scales.fill_(1)
    got, _ = step.run(EmulatedKv("shuffled").step)
    assert torch.equal(got, got.round())


def test_beams_give_what_each_gives_alone() -> None:
    """Rows of one cache row are one product's rows; other rows change no bit of theirs."""
    slots = int32(1, 0, 1, 1, 0)
    lengths = int32(40, 90, 90, 0, 17)
    for step in (
        make_step(rows=5, cache_rows=2, capacity=90, append=False, slots=slots, lengths=lengths),
        make_blocked_step(rows=5, cache_rows=2, positions=90, slots=slots, lengths=lengths),
    ):
        emulated = EmulatedKv("shuffled", split_positions=128)
        together, _ = step.clone().run(emulated.step)
        assert "grouped" in emulated.plan
        for row in range(5):
            alone = dataclasses.replace(
                step.clone(), q=step.q[row : row + 1].clone(), slots=slots[row : row + 1].clone(),
                lengths=lengths[row : row + 1].clone(),
            )  # fmt: skip
            got, _ = alone.run(emulated.step)
            assert torch.equal(got[0], together[row]), row
        few, _ = step.clone().run(EmulatedKv(chunks=3).step)  # idle blocks change nothing
        assert_close(few, together.double())


def test_no_order_of_threads_changes_a_bit() -> None:
    for step in (
        make_step(rows=3, capacity=150, dtype=torch.float16, slots="per position", chosen=[1]),
        make_step(rows=2, capacity=40, cache_dtype=torch.int8, dtype=torch.float16),
        blocked_steps(torch.float16)[1],
    ):
        for wishes in ({}, {"split_positions": 128}, {"cluster": 2}):
            seen = [step.clone().run(EmulatedKv(*order, **wishes).step) for order in ORDERS]
            for out, weights in seen[1:]:
                assert torch.equal(out, seen[0][0])
                assert torch.equal(weights, seen[0][1])


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_new_tokens_of_other_rows_are_seen(dtype: torch.dtype) -> None:
    """A row whose table names what another row writes in the same call reads the new vector."""
    step = make_step(
        rows=3, capacity=30, lengths=int32(20, 4, 9), slots="per position", seed=3, dtype=dtype
    )
    assert step.slots is not None
    step.slots[:, :] = torch.arange(3, dtype=torch.int32)[:, None]
    step.slots[0, 4], step.slots[0, 9] = 1, 2
    step.slots[2, 4] = 1
    for name in ("k_cache", "v_cache"):  # what the new vectors replace must not be seen
        getattr(step, name)[1, :, 4] = getattr(step, name)[2, :, 9] = float("nan")
        getattr(step, name).nan_to_num_(nan=0.5)
        getattr(step, name)[1, :, 4] = 1e4
    for apart in (False, True):
        check(EmulatedKv("shuffled", apart=apart), step, "others' new tokens")


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_what_a_query_does_not_see_stays_away(dtype: torch.dtype) -> None:
    """NaN and infinity at the end of a longer row, and in its own new token."""
    step = make_step(
        rows=3, cache_rows=1, capacity=40, append=False, slots=int32(0, 0, 0),
        lengths=int32(21, 40, 20), dtype=torch.float16,
    )  # fmt: skip
    step.k_cache[0, :, 21:], step.v_cache[0, :, 30:] = float("inf"), float("nan")
    got, _ = step.clone().run(EmulatedKv().step)
    assert got.isnan().flatten(1).all(1).tolist() == [False, True, False]
    step = make_step(rows=2, tokens=4, capacity=20, lengths=int32(3, 9), dtype=dtype)
    assert step.v is not None
    step.v[0, 2] = float("nan")
    got, _ = step.clone().run(EmulatedKv().step)
    assert got.isnan().flatten(2).all(2).tolist() == [[False, False, True, True], [False] * 4]


@pytest.mark.parametrize(("split", "cluster"), [(0, 0), (128, 0), (0, 2)])
@pytest.mark.parametrize("dtype", DTYPES[::2], ids=lambda d: str(d)[6:])
def test_bad_indices_make_their_row_nan_and_write_nothing(
    split: int, cluster: int, dtype: torch.dtype
) -> None:
    """Lengths and slots out of range, of either sign and size, are not followed."""
    emulated = EmulatedKv("shuffled", split_positions=split, cluster=cluster)
    for bad in (-1, 50, 2**31 - 1, -(2**31)):
        of = {"capacity": 50, "dtype": dtype}
        step = make_step(**of, rows=3, lengths=int32(9, 4, 8), slots="per position")
        step.lengths[1] = bad
        before = step.k_cache[1].clone()
        got, weights = dataclasses.replace(step, heads=[0]).run(emulated.step)
        assert got.isnan().flatten(1).all(1).tolist() == [False, True, False]
        assert weights.isnan().flatten(1).all(1).tolist() == [False, True, False]
        assert torch.equal(step.k_cache[1].nan_to_num(), before.nan_to_num())
        for append in (True, False):
            step = make_step(
                **of, rows=3, lengths=int32(9, 9, 8), slots=int32(1, 2, 0), append=append,
                chosen=[1],
            )  # fmt: skip
            assert step.slots is not None
            step.slots[1] = bad
            got, weights = step.run(emulated.step)
            assert got.isnan().flatten(1).all(1).tolist() == [False, True, False]
            assert weights.isnan().flatten(1).all(1).tolist() == [False, True, False]
        step = make_blocked_step(
            rows=3, positions=50, cache_rows=2, slots=int32(1, bad, 0), dtype=dtype
        )
        got, _ = step.run(emulated.step)
        assert got.isnan().flatten(1).all(1).tolist() == [False, True, False]
        step = make_step(**of, rows=2, lengths=int32(9, 20), slots="per position")
        assert step.slots is not None
        step.slots[0, 5] = bad  # a past position
        step.slots[1, 20] = bad  # the new one
        got, _ = step.run(emulated.step)
        assert got.isnan().all()


def test_scales_that_are_no_scales_make_nan() -> None:
    """Where a CPU refuses them: of a channel, not above zero or not finite."""
    for bad in (0.0, -1.0, float("inf"), float("nan")):
        step = make_step(
            rows=2, capacity=9, append=False, cache_dtype=torch.int8, per_channel=True,
            dtype=torch.float16, lengths=int32(9, 9),
        )  # fmt: skip
        assert step.k_scales is not None
        step.k_scales[0, 1, 0, 3] = bad
        assert step.v_scales is not None
        step.v_scales[1, 0, 0, 5] = bad
        got, _ = step.run(EmulatedKv().step)
        want = torch.zeros(got.shape, dtype=torch.bool)
        want[0, :, 1], want[1, :, 0, 5] = True, True
        assert torch.equal(got.isnan(), want), bad


def test_rows_that_are_not_finite() -> None:
    for step in (blocked_steps(torch.float16)[0], make_step(dtype=torch.float16)):
        step.q[0, 0, 0, 3] = float("inf")
        step.q[1, 0, 1, 0] = float("nan")
        got, _ = step.run(EmulatedKv().step)
        want = torch.zeros(got.shape[:3], dtype=torch.bool)
        want[0, 0, 0] = want[1, 0, 1] = True
        assert torch.equal(got.isnan().any(3), want)


# (utterances, positions, heads, head size)
PACKS = [(2, 70, 2, 64), (1, 3, 3, 37), (2, 129, 1, 80), (1, 1, 1, 1)]


def check_pack(dtype: torch.dtype, order: tuple[str, int]) -> None:
    """Also of slices, and of channels of zeros, tiny ones and ones that are not finite."""
    for rows, positions, heads, size in PACKS:
        fused = torch.randn(rows, positions, 2 * heads * size + 3)
        fused[0, 0, 0], fused[:, :, 2 % fused.shape[2]] = float("inf"), 0
        fused[0, -1, heads * size] = float("nan")
        fused[:, :, -5:-3] *= 1e-42
        k = fused.to(dtype)[..., : heads * size]
        v = fused.to(dtype)[..., heads * size : 2 * heads * size]
        got = EmulatedKv(*order).pack(k, v, heads)
        for mine, cpu in zip(got, ops.kv_pack(k.contiguous(), v.contiguous(), heads), strict=True):
            same = torch.equal(mine.float().nan_to_num(nan=77), cpu.float().nan_to_num(nan=77))
            assert same, f"kv pack {rows}x{positions}x{heads}x{size}"


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_pack_gives_the_bits_of_the_cpu(dtype: torch.dtype) -> None:
    for order in ORDERS[1:3]:
        check_pack(dtype, order)


def test_a_decoder_layer_by_its_calls() -> None:
    """The operators that a recorded step of Whisper calls, in its order, on CUDA's kernels."""
    rows, heads, width, frames, words = 3, 2, 128, 70, 300
    shape = (rows, 1, heads, width // heads)
    names = ("q", "k", "v", "out", "cross_q", "cross_k", "cross_v", "cross_out", "words")
    weights = {
        name: ops.int8_pack(
            *reference.quantize_rows(torch.randn(words if name == "words" else width, width) / 11)
        )
        for name in names
    }
    norm = (torch.rand(width) + 0.5, torch.randn(width), 1e-5)
    encoded = torch.randn(rows * frames, width).half()
    x = torch.randn(rows, width).half()
    slots, lengths = int32(2, 0, 1), int32(3, 3, 3)
    int8, kv = EmulatedInt8("shuffled"), EmulatedKv("shuffled")

    def run(linear, topk, step, pack) -> tuple[torch.Tensor, ...]:
        cross = [
            linear(encoded, weights[name], width).view(rows, frames, width)
            for name in ("cross_k", "cross_v")
        ]
        cross = pack(*cross, heads)
        caches = torch.zeros(2, rows, heads, 20, width // heads).half()
        caches[:, :, :, :3] = torch.linspace(-1, 1, 64).half()
        q, k, v = (linear(x, weights[n], width, norm=norm).view(shape) for n in "qkv")
        out, _ = step(q, k, v, *caches, lengths, slots=slots, scale=0.125)
        y = linear(out.view(rows, width), weights["out"], width, residual=x)
        q = linear(y, weights["cross_q"], width, norm=norm).view(shape)
        keys, values, k_scales, v_scales = cross
        out, _ = step(
            q, None, None, keys, values, torch.full((rows,), frames, dtype=torch.int32),
            k_scales=k_scales, v_scales=v_scales, slots=slots, scale=0.125,
        )  # fmt: skip
        y = linear(out.view(rows, width), weights["cross_out"], width, residual=y)
        return y, topk(y, weights["words"], words, 1, norm=norm)[0]

    got = run(int8.forward, int8.topk, kv.step, kv.pack)
    want = run(ops.int8_lora_linear, ops.int8_lora_topk, ops.kv_attention_step, ops.kv_pack)
    for mine, cpu in zip(got, want, strict=True):
        # A value that rounds to another integer in one quantization shifts those behind it.
        assert_close(mine.float(), cpu.double(), extra=2e-2, what="decoder layer")


def test_heuristic_plans() -> None:
    """What is appended where, and how positions are split."""
    emulated = EmulatedKv()
    make_step(rows=2, dtype=torch.float16).run(emulated.step)
    assert "fused" in emulated.plan
    assert "splits=1x" in emulated.plan
    make_step(rows=2, dtype=torch.float16, cache_dtype=torch.int8).run(emulated.step)
    assert "fused" not in emulated.plan
    step = make_blocked_step(rows=2, cache_rows=1, positions=1500, slots=int32(0, 0))
    check(emulated, step, "cross")
    assert "grouped" in emulated.plan
    assert "splits=1x" not in emulated.plan


def test_refusals_name_every_reason() -> None:
    step = make_step(rows=1, dtype=torch.bfloat16)
    with pytest.raises(EmulationError, match=r"q: on sm_75 expected float16.*got bfloat16.*CPU"):
        step.run(EmulatedKv(arch=75).step)
    with pytest.raises(EmulationError, match=r"expected sm_75 or later.*got sm_61"):
        step.run(EmulatedKv(arch=61).step)
    step = make_step(rows=1, head_size=200, dtype=torch.float16, cache_dtype=torch.bfloat16)
    with pytest.raises(EmulationError, match=r"expected float16, as q is.*head size.*128, got 200"):
        step.run(EmulatedKv().step)
    states = torch.randn(1, 5, 8).bfloat16()
    with pytest.raises(EmulationError, match=r"kv_pack: .*on sm_75 expected float16"):
        EmulatedKv(arch=75).pack(states, states, 2)
