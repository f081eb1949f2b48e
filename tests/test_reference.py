"""The executable specification against independent formulas and published numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_close

from lora_kernels import ops, reference


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [
        # Random123's known answers (kat_vectors, philox4x32 10 rounds).
        (0, 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ],
)
def test_philox_known_answers(key, counter, expected):
    words = reference.philox4x32_10(key, torch.tensor([counter]))[0].tolist()
    assert " ".join(f"{word:08x}" for word in words) == expected


def _philox_in_integers(key: int, counter: int) -> list[int]:
    """The published algorithm in Python's integers."""
    mask = 0xFFFFFFFF
    c, k = [counter & mask, counter >> 32, 0, 0], [key & mask, (key >> 32) & mask]
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & mask, (p0 >> 32) ^ c[3] ^ k[1], p0 & mask]
        k = [(k[0] + 0x9E3779B9) & mask, (k[1] + 0xBB67AE85) & mask]
    return c


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**62))
@settings(max_examples=50, deadline=None)
def test_philox_equals_the_integer_algorithm(key, counter):
    words = reference.philox4x32_10(key, torch.tensor([counter]))[0].tolist()
    assert words == _philox_in_integers(key & (2**64 - 1), counter)


def test_dropout_keeps_the_right_share_and_repeats():
    keep = reference.dropout_keep_mask(300, 101, 0.3, 7)
    assert keep.float().mean().item() == pytest.approx(0.7, abs=0.01)
    assert torch.equal(keep, reference.dropout_keep_mask(300, 101, 0.3, 7))
    assert not torch.equal(keep, reference.dropout_keep_mask(300, 101, 0.3, 8))
    assert reference.dropout_keep_mask(3, 5, 0.0, 7).all()


@pytest.mark.parametrize("activation", ["none", "gelu", "silu"])
def test_lora_linear_is_the_textbook_formula(activation):
    torch.manual_seed(0)
    x, w, bias = torch.randn(2, 5, 7), torch.randn(6, 7), torch.randn(6)
    a, b, residual = torch.randn(3, 7), torch.randn(3, 6), torch.randn(2, 5, 6)
    y = reference.lora_linear(
        x,
        w,
        bias,
        lora_a=a,
        lora_b=b,
        scales=torch.tensor([0.5]),
        residual=residual,
        activation=activation,
    )
    act = {"none": lambda t: t, "gelu": F.gelu, "silu": F.silu}[activation]
    x, w, bias, a, b = (t.double() for t in (x, w, bias, a, b))
    expected = act(F.linear(x, w + 0.5 * b.T @ a, bias)) + residual
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, expected)


def test_unknown_activation_is_an_error():
    with pytest.raises(ValueError, match="activation: expected"):
        reference.lora_linear(torch.zeros(1, 2), torch.zeros(2, 2), activation="relu")


def test_ragged_bank_equals_each_adapter_alone():
    torch.manual_seed(0)
    x, w = torch.randn(4, 3, 7), torch.randn(6, 7)
    a, b = torch.randn(5, 7), torch.randn(5, 6)
    offsets, scales = torch.tensor([0, 2, 2, 5]), torch.tensor([2.0, 3.0, 0.5])
    ids = torch.tensor([2, -1, 0, 1])
    y = reference.lora_linear(
        x, w, lora_a=a, lora_b=b, offsets=offsets, scales=scales, adapter_ids=ids
    )
    for row, index in enumerate(ids.tolist()):
        if index in (-1, 1):  # the base, and an adapter of rank 0
            expected = reference.lora_linear(x[row], w)
        else:
            rows = slice(int(offsets[index]), int(offsets[index + 1]))
            expected = reference.lora_linear(
                x[row], w, lora_a=a[rows], lora_b=b[rows], scales=scales[index : index + 1]
            )
        torch.testing.assert_close(y[row], expected)


def test_lora_linear_gradients():
    torch.manual_seed(0)
    x, w, a, b = (
        torch.randn(s, dtype=torch.float64, requires_grad=True)
        for s in ((4, 5), (3, 5), (2, 5), (2, 3))
    )
    seed = torch.tensor([11])

    def function(x, w, a, b):
        return reference.lora_linear(
            x, w, lora_a=a, lora_b=b, activation="gelu", dropout_p=0.4, dropout_seed=seed
        )

    assert torch.autograd.gradcheck(function, (x, w, a, b))


@given(st.integers(1, 9), st.integers(1, 33), st.integers(0, 2**31 - 1))
@settings(max_examples=40, deadline=None)
def test_quantize_rows_rounds_within_half_a_step(rows, columns, seed):
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 3
    q, scale = reference.quantize_rows(x)
    assert q.dtype == torch.int8
    assert int(q.min()) >= -127
    assert (q.abs().amax(dim=1) == 127).all()
    error = (q.double() * scale.double().unsqueeze(1) - x.double()).abs()
    assert (error <= 0.5001 * scale.double().unsqueeze(1)).all()


def test_quantize_rows_of_zeros_tiny_and_non_finite_values():
    x = torch.tensor([[0.0, 0.0], [1e-40, 0.0], [1.0, torch.inf], [torch.nan, 1.0]])
    q, scale = reference.quantize_rows(x)
    assert (q == 0).all()
    assert scale[:2].tolist() == [0.0, 0.0]
    assert torch.isnan(scale[2:]).all()


def test_ties_round_to_even():
    # amax 127 makes inv 1, so the values are their own scaled versions.
    q, _ = reference.quantize_rows(torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]]))
    assert q.tolist() == [[127, 0, 2, 2, 0, -2]]


