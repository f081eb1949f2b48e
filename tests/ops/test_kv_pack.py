"""``kv_pack`` of every implementation against the executable specification, bit for bit."""

from __future__ import annotations

import pytest
import torch
from attention_steps import FLOATS
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_kernels import ops, reference

OP = torch.ops.lora_kernels.kv_pack.default


def states(rows=2, positions=37, columns=3 * 64, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(rows, positions, columns, generator=g).to(dtype) for _ in range(2))


def check(k, v, heads):
    got, want = ops.kv_pack(k, v, heads), reference.kv_pack(k, v, heads)
    for ours, theirs in zip(got, want, strict=True):
        assert ours.is_contiguous()
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("positions", [0, 1, 3, 4, 63, 64, 65, 130])
def test_positions(implementation, dtype, positions):
    check(*states(positions=positions, dtype=dtype), 3)


@pytest.mark.parametrize("head_size", [1, 3, 4, 7, 16, 17, 48, 64, 65, 80, 96, 128, 131])
def test_head_sizes(implementation, head_size):
    check(*states(columns=2 * head_size), 2)


def test_large(implementation):
    """Split over tasks."""
    check(*states(rows=3, positions=700, columns=5 * 64), 5)


@pytest.mark.parametrize("shape", [(0, 5, 6), (2, 0, 6), (1, 5, 6)])
def test_empty_and_small(shape):
    check(torch.randn(shape), torch.randn(shape), 2)


def test_rounding_is_half_to_even(implementation):
    """Magnitude 127: the scale is 1, and halves are exact."""
    k = torch.tensor([127.0, 0.5, 1.5, -2.5, 3.5, -126.5, 126.5, -0.5]).view(1, 8, 1)
    packed, _, scales, _ = ops.kv_pack(k, k, 1)
    assert scales.item() == 1
    assert packed.flatten()[::4][:8].tolist() == [127, 0, 2, -2, 4, -126, 126, 0]


def test_slices_of_a_fused_projection(implementation):
    k, v = states()
    fused = torch.cat((k, v), dim=-1)
    wide = torch.cat((fused, fused), dim=1)[:, 5:42]
    check(wide[..., :192], wide[..., 192:], 3)
    transposed = k.mT.contiguous().mT
    check(transposed, v.to(torch.float32), 3)


def test_misaligned(implementation):
    k, v = states(dtype=torch.bfloat16)
    memory = torch.empty(k.numel() + 1, dtype=k.dtype)
    memory[1:] = k.reshape(-1)
    check(memory[1:].view(k.shape), v, 3)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_channels_are_marked_alone(implementation, bad):
    k, v = states()
    want = ops.kv_pack(k, v, 3)
    k[1, 36, 70], v[0, 0, 0] = bad, bad
    check(k, v, 3)
    got = ops.kv_pack(k, v, 3)
    assert got[2][1, 1, 0, 6].isnan()
    assert got[3][0, 0, 0, 0].isnan()
    for ours, theirs in zip(got, want, strict=True):
        assert (ours != theirs).sum() <= 37


def test_zero_and_tiny_channels(implementation):
    k, v = states()
    k[..., 5], v[..., 7] = 0, 1e-38
    check(k, v, 3)
    _, _, k_scales, v_scales = ops.kv_pack(k, v, 3)
    assert k_scales[:, 0, 0, 5].eq(0).all()
    assert v_scales[:, 0, 0, 7].eq(0).all()


def test_unpack_is_the_inverse():
    k, v = states(columns=2 * 7)
    packed_k, packed_v, k_scales, v_scales = ops.kv_pack(k, v, 2)
    keys, values = reference.kv_unpack(packed_k, packed_v, 7)
    for q, scales, x in ((keys, k_scales, k), (values, v_scales, v)):
        back = (q[:, :, :37] * scales).transpose(1, 2).flatten(2)
        assert (back - x).abs().max() <= 0.5001 * x.abs().max() / 127


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_do_not_change_bits(implementation, threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        check(*states(rows=3, positions=300), 3)
    finally:
        torch.set_num_threads(before)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_sizes(data):
    draw = data.draw
    heads, head_size = draw(st.integers(1, 4)), draw(st.integers(1, 90))
    check(
        *states(
            rows=draw(st.integers(1, 3)),
            positions=draw(st.integers(0, 150)),
            columns=heads * head_size,
            dtype=draw(st.sampled_from(FLOATS)),
            seed=draw(st.integers(0, 1000)),
        ),
        heads,
    )


X = torch.zeros(2, 5, 12)
BAD = {
    "k without utterances": ((X[0], X, 3), ["k:", "[utterances, positions", "[5, 12]"]),
    "v of another shape": ((X, X[:, :4], 3), ["v:", "[2, 5, 12]", "[2, 4, 12]"]),
    "v of another dtype": ((X, X.half(), 3), ["v:", "float32", "float16"]),
    "k of int8": ((X.to(torch.int8), X.to(torch.int8), 3), ["k, v: expected float32", "int8"]),
    "k of fp64": ((X.double(), X.double(), 3), ["k:", "float32"]),
    "heads that do not divide": ((X, X, 5), ["heads:", "12 columns", "got 5"]),
    "no heads": ((X, X, 0), ["heads:", "got 0"]),
    "no columns": ((X[..., :0], X[..., :0], 3), ["heads:", "1 to 65536 channels", "got 0"]),
    "too many positions": (
        (torch.zeros(1, 131073, 1), torch.zeros(1, 131073, 1), 1),
        ["k, v:", "131072 positions", "got 131073"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    arguments, words = BAD[case]
    with pytest.raises((RuntimeError, ValueError)) as error:
        ops.kv_pack(*arguments)
    for word in ("kv_pack: ", *words):
        assert word in str(error.value)


def test_opcheck():
    torch.library.opcheck(OP, (*states(columns=2 * 7), 2))


def test_compile():
    def both(k, v):
        packed_k, _, _, v_scales = ops.kv_pack(k * 2, v, 3)
        return packed_k.sum(), v_scales

    k, v = states()
    got = torch.compile(both, fullgraph=True, backend="aot_eager")(k, v)
    torch.testing.assert_close(got, both(k, v), rtol=0, atol=0)
