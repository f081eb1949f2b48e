"""Merging a live adapter into the base."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import adapter, features, labels, whisper
from torch import nn

import lora_kernels as lk


def _model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 9))


@given(st.integers(1, 6), st.integers(0, 50), st.sampled_from([torch.float32, torch.bfloat16]))
@settings(max_examples=25, deadline=None)
def test_merged_equals_unmerged(rank, seed, dtype):
    model = _model(seed).to(dtype)
    lk.add_adapter(model, adapter(model, rank, seed=seed), "a")
    x = torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(seed)).to(dtype)
    with torch.no_grad():
        with lk.use_adapters("a"):
            live = model(x)
        report = lk.merge(model, "a")
        merged = model(x)
    tolerance = 1e-4 if dtype == torch.float32 else 0.15
    torch.testing.assert_close(merged, live, atol=tolerance, rtol=tolerance)
    assert set(report.modules) == {"0", "2"}
    assert all(report.modules.values())
    assert "2 modules" in str(report)
    assert lk.list_adapters(model) == {}


def test_merging_whisper_leaves_other_adapters_live():
    model = whisper()
    lk.add_adapter(model, adapter(model, 3, seed=1), "a")
    lk.add_adapter(model, adapter(model, 4, seed=2), "b")
    inputs = {"input_features": features(), "decoder_input_ids": labels()}
    with torch.no_grad():
        with lk.use_adapters("a"):
            expected = model(**inputs).logits
        lk.merge(model, "a")
        torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-3, rtol=1e-3)
        with lk.use_adapters("b"):
            assert not torch.allclose(model(**inputs).logits, expected, atol=1e-2)


def test_what_cannot_be_merged_leaves_the_model_unchanged():
    model = _model()
    lk.add_adapter(model, adapter(model, 3, seed=1), "a")
    lk.quantize(model, modules=["2"])
    before = model[0].weight.clone()
    with pytest.raises(lk.SwapError, match="merge first, then quantize"):
        lk.merge(model, "a")
    assert torch.equal(model[0].weight, before)
    assert "a" in lk.list_adapters(model)

    model = whisper()
    lk.add_adapter(model, adapter(model, 3, seed=1, names=["proj_out"]), "tied")
    with pytest.raises(lk.SwapError, match="share"):
        lk.merge(model, "tied")

    model = _model().half()
    lk.add_adapter(model, adapter(model, 3, seed=1, size=1e3), "huge")
    with pytest.raises(lk.AdapterError, match="overflow"):
        lk.merge(model, "huge")
