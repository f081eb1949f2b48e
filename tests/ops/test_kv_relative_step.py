"""``kv_relative_step`` against its specification, and against transformers' Parakeet."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from relative_steps import FLOATS, Chunk, int32, make_chunk
from tolerances import assert_close

from lora_kernels import ops, reference


def check(chunk: Chunk) -> torch.Tensor:
    """One call against the specification in fp64; caches must have its bits."""
    chunk.poison()
    exact, plain = chunk.clone(), chunk.clone()
    want = exact.run(reference.kv_relative_step)
    rough = plain.run(reference.kv_relative_step, dtype=chunk.q.dtype)
    got = chunk.run()
    assert got.dtype == chunk.q.dtype
    assert_close(got, want, rough)
    for ours, theirs in zip(chunk.caches(), exact.caches(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    return got


@pytest.mark.parametrize(
    ("tokens", "head_size"), [(1, 128), (2, 64), (5, 1), (7, 24), (13, 100), (14, 128), (29, 8)]
)
def test_shapes(implementation, tokens, head_size):
    """One tile and several, more queries than a block has, and a rest of every width."""
    check(make_chunk(tokens=tokens, head_size=head_size, left=11, heads=3, rows=2))


@pytest.mark.parametrize("cache_dtype", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_dtypes(implementation, dtype, cache_dtype):
    check(make_chunk(head_size=72, rows=2, dtype=dtype, cache_dtype=cache_dtype))


@pytest.mark.parametrize("left", [0, 1, 70])
def test_left(implementation, left):
    check(make_chunk(left=left, tokens=3))


def test_counts_and_slots(implementation):
    chunk = make_chunk(
        rows=5, tokens=6, counts=int32(6, 0, 3, 1, 5), slots=int32(6, 2, 0, 5, 3), rings=7, extra=2
    )
    got = check(chunk)
    for row, count in enumerate((6, 0, 3, 1, 5)):
        assert not got[row, count:].any()


@pytest.mark.parametrize("extra", [0, 1, 5])
def test_a_stream_wraps_around_its_ring(implementation, extra):
    """Many chunks, some of them short, with frames that have long been overwritten."""
    rows, tokens, left = 2, 4, 5
    ring = make_chunk(
        rows=rows, tokens=tokens, left=left, extra=extra, lengths=int32(0, 2**31 - 90)
    )
    lengths = ring.lengths
    for number, counts in enumerate([(4, 4), (4, 1), (3, 4), (0, 2), (4, 4), (1, 3)] * 3):
        fresh = make_chunk(rows=rows, tokens=tokens, left=left)
        shifted = [x.roll(number, 0) + number / 7 for x in (fresh.q, fresh.k, fresh.v)]
        chunk = dataclasses.replace(ring, lengths=lengths, counts=int32(*counts))
        chunk.q, chunk.k, chunk.v = shifted
        check(chunk)
        lengths = lengths + int32(*counts)
    assert lengths[0] > 3 * (tokens + left)  # it has wrapped around


def test_no_rows_and_no_heads():
    for sizes in ({"rows": 0, "rings": 2}, {"heads": 0}):
        chunk = make_chunk(**sizes)
        assert chunk.run().shape == chunk.q.shape


def test_strides(implementation):
    chunk = make_chunk()
    want = chunk.clone().run()
    for name in ("q", "k", "v"):  # as slices of a fused projection
        wide = torch.full((3, 5, 4, 24), torch.nan)
        wide[:, :, 1:3] = getattr(chunk, name)
        setattr(chunk, name, wide[:, :, 1:3])
    chunk.positions = chunk.positions.transpose(0, 1).contiguous().transpose(0, 1)
    chunk.bias_u = chunk.bias_u.t().contiguous().t()
    chunk.lengths = torch.stack([chunk.lengths, chunk.lengths], 1)[:, 0]
    got = chunk.run()
    assert got.is_contiguous()
    assert torch.equal(got, want)


@pytest.mark.parametrize("where", ["q", "k", "v", "past"])
def test_nan_stays_in_its_row(implementation, where):
    chunk = make_chunk()
    want = chunk.clone().run()
    target = chunk.v_cache[1, :, 0] if where == "past" else getattr(chunk, where)[1, 2]
    target.fill_(torch.nan)
    got = chunk.run()
    assert torch.equal(got[[0, 2]], want[[0, 2]])
    if where == "q":
        assert got[1, 2].isnan().all()
        assert torch.equal(got[1, [0, 1, 3, 4]], want[1, [0, 1, 3, 4]])
    else:
        assert got[1].isnan().all()


def test_large_scores_do_not_overflow(implementation):
    chunk = make_chunk()
    chunk.scale = 1e4
    assert check(chunk).isfinite().all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_bits_do_not_depend_on_batch_or_chance(implementation, dtype):
    chunk = make_chunk(tokens=14, head_size=40, left=20, dtype=dtype)
    together = chunk.clone().run()
    assert torch.equal(together, chunk.clone().run())
    for row in range(3):
        one = slice(row, row + 1)
        alone = chunk.clone()
        for name in ("q", "k", "v", "lengths"):
            setattr(alone, name, getattr(chunk, name)[one])
        alone.slots = int32(row)
        assert torch.equal(alone.run()[0], together[row])


def test_bits_do_not_depend_on_threads(implementation):
    chunk = make_chunk(tokens=14, head_size=128, heads=4, left=70)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = chunk.clone().run()
        torch.set_num_threads(4)
        assert torch.equal(chunk.clone().run(), want)
    finally:
        torch.set_num_threads(threads)


# ---------- A peer that nobody here wrote


@pytest.mark.parametrize("ragged", [False, True])
def test_equals_parakeets_attention_under_a_mask(implementation, ragged):
    """transformers over whole utterances, masked as chunks see them."""
    parakeet = pytest.importorskip("transformers.models.parakeet.modeling_parakeet")
    from transformers import ParakeetEncoderConfig

    chunk, left, frames = 6, 11, 33
    config = ParakeetEncoderConfig(hidden_size=48, num_attention_heads=3, num_hidden_layers=1)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    module = parakeet.ParakeetEncoderAttention(config, 0).eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, frames, 48)
    embed = parakeet.ParakeetEncoderRelPositionalEncoding(config)
    total = [frames, 20] if ragged else [frames, frames]

    at = torch.arange(frames)
    begin = at // chunk * chunk
    seen = (at < begin[:, None] + chunk) & (at >= begin[:, None] - left)
    there = at < torch.tensor(total)[:, None]
    with torch.no_grad():
        mask = (seen & there[:, None])[:, None]
        want, _ = module(x, position_embeddings=embed(x), attention_mask=mask)

        distances = torch.arange(left + chunk - 1, -chunk, -1)
        middle = embed(x.new_zeros(1, left + chunk, 48))[0]  # from left + chunk - 1 on
        positions = module.relative_k_proj(middle[: len(distances)]).unflatten(-1, (3, 16))
        rings = [torch.full((2, 3, left + chunk, 16), torch.nan) for _ in range(2)]
        got = []
        padded = torch.nn.functional.pad(x, (0, 0, 0, chunk))
        for first in range(0, frames, chunk):
            piece = padded[:, first : first + chunk]
            q, k, v = (
                linear(piece).unflatten(-1, (3, 16))
                for linear in (module.q_proj, module.k_proj, module.v_proj)
            )
            counts = [min(max(n - first, 0), chunk) for n in total]
            y = ops.kv_relative_step(
                *(q, k, v, *rings, positions, module.bias_u, module.bias_v),
                int32(*(min(n, first) for n in total)),
                left=left,
                counts=int32(*counts),
                scale=module.scaling,
            )
            got.append(module.o_proj(y.flatten(2)))
        ours = torch.cat(got, 1)[:, :frames]
    torch.testing.assert_close(ours[there], want[there], rtol=1e-5, atol=1e-5)
