"""The ragged bank."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_kernels as lk
from lora_kernels.adapters.bank import by_rank

RANKS = st.lists(st.one_of(st.none(), st.integers(1, 6)), min_size=1, max_size=6)


def _layer(rank, k, n, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, k, generator=generator).to(dtype)
    b = torch.randn(n, rank, generator=generator).to(dtype)
    return lk.AdapterLayer(a, b, float(torch.rand(1, generator=generator)))


def _equal(left, right):
    if left is None or right is None:
        return left is right
    same = torch.equal(left.lora_a, right.lora_a) and torch.equal(left.lora_b, right.lora_b)
    return same and left.scale == right.scale


@given(RANKS, st.integers(1, 9), st.integers(1, 9), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_unpack_undoes_pack(ranks, k, n, seed):
    layers = [None if r is None else _layer(r, k, n, seed + i) for i, r in enumerate(ranks)]
    bank = lk.AdapterBank.pack(layers, k, n)
    total = sum(r or 0 for r in ranks)
    assert bank.lora_a.shape == (total, k)
    assert bank.lora_b.shape == (total, n)
    assert bank.offsets.dtype == torch.int32
    assert bank.offsets.numel() == len(ranks) + 1
    assert bank.scales.dtype == torch.float32
    assert bank.count == len(ranks)
    assert all(map(_equal, layers, bank.unpack()))
    again = lk.AdapterBank.pack(bank.unpack(), k, n)
    assert torch.equal(again.lora_a, bank.lora_a)
    assert torch.equal(again.lora_b, bank.lora_b)


@given(RANKS, st.integers(1, 9), st.integers(1, 200), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_blocks_hold_the_same(ranks, k, n, seed):
    layers = [None if r is None else _layer(r, k, n, seed + i) for i, r in enumerate(ranks)]
    plain = lk.AdapterBank.pack(layers, k, n)
    bank = lk.AdapterBank.pack(layers, k, n, blocked=True)
    total = sum(r or 0 for r in ranks)
    assert bank.lora_b.shape == (-(-n // 64), total, 64)
    assert torch.equal(by_rank(bank.lora_b, n), plain.lora_b)
    assert all(map(_equal, layers, bank.unpack()))


@given(RANKS, RANKS, st.integers(1, 9), st.integers(1, 200), st.booleans(), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_appending_is_packing_and_changes_no_bank_before(first, more, k, n, blocked, seed):
    ranks = first + more
    layers = [None if r is None else _layer(r, k, n, seed + i) for i, r in enumerate(ranks)]
    kwargs = {"dtype": torch.float32, "blocked": blocked}
    bank = lk.AdapterBank.pack(layers[: len(first)], k, n, **kwargs)
    banks = [bank]
    for layer in layers[len(first) :]:
        banks.append(banks[-1].append(layer))
    # A second branch from the first bank must not write where the first branch has written.
    other = banks[0].append(_layer(4, k, n, seed + 50))
    assert other.total_rank == bank.total_rank + 4
    for i, grown in enumerate(banks):
        packed = lk.AdapterBank.pack(layers[: len(first) + i], k, n, **kwargs)
        assert grown.ranks == packed.ranks
        assert grown.max_rank == packed.max_rank == max(grown.ranks, default=0)
        for name in ("lora_a", "lora_b", "offsets", "scales"):
            assert torch.equal(getattr(grown, name), getattr(packed, name)), name


def test_many_adapters_are_moved_a_few_times_each():
    bank = lk.AdapterBank.pack([], 32, 64, dtype=torch.bfloat16, blocked=True)
    moves, memory = 0, bank.lora_a.untyped_storage().data_ptr()
    for i in range(200):
        bank = bank.append(_layer(4, 32, 64, i))
        moves += memory != (memory := bank.lora_a.untyped_storage().data_ptr())
    assert moves < 20
    assert bank.lora_a.untyped_storage().nbytes() <= 1.5 * bank.lora_a.nbytes


def test_dtypes_promote_without_loss():
    half, brain = _layer(2, 4, 3, 0, torch.float16), _layer(3, 4, 3, 1, torch.bfloat16)
    assert lk.AdapterBank.pack([half, None], 4, 3).lora_a.dtype == torch.float16
    both = lk.AdapterBank.pack([half, brain], 4, 3)
    assert both.lora_a.dtype == torch.float32
    assert torch.equal(both.lora_a[:2].half(), half.lora_a)


def test_wrong_sizes_are_refused():
    with pytest.raises(lk.AdapterError, match=r"expected lora_A \[r, 5\]"):
        lk.AdapterBank.pack([_layer(2, 4, 3, 0)], 5, 3)
    with pytest.raises(lk.AdapterError, match="at least one module"):
        lk.Adapter({})
    bad = lk.AdapterLayer(torch.randn(2, 4), torch.randn(3, 1), 1.0)
    with pytest.raises(lk.AdapterError, match="one rank"):
        lk.Adapter({"m": bad})
    with pytest.raises(lk.AdapterError, match="finite scale"):
        lk.Adapter({"m": lk.AdapterLayer(torch.randn(2, 4), torch.randn(3, 2), float("nan"))})
