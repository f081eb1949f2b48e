"""kv_relative_step's CUDA kernel, run on the host by the emulation."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from attention_steps import int32
from emulated import missing
from emulated_kv import EmulatedKv, EmulationError
from tolerances import assert_close

from lora_kernels import reference

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ORDERS = [("forward", 1), ("reverse", 1), ("shuffled", 1), ("shuffled", 2)]
# Parakeet's; multiples of nothing; both sides of a chunk of queries, of 64 channels, of a tile;
# chunks of three blocks; rings that are exactly as long as they must be, and longer.
SHAPES: list[dict[str, Any]] = [
    {"tokens": 14, "heads": 2, "head_size": 128, "left": 70, "lengths": (98, 3), "capacity": 84},
    {"tokens": 3, "heads": 1, "head_size": 37, "left": 9, "lengths": (0, 4, 1000), "capacity": 15},
    {"tokens": 19, "heads": 2, "head_size": 72, "left": 40, "lengths": (71,), "capacity": 70},
    {"tokens": 40, "heads": 1, "head_size": 20, "left": 100, "lengths": (120, 2), "capacity": 140},
    {"tokens": 16, "heads": 1, "head_size": 64, "left": 0, "lengths": (5, 32), "capacity": 17},
    {"tokens": 1, "heads": 1, "head_size": 1, "left": 0, "lengths": (9,), "capacity": 1},
]


@dataclasses.dataclass
class RelativeStep:
    """The arguments of one call."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    positions: torch.Tensor
    bias_u: torch.Tensor
    bias_v: torch.Tensor
    lengths: torch.Tensor
    left: int
    counts: torch.Tensor | None = None
    slots: torch.Tensor | None = None
    scale: float = 1.0

    def to(self, device: str) -> RelativeStep:
        return RelativeStep(
            **{
                name: value.to(device, copy=True) if isinstance(value, torch.Tensor) else value
                for name, value in vars(self).items()
            }
        )

    def clone(self) -> RelativeStep:
        return self.to(self.q.device.type)

    def run(self, function, **options) -> torch.Tensor:
        return function(**vars(self), **options)


