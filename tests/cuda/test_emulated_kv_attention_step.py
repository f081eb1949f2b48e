"""kv_attention_step's and kv_pack's CUDA kernels, run on the host by the emulation, against the
reference."""

from __future__ import annotations

import itertools

import pytest
import torch
from emulated import missing
from emulated_kv import EmulatedKv, EmulationError
from tolerances import FOURTEEN_BITS, assert_close

from lora_kernels import reference

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ORDERS = [("forward", 1), ("reverse", 1), ("shuffled", 1), ("shuffled", 2)]
# (rows, tokens, heads, head size, capacity, cache rows)
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (3, 1, 2, 64, 70, 4),
    (2, 1, 1, 40, 19, 2),
    (5, 3, 2, 37, 33, 5),
    (2, 5, 1, 128, 130, 3),
    (4, 1, 3, 80, 200, 4),
    (1, 17, 2, 20, 65, 1),
]
Case = dict[str, object]


def caches(
    rows: int, heads: int, capacity: int, size: int, dtype: torch.dtype, channels: bool = False
) -> Case:
    """Caches [S, H, C, D] of a type, and scales if that is int8."""
    k, v = torch.randn(2, rows, heads, capacity, size)
    if dtype != torch.int8:
        return {"k_cache": k.to(dtype), "v_cache": v.to(dtype)}
    case: Case = {}
    for name, x in (("k", k), ("v", v)):
        dim = 2 if channels else 3
        scales = (x.abs().amax(dim, keepdim=True) / 127).clamp_min(1e-6)
        case[f"{name}_cache"] = (x / scales).round().to(torch.int8)
        case[f"{name}_scales"] = scales
    return case


def table(rows: int, cache_rows: int, capacity: int) -> torch.Tensor:
    """Past positions anywhere, and new ones in a cache row of each row's own."""
    slots = torch.randint(0, cache_rows, (rows, capacity), dtype=torch.int32)
    return slots


def case_of(
    shape: tuple[int, ...], dtype: torch.dtype, cache_dtype: torch.dtype, append: bool, slots: str
) -> Case:
    """Operands of a step: lengths differ, positions that nobody sees hold NaN."""
    rows, tokens, heads, size, capacity, cache_rows = shape
    cache_rows = max(cache_rows, rows) if append else cache_rows
    added = tokens if append else 0
    assert added <= capacity
    lengths = torch.randint(0, capacity - added + 1, (rows,), dtype=torch.int32)
    lengths[0] = capacity - added
    q, k, v = (torch.randn(rows, tokens, heads, size).to(dtype) for _ in range(3))
    case = caches(cache_rows, heads, capacity, size, cache_dtype, channels=not append)
    if cache_dtype == torch.int8 and not append and slots == "table":
        case = caches(cache_rows, heads, capacity, size, cache_dtype)
    case |= {"q": q, "k": k if append else None, "v": v if append else None, "lengths": lengths}
    case["scale"] = size**-0.5
    if slots == "none":
        assert rows <= cache_rows
        return case
    own = torch.randperm(cache_rows).to(torch.int32)
    if slots == "row":
        case["slots"] = own[:rows] if append else torch.randint(0, cache_rows, (rows,)).int()
        return case
    where = torch.randint(0, cache_rows, (rows, capacity), dtype=torch.int32)
    for row in range(rows):  # new tokens in a cache row of each row's own
        end = int(lengths[row]) + added
        where[row, int(lengths[row]) : end] = own[row]
        where[row, end:] = -7  # which nobody looks at
    case["slots"] = where
    return case


def spoil(case: Case) -> None:
    """NaN at positions that no row sees."""
    k_cache, v_cache, lengths = case["k_cache"], case["v_cache"], case["lengths"]
    assert isinstance(k_cache, torch.Tensor) and isinstance(v_cache, torch.Tensor)
    assert isinstance(lengths, torch.Tensor)
    if k_cache.dtype == torch.int8:
        return
    q, k = case["q"], case["k"]
    added = q.shape[1] if k is not None else 0  # type: ignore[union-attr]
    seen = int(lengths.max()) + added
    k_cache[:, :, seen:] = v_cache[:, :, seen:] = float("nan")


def clone(case: Case) -> Case:
    return {n: t.clone() if isinstance(t, torch.Tensor) else t for n, t in case.items()}


def check(emulated: EmulatedKv, case: Case, heads: list[int] | None = None, what: str = "") -> None:
    """Result, weights and what was written, against the reference."""
    q = case["q"]
    assert isinstance(q, torch.Tensor)
    ours, exactly, plainly = clone(case), clone(case), clone(case)
    got, weights = emulated.step(**ours, heads=heads)
    exact, exact_weights = reference.kv_attention_step(**exactly, heads=heads)
    plain, _ = reference.kv_attention_step(**plainly, heads=heads, compute_dtype=q.dtype)
    assert_close(got, exact, plain, what=f"kv {what} {emulated.plan}")
    for name in ("k_cache", "v_cache", "k_scales", "v_scales"):
        if case.get(name) is not None:
            same = torch.equal(torch.nan_to_num(ours[name]), torch.nan_to_num(exactly[name]))
            assert same, f"kv {what}: {name} differs"
    if heads is not None:
        assert_close(weights, exact_weights, extra=1e-4, what=f"kv weights {what}")


def combinations(dtype: torch.dtype) -> list[tuple[torch.dtype, bool, str]]:
    cached = [dtype, torch.int8, *(DTYPES[1:] if dtype == torch.float32 else [])]
    return list(itertools.product(cached, (True, False), ("none", "row", "table")))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_steps(dtype: torch.dtype) -> None:
    """Every type of cache, with and without append, every kind of slots; shapes in turn."""
    shapes, orders = itertools.cycle(SHAPES[1:]), itertools.cycle(ORDERS)
    for cached, append, slots in combinations(dtype):
        case = case_of(next(shapes), dtype, cached, append, slots)
        spoil(case)
        emulated = EmulatedKv(*next(orders))
        check(emulated, case, what=f"{cached} append={append} slots={slots}")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_all_steps(dtype: torch.dtype) -> None:
    orders = itertools.cycle(ORDERS)
    for shape in SHAPES:
        for cached, append, slots in combinations(dtype):
            for wishes in ({}, {"split_positions": 128, "apart": True}):
                case = case_of(shape, dtype, cached, append, slots)
                spoil(case)
                emulated = EmulatedKv(*next(orders), **wishes)
                heads = [shape[2] - 1, 0] if append else None
                check(emulated, case, heads, f"{shape} {cached} append={append} slots={slots}")
