"""Dynamic INT8 of whole models."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from tiny_models import adapter, features, generate, labels, peft_whisper, whisper
from torch import nn

import lora_kernels as lk


def _logits(model):
    with torch.no_grad():
        return model(input_features=features(), decoder_input_ids=labels()).logits


def test_whisper_stays_close_and_reports_the_tied_head():
    model = whisper(init_std=0.1)
    expected = _logits(model)
    report = lk.quantize(model, lk.Int8Dynamic())
    assert len(report.replaced) == 32
    assert "tied with model.decoder.embed_tokens" in report.reason("proj_out")
    assert report.reason("model.encoder.conv1") == "not a pointwise convolution"
    error = (_logits(model) - expected).norm() / expected.norm()
    assert error < 0.03
    assert isinstance(model.model.encoder.layers[0].fc1, lk.Int8LoraLinear)
    assert type(model.model.encoder.layers[0].final_layer_norm) is nn.LayerNorm
    lk.swap(model)
    assert generate(model, features()).shape[0] == 3


def test_adapters_work_before_and_after_quantizing():
    first, second = whisper(init_std=0.1), whisper(init_std=0.1)
    made = adapter(first, 4, seed=1)
    lk.add_adapter(first, made, "a")
    lk.quantize(first)
    lk.quantize(second)
    lk.add_adapter(second, made, "a")
    base = _logits(first)
    with lk.use_adapters(["a", None, "a"]):
        mixed = _logits(first)
        torch.testing.assert_close(mixed, _logits(second))
    torch.testing.assert_close(mixed[1], base[1], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(mixed[0], base[0], atol=1e-2)


def test_only_the_chosen_modules():
    model = whisper()
    report = lk.quantize(model, modules=["fc1", "fc2"])
    assert len(report.replaced) == 8
    again = lk.quantize(model, modules=["q_proj"])
    assert len(again.replaced) == 6
    with pytest.raises(lk.SwapError, match="nearest are"):
        lk.quantize(model, modules=["fc3"])
    with pytest.raises(lk.SwapError, match="at least one linear layer"):
        lk.quantize(nn.LayerNorm(3))


def test_saved_and_loaded_again():
    model = whisper()
    lk.quantize(model)
    other = whisper(seed=9)
    lk.quantize(other)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(_logits(other), _logits(model))


def test_peft_layers_are_left_with_the_reason():
    model = peft_whisper()
    report = lk.quantize(model)
    name = "base_model.model.model.encoder.layers.0.self_attn.q_proj"
    assert "PEFT" in report.reason(f"{name}.base_layer")
    assert "PEFT" in report.reason(f"{name}.lora_A.default")
    assert not any(".q_proj" in change.name for change in report.replaced)


def test_broken_weights_leave_the_model_unchanged():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight.data[2, 0] = torch.inf
    with pytest.raises(lk.SwapError, match=r"1: weight: .*output channel 2"):
        lk.quantize(model)
    assert type(model[0]) is nn.Linear


def test_hooks_move_to_the_quantized_module():
    model = nn.Sequential(nn.Linear(4, 4))
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    report = lk.quantize(model)
    model(torch.randn(2, 4))
    assert calls == [1]
    assert "hooks" in report.notes[0]


def test_schemes_are_registered_once():
    @dataclass(frozen=True)
    class Doubled:
        factor: int = 2

    with pytest.raises(lk.SwapError, match=r"expected one of .*Int8Dynamic\(\)"):
        lk.quantize(nn.Sequential(nn.Linear(2, 2)), Doubled())
    lk.register_scheme(Doubled)(lambda linear, scheme: nn.Identity())
    model = nn.Sequential(nn.Linear(2, 2))
    assert "Doubled(factor=2)" in str(lk.quantize(model, Doubled()))
    assert isinstance(model[0], nn.Identity)
    with pytest.raises(lk.SwapError, match="registered already"):
        lk.register_scheme(Doubled)(lambda linear, scheme: nn.Identity())
