"""The package's INT8 quantization equals the specification's, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_kernels as lk
from lora_kernels import reference
from lora_kernels.nn import int8_rows

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
LARGEST = torch.finfo(torch.float32).max


def check(x: torch.Tensor) -> None:
    q, scales = int8_rows.quantize_rows(x)
    want_q, want_scales = reference.quantize_rows(x)
    assert q.dtype == torch.int8
    assert scales.dtype == torch.float32
    assert q.is_contiguous()
    assert torch.equal(q, want_q)
    torch.testing.assert_close(scales, want_scales, rtol=0, atol=0, equal_nan=True)


@given(
    st.integers(0, 2**31 - 1),
    st.lists(st.integers(1, 7), min_size=1, max_size=3),
    st.integers(0, 40),
    st.sampled_from(DTYPES),
    st.integers(-44, 38),
)
@settings(max_examples=100, deadline=None)
def test_random_values_of_every_magnitude(seed, leading, columns, dtype, exponent):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(*leading, columns, generator=g, dtype=torch.float64) * 10.0**exponent
    check(x.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_every_kind_side_by_side(dtype):
    rows = [
        [0.0, -0.0, 0.0, 0.0],
        [1.0, torch.nan, 2.0, 3.0],
        [1.0, torch.inf, 2.0, 3.0],
        [-torch.inf, torch.inf, torch.nan, 0.0],
        [127.0, 0.5, 1.5, 2.5],  # ties, with a factor of 1
        [-127.0, -0.5, -1.5, -2.5],
        [254.0, 1.0, 3.0, -5.0],  # ties, with a factor of 1/2
        [LARGEST, -LARGEST, 1.0, LARGEST / 254],
        [127 / LARGEST, 0.0, 0.0, 0.0],  # the smallest with a finite factor, and below it
        [126 / LARGEST, 0.0, 0.0, 0.0],
        [1e-45, 0.0, 0.0, -1e-45],
        [1e300, 1.0, 0.0, 0.0],  # beyond fp32
        [6e-8, 1e-8, 65504.0, -1e-3],
    ]
    x = torch.tensor(rows, dtype=torch.float64).to(dtype)
    check(x)
    check(x.T)


def test_pieces_and_strides_change_nothing(monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3, 16)
    for chunk in (1, 7, 100, 1 << 20):
        monkeypatch.setattr(int8_rows, "_CHUNK", chunk)
        check(x)
        check(x.transpose(1, 2))
        check(x[:0])
        check(x[..., :0])


def test_a_weight_is_quantized_without_a_copy_in_floating_point():
    weight = torch.nn.Parameter(torch.randn(4096, 1024))
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        q, scales = int8_rows.quantize_weight(weight)
    assert torch.equal(q, reference.quantize_weight(weight)[0])
    assert not scales.requires_grad
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest <= q.nbytes + scales.nbytes + (1 << 12)


def test_a_broken_weight_is_refused_with_its_channel():
    with pytest.raises(lk.LoraKernelsError, match="output channel 1; repair the checkpoint"):
        int8_rows.quantize_weight(torch.tensor([[1.0], [torch.nan]]))
