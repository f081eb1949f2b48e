"""KVCache and KVCacheAttention against attention in one pass."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lora_kernels as lk

HEADS, SIZE = 3, 8
WIDTH = HEADS * SIZE
TOLERANCE = {"atol": 1e-5, "rtol": 1e-4}


def _attention(seed=0, max_positions=None):
    torch.manual_seed(seed)
    projections = [nn.Linear(WIDTH, WIDTH) for _ in range(4)]
    return lk.KVCacheAttention(*projections, HEADS, max_positions=max_positions).eval()


def _whole(attention, x, states=None):
    """Attention in one pass, causal over x or over all of ``states``."""
    source = x if states is None else states

    def split(t):
        return t.reshape(*t.shape[:2], HEADS, SIZE).transpose(1, 2)

    q, k, v = attention.q_proj(x), attention.k_proj(source), attention.v_proj(source)
    out = F.scaled_dot_product_attention(
        split(q), split(k), split(v), is_causal=states is None, scale=attention.scale
    )
    return attention.out_proj(out.transpose(1, 2).flatten(2))


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_chunked_steps_equal_one_pass(chunks, rows):
    attention = _attention()
    x = torch.randn(rows, sum(chunks), WIDTH)
    cache = attention.new_cache(rows, capacity=2)
    with torch.no_grad():
        parts = [attention(part, cache)[0] for part in x.split(chunks, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), _whole(attention, x), **TOLERANCE)
    assert cache.length == sum(chunks) <= cache.capacity
    assert cache.lengths.tolist() == [sum(chunks)] * rows


@given(st.lists(st.lists(st.integers(0, 3), min_size=4, max_size=4), min_size=1, max_size=6))
@settings(max_examples=25, deadline=None)
def test_reordering_by_index_equals_moving_the_history(orders):
    attention = _attention()
    rows = 4
    cache = attention.new_cache(rows, capacity=2)
    history = torch.randn(rows, 2, WIDTH)
    with torch.no_grad():
        attention(history, cache)
        keys_before = cache.keys.data_ptr()
        for order in orders:
            index = torch.tensor(order)
            cache.reorder(index)
            new = torch.randn(rows, 1, WIDTH)
            history = torch.cat((history[index], new), dim=1)
            out, _ = attention(new, cache)
            torch.testing.assert_close(out, _whole(attention, history)[:, -1:], **TOLERANCE)
        keys, _ = cache.gather()
        expected = attention.k_proj(history).reshape(rows, -1, HEADS, SIZE).transpose(1, 2)
        torch.testing.assert_close(keys, expected, **TOLERANCE)
    assert cache.capacity > 2 or keys_before == cache.keys.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_cross_attention_shares_the_utterance_between_beams(dtype):
    attention = _attention()
    states = torch.randn(2, 11, WIDTH)
    x = torch.randn(6, 1, WIDTH)
    with torch.no_grad():
        cache = attention.cross_cache(states, beams=3, dtype=dtype)
        assert cache.rows == 6
        assert cache.keys.shape[0] == 2
        out, weights = attention(x, cache, heads=[1])
        expected = _whole(attention, x, states.repeat_interleave(3, dim=0))
        tolerance = TOLERANCE if dtype == torch.float32 else {"atol": 0.03, "rtol": 0}
        torch.testing.assert_close(out, expected, **tolerance)
        assert weights.shape == (6, 1, 1, 11)
        order = torch.tensor([2, 1, 0, 3, 3, 5])
        cache.reorder(order)
        again, _ = attention(x, cache)
    torch.testing.assert_close(again, out, **TOLERANCE)


def test_equal_rows_of_a_fixed_cache_are_kept_once():
    attention = _attention()
    states = torch.randn(2, 11, WIDTH).repeat_interleave(3, dim=0)
    states[4, 5] += 1  # differs in the middle, so only rows 0-2 are equal; 3 and 5 are apart
    x = torch.randn(6, 1, WIDTH)
    with torch.no_grad():
        cache = attention.cross_cache(states)
        expected, _ = attention(x, cache)
        keys, values = cache.gather()
        cache.share_equal_rows()
        assert cache.keys.shape[0] == 4
        assert cache.slots.tolist() == [0, 0, 0, 1, 2, 3]
        assert all(map(torch.equal, cache.gather(), (keys, values)))
        torch.testing.assert_close(attention(x, cache)[0], expected, **TOLERANCE)
        cache.reorder(torch.tensor([2, 1, 0, 4, 3, 5]))
        assert cache.slots.tolist() == [0, 0, 0, 2, 1, 3]


def test_int8_self_attention_stays_close():
    attention = _attention()
    x = torch.randn(2, 9, WIDTH)
    cache = attention.new_cache(2, capacity=2, dtype=torch.int8)
    with torch.no_grad():
        parts = [attention(part, cache)[0] for part in x.split(1, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), _whole(attention, x), atol=0.03, rtol=0)
    keys, values = cache.gather()
    assert keys.dtype == torch.float32
    assert keys.shape == values.shape == (2, HEADS, 9, SIZE)


def test_crop_select_and_repeat():
    attention = _attention()
    x = torch.randn(2, 6, WIDTH)
    with torch.no_grad():
        cache = attention.new_cache(2)
        attention(x, cache)
        cache.reorder(torch.tensor([1, 0]))
        cache.crop(4)
        flipped = x.flip(0)[:, :4]
        new = torch.randn(2, 1, WIDTH)
        history = torch.cat((flipped, new), dim=1)
        out, _ = attention(new, cache)
        torch.testing.assert_close(out, _whole(attention, history)[:, -1:], **TOLERANCE)
        cache.repeat_interleave(3)
        assert cache.rows == 6
        cache.select(torch.tensor([5, 0]))
        new = torch.randn(2, 1, WIDTH)
        history = torch.cat((history.flip(0), new), dim=1)
        out, _ = attention(new, cache)
        torch.testing.assert_close(out, _whole(attention, history)[:, -1:], **TOLERANCE)


def test_the_model_s_last_position_is_an_error():
    attention = _attention(max_positions=5)
    cache = attention.new_cache(1, capacity=2)
    with torch.no_grad():
        attention(torch.randn(1, 5, WIDTH), cache)
        with pytest.raises(lk.LoraKernelsError, match="at most 5 positions"):
            attention(torch.randn(1, 1, WIDTH), cache)
    fixed = lk.KVCache.from_states(*torch.randn(2, 1, HEADS, 4, SIZE), fixed=True)
    step = torch.randn(1, 1, HEADS, SIZE)
    with pytest.raises(lk.LoraKernelsError, match="fixed"):
        fixed.step(step, step, step)


def test_heads_that_do_not_divide_the_width():
    with pytest.raises(lk.LoraKernelsError, match="heads: expected a divisor"):
        lk.KVCacheAttention(*(nn.Linear(10, 10) for _ in range(4)), 3)


@pytest.mark.parametrize("positions", [1, 63, 150])
def test_a_packed_cache_steps_reorders_and_gives_back_what_it_holds(positions: int) -> None:
    heads, size = 3, 10
    keys, values = (torch.randn(2, heads, positions, size) for _ in range(2))
    plain = lk.KVCache.from_states(keys, values, fixed=True)
    packed = lk.KVCache.from_states(keys, values, fixed=True)
    packed.pack()
    assert packed.keys.dtype == torch.int8
    for got, exact in zip(packed.gather(), (keys, values), strict=True):
        step = exact.abs().amax(2, keepdim=True) / 127
        assert bool(((got - exact).abs() <= 0.5001 * step).all())
    for cache in (plain, packed):
        cache.repeat_interleave(2)
        cache.reorder(torch.tensor([3, 0, 0, 2]))
        cache.select(torch.tensor([0, 1, 3]))
    assert packed.rows == 3
    q = torch.randn(3, 1, heads, size)
    exact = plain.step(q, scale=0.3)[0]
    got = packed.step(q, scale=0.3)[0]
    assert float((got - exact).norm() / exact.norm()) < 0.02
    for got, exact in zip(packed.gather(), plain.gather(), strict=True):
        torch.testing.assert_close(got, exact, atol=0.02, rtol=0)
    packed.crop(0)
    packed.append(values, keys)  # the next utterances, after a reset
    assert packed.keys.dtype == torch.int8
    torch.testing.assert_close(packed.gather()[0], values, atol=0.02, rtol=0)


def test_packing_is_refused_where_it_cannot_be() -> None:
    with pytest.raises(lk.LoraKernelsError, match=r"cache: expected a fixed one .* a growing one"):
        lk.KVCache(1, 2, 4).pack()
    states = torch.randn(1, 2, 3, 4)
    cache = lk.KVCache.from_states(states, states, fixed=True, dtype=torch.int8)
    with pytest.raises(lk.LoraKernelsError, match="got one in int8"):
        cache.pack()