def make_step(
    tokens: int = 5, heads: int = 2, head_size: int = 24, left: int = 20,
    lengths: tuple[int, ...] = (31, 8), capacity: int = 29, dtype: torch.dtype = torch.float16,
    cache_dtype: torch.dtype | None = None, counts: torch.Tensor | None = None,
    slots: torch.Tensor | None = None, seed: int = 0,
) -> RelativeStep:  # fmt: skip
    """Rings hold NaN wherever no frame is that a row of the call may attend to."""
    generator = torch.Generator().manual_seed(seed)
    rows, rings = len(lengths), len(lengths) + (slots is not None)

    def new(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    caches = torch.full((2, rings, heads, capacity, head_size), float("nan"))
    for row, length in enumerate(lengths):
        ring = row if slots is None else int(slots[row])
        for frame in range(max(0, length - left), length):
            caches[:, ring, :, frame % capacity] = new(2, heads, head_size)
    chunk = (rows, tokens, heads, head_size)
    operands = {
        "q": new(*chunk), "k": new(*chunk), "v": new(*chunk),
        "positions": new(left + 2 * tokens - 1, heads, head_size),
        "bias_u": new(heads, head_size), "bias_v": new(heads, head_size),
    }  # fmt: skip
    return RelativeStep(
        **{name: tensor.to(dtype) for name, tensor in operands.items()},
        k_cache=caches[0].to(cache_dtype or dtype), v_cache=caches[1].to(cache_dtype or dtype),
        lengths=int32(*lengths), left=left, counts=counts, slots=slots, scale=head_size**-0.5,
    )  # fmt: skip


def steps(dtype: torch.dtype) -> list[RelativeStep]:
    """Every shape; every other one with short chunks, and rings in another order than rows."""
    made = []
    for i, shape in enumerate(SHAPES):
        rows, tokens = len(shape["lengths"]), shape["tokens"]
        counts = (torch.arange(rows, 0, -1) * tokens // (rows + 1)).int() if i % 2 else None
        slots = torch.arange(rows, 0, -1).int() if i % 2 else None
        made.append(make_step(**shape, dtype=dtype, counts=counts, slots=slots, seed=i))
    if dtype == torch.float32:
        for cached in DTYPES[1:]:
            made += [make_step(dtype=dtype, cache_dtype=cached, counts=int32(5, 3))]
            made += [make_step(dtype=dtype, cache_dtype=cached, head_size=70)]
    return made


def check_against(step: RelativeStep, ours: RelativeStep, got: torch.Tensor, what: str) -> None:
    """Result, and what was written to the caches of ``ours``, against the reference."""
    theirs = step.clone()
    exact = theirs.run(reference.kv_relative_step)
    plain = step.clone().run(reference.kv_relative_step, dtype=step.q.dtype)
    assert_close(got, exact, plain, what=what)
    for name in ("k_cache", "v_cache"):
        mine, expected = getattr(ours, name), getattr(theirs, name)
        assert torch.equal(mine.nan_to_num(nan=77), expected.nan_to_num(nan=77)), f"{name}: {what}"


def check_steps(dtype: torch.dtype, order: tuple[str, int], **wishes: int) -> None:
    for step in steps(dtype):
        ours, emulated = step.clone(), EmulatedKv(*order, **wishes)
        got = ours.run(emulated.relative_step)
        shape = f"{list(step.q.shape)} {step.k_cache.dtype}"
        check_against(step, ours, got, f"kv relative {shape} {emulated.plan}")


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_steps(dtype: torch.dtype) -> None:
    check_steps(dtype, ("shuffled", 1))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_all_orders(dtype: torch.dtype) -> None:
    for order in ORDERS:
        for chunks in (0, 1):
            check_steps(dtype, order, chunks=chunks)


def test_no_order_of_threads_nor_count_of_blocks_changes_a_bit() -> None:
    step = steps(torch.float16)[3]
    seen = []
    for order in ORDERS:
        for chunks in (1, 2, 3):
            ours = step.clone()
            out = ours.run(EmulatedKv(*order, chunks=chunks).relative_step)
            seen.append((out, ours.k_cache.nan_to_num(), ours.v_cache.nan_to_num()))
    for other in seen[1:]:
        assert all(map(torch.equal, seen[0], other))


def test_a_stream_in_chunks_is_the_stream_at_once() -> None:
    """Chunks that go around the ring several times: each is what its own window alone gives."""
    tokens, left, heads, size, capacity, chunks = 4, 10, 2, 16, 15, 9
    torch.manual_seed(0)
    q, k, v = torch.randn(3, chunks * tokens, heads, size)
    positions = torch.randn(left + 2 * tokens - 1, heads, size)
    bias_u, bias_v = torch.randn(2, heads, size)
    rings = torch.full((2, 1, heads, capacity, size), float("nan"))
    for begin in range(0, chunks * tokens, tokens):
        chunk = slice(begin, begin + tokens)
        got = EmulatedKv("shuffled").relative_step(
            q[None, chunk], k[None, chunk], v[None, chunk], *rings, positions, bias_u, bias_v,
            int32(begin), left=left, scale=0.25,
        )[0]  # fmt: skip
        seen = torch.arange(max(0, begin - left), begin + tokens)
        distance = torch.arange(begin, begin + tokens)[:, None] - seen
        embedded = positions[left + tokens - 1 - distance].double()  # [T, frames, H, D]
        query = q[chunk].double()
        scores = torch.einsum("ihd,fhd->hif", query + bias_u, k[seen].double())
        scores += torch.einsum("ihd,ifhd->hif", query + bias_v, embedded)
        weights = (0.25 * scores).softmax(-1)
        want = torch.einsum("hif,fhd->ihd", weights, v[seen].double())
        assert_close(got, want, extra=1e-5, what=f"frames from {begin}")


def test_empty_chunks_append_nothing_and_give_zeros() -> None:
    step = make_step(counts=int32(0, 5))
    before = step.k_cache[0].clone()
    got = step.run(EmulatedKv("shuffled").relative_step)
    assert torch.equal(got[0], torch.zeros_like(got[0]))
    assert got[1].isfinite().all()
    assert torch.equal(step.k_cache[0].nan_to_num(), before.nan_to_num())
    nothing = make_step(lengths=())
    assert nothing.run(EmulatedKv().relative_step).shape == (0, 5, 2, 24)


def test_what_is_beyond_a_short_chunk_is_ignored() -> None:
    """NaN in the frames behind ``counts``, in rows of P of distances that do not come up."""
    step = make_step(counts=int32(3, 2), lengths=(31, 8))
    clean = step.clone().run(EmulatedKv().relative_step)
    for row, count in enumerate((3, 2)):
        for tensor in (step.q, step.k, step.v):
            tensor[row, count:] = float("nan")
    step.positions[step.left + 2 * 5 - 1 - 2 :] = float("nan")  # 3 and 4 frames ahead
    assert torch.equal(step.run(EmulatedKv("shuffled").relative_step), clean)


def test_what_is_not_finite_stays_in_its_row_and_head() -> None:
    step = make_step()
    step.q[0, 1, 0, 3] = float("inf")
    step.v[1, 4, 1, 2] = float("nan")
    got = step.run(EmulatedKv().relative_step)
    want = torch.zeros(got.shape, dtype=torch.bool)
    want[0, 1, 0] = True
    want[1, :, 1, 2] = True
    assert torch.equal(got.isnan(), want)


def test_bad_indices_make_their_row_nan_and_write_nothing() -> None:
    """Lengths, counts and slots out of range, of either sign and size, are not followed."""
    for bad in (-1, 2**31 - 1, -(2**31), 50):
        for name in ("lengths", "counts", "slots"):
            if name == "lengths" and bad > 0:  # a length like any other
                continue
            step = make_step(lengths=(31, 8, 20), counts=int32(5, 5, 5), slots=int32(1, 2, 0))
            getattr(step, name)[1] = bad
            before = step.clone()
            got = step.run(EmulatedKv("shuffled").relative_step)
            assert got.isnan().flatten(1).all(1).tolist() == [False, True, False], (name, bad)
            assert not got[[0, 2]].isnan().any()
            for ring in (2, 3):  # the bad row's, and nobody's
                for cache in ("k_cache", "v_cache"):
                    now, then = getattr(step, cache)[ring], getattr(before, cache)[ring]
                    assert torch.equal(now.nan_to_num(), then.nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES[::2], ids=lambda d: str(d)[6:])
def test_any_address(dtype: torch.dtype) -> None:
    """Each operand in turn begins where no eight elements are aligned."""
    step = make_step(head_size=64, dtype=dtype)
    want = step.clone().run(EmulatedKv().relative_step)
    for name in ("q", "k", "v", "k_cache", "v_cache", "positions", "bias_u", "bias_v"):
        moved = step.clone()
        tensor = getattr(moved, name)
        shifted = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)
        setattr(moved, name, shifted.copy_(tensor))
        assert torch.equal(moved.run(EmulatedKv().relative_step), want), name


def test_what_a_device_does_not_support() -> None:
    for step, arch, words in (
        (make_step(head_size=129), 80, "head size: expected at most 128, got 129"),
        (make_step(dtype=torch.bfloat16), 75, "q: on sm_75 expected float16"),
        (make_step(), 70, "architecture: expected sm_75 or later"),
        (make_step(cache_dtype=torch.float32), 90, "k_cache, v_cache: expected float16"),
    ):
        with pytest.raises(EmulationError, match=words):
            step.run(EmulatedKv(arch=arch).relative_step)


def test_plans() -> None:
    """Sixteen queries to a block, 64 or 128 channels; more streams never take less time."""
    for sizes, words in (
        ({"tokens": 16, "head_size": 64, "capacity": 36}, "channels=64 chunks=1 "),
        ({"tokens": 33, "head_size": 65, "capacity": 53}, "channels=128 chunks=3 "),
    ):
        emulated, predicted = EmulatedKv(), []
        for streams in (1, 40):
            make_step(**sizes, lengths=(7,) * streams).run(emulated.relative_step)
            assert words in emulated.plan
            predicted.append(float(emulated.plan.split("predicted=")[1].removesuffix("us")))
        assert 4.5 < predicted[0] <= predicted[1]
