"""``kv_attention_step`` of every implementation against the executable specification."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from attention_steps import FLOATS, check, int32, make_step
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_kernels import ops

# ---------- Against the specification


@pytest.mark.parametrize("cache_dtype", [*FLOATS, torch.int8])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("tokens", [1, 5])
def test_self_attention(implementation, dtype, cache_dtype, tokens):
    check(make_step(dtype=dtype, cache_dtype=cache_dtype, tokens=tokens, chosen=[1]))


@pytest.mark.parametrize("cache_dtype", [*FLOATS, torch.int8])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("tokens", [1, 3])
def test_cross_attention(implementation, dtype, cache_dtype, tokens):
    check(
        make_step(dtype=dtype, cache_dtype=cache_dtype, tokens=tokens, append=False, chosen=[1, 0])
    )


@pytest.mark.parametrize("head_size", [1, 7, 16, 48, 64, 80, 96, 128, 131])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_head_sizes(implementation, head_size, rows):
    """Every width of the panels of columns, for one query, two and several."""
    slots = torch.zeros(rows, dtype=torch.int32)
    for cache_dtype in (torch.float32, torch.bfloat16, torch.int8):
        check(
            make_step(
                rows=rows,
                heads=1,
                head_size=head_size,
                cache_dtype=cache_dtype,
                append=False,
                slots=slots,
            )
        )


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("beams", [2, 3, 4, 5, 6, 13])
def test_beams_share_cross_attention(implementation, cache_dtype, beams):
    tokens = 3 if beams == 3 else 1
    utterances = 2
    slots = torch.arange(utterances, dtype=torch.int32).repeat_interleave(beams).flip(0)
    lengths = int32(37, 12).repeat_interleave(beams)
    check(
        make_step(
            rows=utterances * beams,
            cache_rows=utterances + 1,
            tokens=tokens,
            capacity=37,
            cache_dtype=cache_dtype,
            append=False,
            slots=slots,
            lengths=lengths,
            chosen=[0],
        )
    )


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("tokens", [1, 4])
def test_slots_per_row(implementation, cache_dtype, tokens):
    check(make_step(cache_rows=5, tokens=tokens, cache_dtype=cache_dtype, slots=int32(4, 0, 2)))


@pytest.mark.parametrize("cache_dtype", [*FLOATS, torch.int8])
@pytest.mark.parametrize("append", [True, False])
@pytest.mark.parametrize("tokens", [1, 4])
def test_slots_per_position(implementation, cache_dtype, append, tokens):
    check(
        make_step(
            rows=5,
            tokens=tokens,
            cache_dtype=cache_dtype,
            append=append,
            slots="per position",
            chosen=[0, 1],
        )
    )


@pytest.mark.parametrize("head_size", [7, 64])
@pytest.mark.parametrize("beams", [1, 5])
def test_scales_per_channel(implementation, head_size, beams):
    check(
        make_step(
            rows=2 * beams,
            cache_rows=2,
            head_size=head_size,
            cache_dtype=torch.int8,
            per_channel=True,
            append=False,
            slots=torch.arange(2, dtype=torch.int32).repeat_interleave(beams),
            lengths=int32(21, 17).repeat_interleave(beams),
            chosen=[1],
        )
    )


@pytest.mark.parametrize(("dtype", "append"), [(torch.float32, False), (torch.bfloat16, True)])
def test_large(implementation, dtype, append):
    """Long enough to be split over tasks and to leave the first caches."""
    for rows in (1, 3):
        check(
            make_step(
                rows=rows,
                heads=3,
                capacity=700,
                dtype=dtype,
                append=append,
                lengths=torch.full((rows,), 699, dtype=torch.int32),
            )
        )


# ---------- Edges


def test_a_row_without_positions_gives_zero(implementation):
    step = make_step(append=False, lengths=int32(0, 21, 0), chosen=[0])
    check(step)
    out, weights = step.run()
    assert not out[0].any()
    assert not out[2].any()
    assert not weights[0].any()


def test_capacity_of_one(implementation):
    step = make_step(capacity=1, lengths=int32(0, 0, 0))
    check(step)
    torch.testing.assert_close(step.run()[0], step.v)


@pytest.mark.parametrize("shape", [{"rows": 0}, {"tokens": 0}, {"heads": 0}])
def test_nothing_to_do(shape):
    step = make_step(**{"rows": 2, "capacity": 4, **shape}, chosen=[])
    out, weights = step.run()
    assert out.shape == step.q.shape
    assert weights.shape == (step.q.shape[0], 0, step.q.shape[1], 4)


def test_no_positions_at_all(implementation):
    step = make_step(capacity=0, append=False, chosen=[0])
    out, weights = step.run()
    assert not out.any()
    assert weights.shape == (3, 1, 1, 0)


def test_extreme_scores(implementation):
    """The largest score is subtracted: no overflow, and far smaller ones vanish."""
    step = make_step(append=False, lengths=int32(21, 21, 21), chosen=[0, 1])
    step.scale = 300.0
    check(step)


def test_negative_and_zero_scale(implementation):
    for scale in (0.0, -0.5):
        step = make_step(chosen=[1])
        step.scale = scale
        check(step)


def test_strided_operands(implementation):
    """q, k and v as slices of one projection; lengths and slots with strides."""
    plain = make_step(rows=3, cache_rows=4, tokens=2, slots=int32(3, 0, 1))
    fused = torch.cat((plain.q, plain.k, plain.v), dim=-1)
    strided = plain.clone()
    strided.q, strided.k, strided.v = fused.split(64, dim=-1)
    strided.lengths = torch.stack((plain.lengths, plain.lengths), dim=1)[:, 0]
    strided.slots = torch.stack((plain.slots, plain.slots), dim=1)[:, 0]
    assert not strided.q.is_contiguous()
    assert torch.equal(strided.run()[0], plain.run()[0])
    assert torch.equal(strided.k_cache.nan_to_num(), plain.k_cache.nan_to_num())


def test_misaligned_caches(implementation):
    step = make_step()
    for name in ("k_cache", "v_cache"):
        cache = getattr(step, name)
        memory = torch.empty(cache.numel() + 1)
        memory[1:] = cache.reshape(-1)
        setattr(step, name, memory[1:].view(cache.shape))
    check(step)


def test_one_head_chosen_twice(implementation):
    check(make_step(chosen=[1, 1, 0]))


# ---------- Properties


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_chunked_steps_equal_one_pass(implementation, cache_dtype):
    """Bit for bit, with rows of different lengths."""
    whole = make_step(tokens=9, cache_dtype=cache_dtype, lengths=int32(0, 11, 4), chosen=[0])
    pieces = whole.clone()
    out, weights = whole.run()
    begin = 0
    for size in (1, 5, 2, 1):
        part = slice(begin, begin + size)
        piece = dataclasses.replace(
            pieces,
            q=pieces.q[:, part],
            k=pieces.k[:, part],
            v=pieces.v[:, part],
            lengths=pieces.lengths + begin,
        )
        got, got_weights = piece.run()
        assert torch.equal(got, out[:, part])
        assert torch.equal(got_weights, weights[:, :, part])
        begin += size
    for ours, theirs in zip(pieces.caches(), whole.caches(), strict=True):
        assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())


def test_a_batch_equals_each_row_alone(implementation):
    """Bit for bit, though rows that share a cache row are computed together."""
    step = make_step(
        rows=9,
        cache_rows=3,
        append=False,
        slots=int32(2, 0, 2, 2, 1, 0, 2, 2, 2),
        lengths=int32(21, 3, 20, 0, 7, 9, 21, 1, 17),
    )
    out, _ = step.run()
    for row in range(9):
        alone = dataclasses.replace(
            step, q=step.q[[row]], slots=step.slots[[row]], lengths=step.lengths[[row]]
        )
        assert torch.equal(alone.run()[0][0], out[row])


def test_reordering_the_table_equals_copying_the_cache(implementation):
    """A beam search of six steps, with the cache permuted by index and by copy."""
    g = torch.Generator().manual_seed(3)
    beams, heads, capacity, head_size = 5, 2, 8, 64
    by_index = torch.zeros(2, beams, heads, capacity, head_size)
    by_copy = by_index.clone()
    own = torch.arange(beams, dtype=torch.int32)
    table = own.unsqueeze(1).repeat(1, capacity)
    for length in range(6):
        q, k, v = torch.randn(3, beams, 1, heads, head_size, generator=g)
        lengths = torch.full((beams,), length, dtype=torch.int32)
        indexed, _ = ops.kv_attention_step(q, k, v, *by_index, lengths, slots=table)
        copied, _ = ops.kv_attention_step(q, k, v, *by_copy, lengths)
        assert torch.equal(indexed, copied)
        parents = torch.randint(0, beams, (beams,), generator=g)
        by_copy = by_copy[:, parents].contiguous()
        table[:, : length + 1] = table[parents, : length + 1]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_do_not_change_bits(implementation, threads):
    step = make_step(rows=7, heads=3, tokens=2, capacity=300, cache_dtype=torch.bfloat16)
    before = torch.get_num_threads()
    want, _ = step.clone().run()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(step.run()[0], want)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_non_finite_values_do_not_spread(implementation, cache_dtype, bad):
    """Rows that attend to a non-finite vector get NaN; all others are as if it were not there."""
    clean = make_step(rows=4, tokens=3, cache_dtype=cache_dtype, lengths=int32(5, 0, 18, 7), seed=5)
    dirty = clean.clone()
    dirty.k[0, 1, 0, 7] = bad
    dirty.v[2, 2, 1, 3] = bad
    dirty.q[3, 0, 1, 0] = bad
    want, _ = clean.run()
    out, _ = dirty.run()
    touched = torch.zeros(4, 3, 2, 64, dtype=torch.bool)
    touched[0, 1:, 0] = True
    touched[2, 2, 1] = True
    touched[3, 0, 1] = True
    assert torch.equal(out[~touched], want[~touched])
    if (
        torch.tensor(bad).isnan() or cache_dtype == torch.int8
    ):  # an infinite score may also be the smallest
        assert out[0, 1:, 0].isnan().all()
    assert not out[2, 2, 1].isfinite().all()
    assert not out[3, 0, 1].isfinite().any()


def test_int8_append_of_zero_and_tiny_vectors(implementation):
    step = make_step(cache_dtype=torch.int8, lengths=int32(2, 2, 2))
    step.k[0], step.v[0] = 0, 0
    step.k[1], step.v[1] = 1e-38, -1e-38
    check(step)
    assert step.k_scales[0, :, 2].eq(0).all()
    assert step.k_scales[1, :, 2].eq(0).all()
    assert step.k_cache[1, :, 2].eq(0).all()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_sizes(data):
    """Random sizes, layouts and dtypes with the implementation that is chosen by default."""
    draw = data.draw
    rows, tokens = draw(st.integers(1, 7)), draw(st.integers(1, 4))
    append = draw(st.booleans())
    capacity = draw(st.integers(tokens, 70))
    cache_rows = rows + draw(st.integers(0, 2))
    slots = draw(st.sampled_from([None, "per row", "per position"]))
    if slots == "per row":
        order = draw(st.permutations(range(cache_rows)))
        slots = int32(*order[:rows]) if append else int32(*(i % 2 for i in order[:rows]))
        cache_rows = max(cache_rows, 2)
    heads = draw(st.integers(1, 3))
    check(
        make_step(
            rows=rows,
            tokens=tokens,
            heads=heads,
            head_size=draw(st.sampled_from([1, 3, 8, 17, 32, 64, 65])),
            cache_rows=cache_rows,
            capacity=capacity,
            dtype=draw(st.sampled_from(FLOATS)),
            cache_dtype=draw(st.sampled_from([*FLOATS, torch.int8])),
            append=append,
            slots=slots,
            chosen=draw(st.sampled_from([None, [0], [heads - 1, 0]])),
            seed=draw(st.integers(0, 1000)),
        )
    )