def test_int8_accumulators_are_exact():
    torch.manual_seed(0)
    q_x = torch.randint(-127, 128, (5, 700), dtype=torch.int8)
    q_w = torch.randint(-127, 128, (6, 700), dtype=torch.int8)
    expected = q_x.long() @ q_w.long().T
    assert torch.equal(reference.int8_accumulators(q_x, q_w), expected)


def test_int8_lora_linear_is_close_to_float_and_spreads_nan():
    torch.manual_seed(0)
    x, w = torch.randn(4, 64), torch.randn(16, 64)
    q, s = reference.quantize_weight(w)
    y = reference.int8_lora_linear(x, q, s)
    assert (y - reference.lora_linear(x, w)).abs().max() < 0.3
    x[1, 3] = torch.inf
    y = reference.int8_lora_linear(x, q, s)
    assert torch.isnan(y[1]).all()
    assert torch.isfinite(y[[0, 2, 3]]).all()
    static = reference.int8_lora_linear(x, q, s, x_scale=torch.tensor([3 / 127]))
    assert torch.isnan(static[1]).all()
    assert torch.isfinite(static[[0, 2, 3]]).all()


def test_quantize_weight_refuses_non_finite_values():
    with pytest.raises(ValueError, match="output channel 1"):
        reference.quantize_weight(torch.tensor([[1.0], [torch.nan]]))


def _attention(q, k, v, scale, causal):
    heads_first = (t.transpose(1, 2).double() for t in (q, k, v))
    out = F.scaled_dot_product_attention(*heads_first, is_causal=causal, scale=scale)
    return out.transpose(1, 2)


def test_attention_in_one_pass_and_in_chunks():
    torch.manual_seed(0)
    rows, tokens, heads, size = 2, 6, 3, 4
    q, k, v = (torch.randn(rows, tokens, heads, size) for _ in range(3))
    expected = _attention(q, k, v, 0.5, causal=True)
    caches = torch.zeros(2, rows, heads, 8, size)
    lengths = torch.zeros(rows, dtype=torch.int32)
    chunks = []
    for begin, end in ((0, 1), (1, 4), (4, 6)):
        part = (t[:, begin:end] for t in (q, k, v))
        out, weights = reference.kv_attention_step(
            *part, caches[0], caches[1], lengths, scale=0.5, heads=[2, 0]
        )
        chunks.append(out)
        lengths += end - begin
        torch.testing.assert_close(
            weights.sum(-1), torch.ones(rows, 2, end - begin, dtype=torch.float64)
        )
        assert (weights[..., end:] == 0).all()
    torch.testing.assert_close(torch.cat(chunks, dim=1), expected)


def test_attention_through_slots():
    torch.manual_seed(0)
    rows, heads, size, capacity = 3, 2, 4, 5
    q = torch.randn(rows, 1, heads, size)
    k_cache, v_cache = torch.randn(2, rows, heads, capacity, size)
    lengths = torch.tensor([4, 2, 5], dtype=torch.int32)
    slots = torch.tensor([2, 2, 0], dtype=torch.int32)
    out, weights = reference.kv_attention_step(
        q, None, None, k_cache, v_cache, lengths, slots=slots
    )
    assert weights.numel() == 0
    for row in range(rows):
        keys = k_cache[slots[row], :, : lengths[row]].transpose(0, 1).unsqueeze(0)
        values = v_cache[slots[row], :, : lengths[row]].transpose(0, 1).unsqueeze(0)
        expected = _attention(q[row : row + 1], keys, values, 1.0, causal=False)
        torch.testing.assert_close(out[row : row + 1], expected)
    table = slots.unsqueeze(1).expand(-1, capacity).contiguous()
    again, _ = reference.kv_attention_step(q, None, None, k_cache, v_cache, lengths, slots=table)
    assert torch.equal(out, again)


def test_attention_with_int8_caches_and_empty_rows():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 1, 2, 8) for _ in range(3))
    shape = (2, 2, 4, 8)
    k_cache, v_cache = torch.zeros(2, *shape, dtype=torch.int8)
    k_scales, v_scales = torch.zeros(2, 2, 2, 4, 1)
    lengths = torch.zeros(2, dtype=torch.int32)
    out, _ = reference.kv_attention_step(
        q, k, v, k_cache, v_cache, lengths, k_scales=k_scales, v_scales=v_scales
    )
    assert (out - v).abs().max() <= 0.5001 * v.abs().max() / 127
    out, _ = reference.kv_attention_step(
        q, None, None, k_cache, v_cache, lengths, k_scales=k_scales, v_scales=v_scales
    )
    assert (out == 0).all()


@pytest.mark.parametrize("capacity", [1, 5])
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("per_channel", [False, True])
def test_attention_tells_scales_per_channel_from_per_position(capacity, size, per_channel):
    torch.manual_seed(0)
    q = torch.randn(2, 1, 2, size)
    shape = (2, 2, capacity, size)
    k_cache, v_cache = torch.randint(-127, 128, (2, *shape), dtype=torch.int8)
    scales = torch.rand(2, 2, 2, *((1, size) if per_channel else (capacity, 1))) + 0.5
    lengths = torch.full((2,), capacity, dtype=torch.int32)
    arguments = {"k_scales": scales[0], "v_scales": scales[1], "scale": 0.01}
    out, _ = reference.kv_attention_step(q, None, None, k_cache, v_cache, lengths, **arguments)
    keys = (k_cache.double() * scales[0]).transpose(1, 2)
    values = (v_cache.double() * scales[1]).transpose(1, 2)
    torch.testing.assert_close(out, _attention(q, keys, values, 0.01, causal=False))
    got, _ = ops.kv_attention_step(q, None, None, k_cache, v_cache, lengths, **arguments)
    assert_close(got, out)
