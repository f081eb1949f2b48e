"""``kv_attention_step`` over the blocked caches of ``kv_pack``, every implementation."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from attention_steps import FLOATS, Step, check, int32, make_blocked_step, make_step
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_kernels as lk
from lora_kernels import ops, reference

OP = torch.ops.lora_kernels.kv_attention_step.default

# ---------- Against the specification


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("tokens", [1, 3])
def test_cross_attention(implementation, dtype, tokens):
    check(make_blocked_step(dtype=dtype, tokens=tokens, chosen=[1, 0]))


@pytest.mark.parametrize("head_size", [1, 3, 7, 16, 48, 64, 65, 80, 128, 131])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_head_sizes(implementation, head_size, rows):
    slots = torch.zeros(rows, dtype=torch.int32)
    check(make_blocked_step(rows=rows, heads=1, head_size=head_size, slots=slots))


@pytest.mark.parametrize("positions", [1, 2, 15, 16, 17, 63, 64, 65, 130, 1500])
def test_positions(implementation, positions):
    """Every length that ends a vector, a step or a block, and those beside it."""
    lengths = int32(positions, positions // 2, 1, 0, positions - 1)
    slots = int32(0, 0, 1, 1, 0)
    check(
        make_blocked_step(
            rows=5, cache_rows=2, positions=positions, lengths=lengths, slots=slots, chosen=[0]
        )
    )


@pytest.mark.parametrize("beams", [2, 3, 4, 5, 6, 13])
def test_beams_share_their_utterance(implementation, beams):
    check(
        make_blocked_step(
            rows=2 * beams,
            cache_rows=3,
            tokens=3 if beams == 3 else 1,
            positions=141,
            slots=torch.arange(2, dtype=torch.int32).repeat_interleave(beams).flip(0),
            lengths=int32(141, 12).repeat_interleave(beams),
            chosen=[0],
        )
    )


@pytest.mark.parametrize("positions", [5, 130])
def test_many_queries_are_rounded_to_eight_bits(implementation, positions):
    """From 64 tokens on: what the specification gives for q rounded as K is."""
    step = make_blocked_step(rows=2, heads=2, tokens=70, positions=positions, head_size=24)
    scales = step.k_scales.transpose(1, 2)  # [rows, 1, heads, channels], part of q for the products
    unit = (step.q * scales).abs().amax(-1, keepdim=True) / 127
    rounded = (step.q * scales / unit).round() * unit / scales
    assert (rounded - step.q).abs().max() > 1e-3, "otherwise this would prove nothing"
    coarse = dataclasses.replace(step, q=rounded)
    check(coarse)
    torch.testing.assert_close(step.run()[0], coarse.run()[0], rtol=0, atol=1e-4)
    few = dataclasses.replace(step, q=step.q[:, :63].contiguous())
    check(few)  # one less than many: 14 bits


@pytest.mark.parametrize(("head_size", "positions"), [(64, 5), (64, 1100), (128, 130)])
def test_many_queries_of_whole_tiles(implementation, head_size, positions):
    """Sizes that tiles take: two times 32 queries and 6, any number of positions, or none."""
    step = make_blocked_step(
        tokens=70,
        positions=positions,
        head_size=head_size,
        lengths=int32(positions, 0, positions // 2 + 1),
        slots=int32(2, 1, 0),
        chosen=[1],
    )
    step.q[0, 4] = 0
    scales = step.k_scales[step.slots.long()].transpose(1, 2)
    unit = (step.q * scales).abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
    check(dataclasses.replace(step, q=(step.q * scales / unit).round() * unit / scales))
    if implementation == "amx":  # the same sums, and everything else by the same operations
        results = step.run()
        with lk.force_implementation("avx512"):
            for got, want in zip(results, step.run(), strict=True):
                assert torch.equal(got, want)


def test_large(implementation):
    """Split over tasks."""
    check(make_blocked_step(heads=5, positions=700, lengths=int32(700, 699, 1)))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_sizes(data):
    draw = data.draw
    rows, cache_rows, heads = (draw(st.integers(1, 7)) for _ in range(3))
    slots = torch.tensor(
        draw(st.lists(st.integers(0, cache_rows - 1), min_size=rows, max_size=rows)),
        dtype=torch.int32,
    )
    check(
        make_blocked_step(
            rows=rows,
            tokens=draw(st.integers(1, 4)),
            heads=heads,
            head_size=draw(st.integers(1, 70)),
            cache_rows=cache_rows,
            positions=draw(st.integers(1, 140)),
            dtype=draw(st.sampled_from(FLOATS)),
            slots=slots,
            chosen=draw(st.sampled_from([None, [0], [heads - 1, 0]])),
            seed=draw(st.integers(0, 1000)),
        )
    )


# ---------- Exact integers


def integers(low: int, high: int, *shape: int) -> torch.Tensor:
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(2)).float()


@pytest.mark.parametrize("head_size", [7, 64, 80])
def test_sums_of_values_are_exact(implementation, head_size):
    """Equal scores over 2**k positions: the result is an integer sum over a power of two."""
    v = integers(-127, 127, 1, 256, head_size)
    v[:, 0] = 127  # the scale is 1
    q = torch.zeros(5, 1, 1, head_size)
    out, _ = ops.kv_attention_step(
        q,
        None,
        None,
        *(packed := ops.kv_pack(torch.zeros_like(v), v, 1))[:2],
        lengths=int32(256, 128, 64, 2, 1),
        k_scales=packed[2],
        v_scales=packed[3],
        slots=int32(0, 0, 0, 0, 0),
    )
    for row, length in enumerate((256, 128, 64, 2, 1)):
        want = v[0, :length].sum(0) / length
        torch.testing.assert_close(out[row, 0, 0], want, rtol=2e-7, atol=0)


@pytest.mark.parametrize("head_size", [7, 64, 80])
def test_sums_of_scores_are_exact(implementation, head_size):
    """q of integers up to 127 * 128 is kept as it is, and differences of scores are recovered."""
    k = integers(-127, 127, 1, 100, head_size)
    k[:, 0], k[:, :, 0] = 127, 0  # scales of 1 and, for the largest element of q, 0
    q = integers(-300, 300, 3, 1, 1, head_size)
    q[..., 0] = 127 * 128
    sums = torch.einsum("rd,pd->rp", q[:, 0, 0].double(), k[0].double())
    scale = 16 / float((sums.amax(1) - sums.amin(1)).max())
    packed_k, packed_v, k_scales, v_scales = ops.kv_pack(k, k, 1)
    k_scales[..., 0] = 1
    _, weights = ops.kv_attention_step(
        *(q, None, None, packed_k, packed_v, int32(100, 100, 100)),
        k_scales=k_scales,
        v_scales=v_scales,
        slots=int32(0, 0, 0),
        scale=scale,
        heads=[0],
    )
    logs = weights[:, 0, 0, :100].double().log() / scale
    got = logs - logs.amax(1, keepdim=True)
    want = sums - sums.amax(1, keepdim=True)
    assert (got - want).abs().max() < 0.5


# ---------- Properties


def test_a_batch_equals_each_row_alone(implementation):
    step = make_blocked_step(
        rows=9,
        cache_rows=3,
        positions=70,
        slots=int32(2, 0, 2, 2, 1, 0, 2, 2, 2),
        lengths=int32(70, 3, 65, 0, 7, 9, 64, 1, 17),
    )
    out, _ = step.run()
    for row in range(9):
        alone = dataclasses.replace(
            step, q=step.q[[row]], slots=step.slots[[row]], lengths=step.lengths[[row]]
        )
        assert torch.equal(alone.run()[0][0], out[row])


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_do_not_change_bits(implementation, threads):
    step = make_blocked_step(rows=7, heads=3, tokens=2, positions=300)
    before = torch.get_num_threads()
    want, _ = step.run()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(step.run()[0], want)
    finally:
        torch.set_num_threads(before)


def test_extreme_scores(implementation):
    """The largest score is subtracted: no overflow, and far smaller ones vanish."""
    step = make_blocked_step(lengths=int32(21, 21, 21), chosen=[0, 1])
    step.scale = 300.0
    out, weights = step.run()
    want, want_weights = step.run(reference.kv_attention_step)
    assert torch.equal(weights.argmax(-1), want_weights.argmax(-1))
    torch.testing.assert_close(weights.amax(-1), torch.ones(3, 2, 1))
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)


def test_zero_scale_and_zero_q(implementation):
    step = make_blocked_step(chosen=[1])
    step.scale = 0.0
    check(step)
    step.scale, step.q = 1.0, step.q * 0
    check(step)


def test_misaligned_caches(implementation):
    step = make_blocked_step()
    for name in ("k_cache", "v_cache"):
        cache = getattr(step, name)
        memory = torch.empty(cache.numel() + 1, dtype=torch.int8)
        memory[1:] = cache.reshape(-1)
        setattr(step, name, memory[1:].view(cache.shape))
    check(step)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_values_do_not_spread(implementation, bad):
    """A bad q, K or V makes NaN of its own row or utterance, head (and channel of V) alone."""
    g = torch.Generator().manual_seed(4)
    k, v = torch.randn(2, 2, 21, 3 * 64, generator=g)
    q = torch.randn(5, 2, 3, 64, generator=g)
    lengths, slots = int32(21, 9, 0, 3, 5), int32(0, 1, 0, 0, 1)

    def attend(q, k, v):
        k_cache, v_cache, k_scales, v_scales = ops.kv_pack(k, v, 3)
        return ops.kv_attention_step(
            *(q, None, None, k_cache, v_cache, lengths),
            k_scales=k_scales,
            v_scales=v_scales,
            slots=slots,
        )[0]

    want = attend(q, k, v)
    q[0, 1, 2, 5], k[1, 20, 70], v[0, 2, 3] = bad, bad, bad
    out = attend(q, k, v)
    touched = torch.zeros(5, 2, 3, 64, dtype=torch.bool)
    touched[0, 1, 2] = True
    touched[[1, 4], :, 1] = True
    touched[[0, 3], :, 0, 3] = True  # row 2 has no positions
    assert out[touched].isnan().all()
    assert torch.equal(out[~touched], want[~touched])


@pytest.mark.parametrize("shape", [{"rows": 0}, {"tokens": 0}, {"heads": 0}])
def test_nothing_to_do(shape):
    heads = shape.get("heads", 2)
    step = make_blocked_step(**{"rows": 2, "positions": 5, **shape, "heads": max(heads, 1)})
    if heads == 0:
        step.q = step.q[:, :, :0]
        for name in ("k_cache", "v_cache", "k_scales", "v_scales"):
            setattr(step, name, getattr(step, name)[:, :0].contiguous())
    step.heads = []
    out, weights = step.run()
    assert out.shape == step.q.shape
    assert weights.shape == (step.q.shape[0], 0, step.q.shape[1], 8)


# ---------- What is refused


def changed(**arguments) -> Step:
    return dataclasses.replace(make_blocked_step(lengths=int32(3, 0, 20)), **arguments)


NEW = torch.zeros(3, 1, 2, 64)
BAD = {
    "append": (lambda: changed(k=NEW, v=NEW), ["k, v:", "None with blocked caches"]),
    "no scales": (
        lambda: changed(k_scales=None, v_scales=None),
        ["k_scales, v_scales", "[3, 2, 1, 64]"],
    ),
    "scales per position": (
        lambda: changed(k_scales=torch.ones(3, 2, 24, 1), v_scales=torch.ones(3, 2, 24, 1)),
        ["k_scales, v_scales", "per channel", "[3, 2, 1, 64]"],
    ),
    "keys of floats": (
        lambda: changed(k_cache=torch.zeros(3, 2, 1, 16, 64, 4)),
        ["v_cache", "int8"],
    ),
    "keys of another head size": (
        lambda: changed(k_cache=torch.zeros(3, 2, 1, 17, 64, 4, dtype=torch.int8)),
        ["k_cache", "[3, 2, 1, 16, 64, 4]", "[3, 2, 1, 17, 64, 4]"],
    ),
    "values of more positions": (
        lambda: changed(v_cache=torch.zeros(3, 2, 17, 64, 4, dtype=torch.int8)),
        ["v_cache", "[3, 2, 1, 16, 64, 4]", "[3, 2, 17, 64, 4]"],
    ),
    "values in rows": (
        lambda: changed(v_cache=torch.zeros(3, 2, 21, 64, dtype=torch.int8)),
        ["v_cache", "kv_pack", "[3, 2, 21, 64]"],
    ),
    "keys with strides": (
        lambda: changed(k_cache=make_blocked_step().k_cache.mT.contiguous().mT),
        ["k_cache", "contiguous"],
    ),
    "a table of positions": (
        lambda: changed(slots=torch.zeros(3, 24, dtype=torch.int32)),
        ["slots", "[3]", "per channel"],
    ),
    "length beyond the cache": (
        lambda: changed(lengths=int32(3, 0, 25)),
        ["lengths: entry 2 is 25", "24 positions"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    make, words = BAD[case]
    with pytest.raises((RuntimeError, ValueError)) as error:
        make().run()
    for word in ("kv_attention_step: ", *words):
        assert word in str(error.value)


# ---------- torch's own checks


def test_opcheck():
    s = make_blocked_step(slots=int32(0, 0, 1), chosen=[1])
    torch.library.opcheck(
        OP,
        (
            *(s.q, None, None, s.k_cache, s.v_cache, s.k_scales, s.v_scales),
            *(s.lengths, s.slots, s.scale, s.heads),
        ),
    )


def test_compile():
    """Packing and attention in one graph."""
    plain = make_step(append=False)

    def attend(q, k, v):
        k_cache, v_cache, k_scales, v_scales = ops.kv_pack(k, v, 2)
        return ops.kv_attention_step(
            *(q * 1.0, None, None, k_cache, v_cache, plain.lengths),
            k_scales=k_scales,
            v_scales=v_scales,
            heads=[1],
        )

    operands = (plain.q, *torch.randn(2, 3, 21, 128))
    got = torch.compile(attend, fullgraph=True, backend="aot_eager")(*operands)
    torch.testing.assert_close(got, attend(*operands), rtol=0, atol=0)
