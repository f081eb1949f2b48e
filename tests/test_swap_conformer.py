"""Parakeet (FastConformer) and Wav2Vec2-Conformer: the same outputs before and after the swap."""

from __future__ import annotations

import pytest
import torch
from tiny_models import adapter

import lora_kernels as lk


def _parakeet():
    from transformers import ParakeetCTCConfig, ParakeetForCTC

    torch.manual_seed(0)
    encoder = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "subsampling_conv_channels": 8,
        "num_mel_bins": 16,
        "scale_input": False,
    }
    model = ParakeetForCTC(ParakeetCTCConfig(vocab_size=30, encoder_config=encoder)).eval()
    lengths = torch.tensor([64, 48, 40]).unsqueeze(1)
    mask = (torch.arange(64) < lengths).long()
    return model, {"input_features": torch.randn(3, 64, 16), "attention_mask": mask}


def _wav2vec2():
    from transformers import Wav2Vec2ConformerConfig, Wav2Vec2ConformerForCTC

    torch.manual_seed(0)
    config = Wav2Vec2ConformerConfig(
        vocab_size=30,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        conv_dim=(16, 16),
        conv_stride=(5, 4),
        conv_kernel=(10, 8),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        mask_time_prob=0.0,
        layerdrop=0.0,
        **dict.fromkeys(
            ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout"), 0.0
        ),
        final_dropout=0.0,
        conformer_conv_dropout=0.0,
    )
    return Wav2Vec2ConformerForCTC(config).eval(), {"input_values": torch.randn(3, 1600)}


FAMILIES = {"parakeet": _parakeet, "wav2vec2": _wav2vec2}
TOLERANCE = {"atol": 1e-4, "rtol": 1e-3}


def _logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


@pytest.fixture(params=FAMILIES.values(), ids=FAMILIES)
def family(request):
    return request.param()


def test_outputs_are_the_same_after_the_swap(family):
    model, inputs = family
    expected = _logits(model, inputs)
    keys = list(model.state_dict())
    report = lk.swap(model)
    torch.testing.assert_close(_logits(model, inputs), expected)
    kinds = {change.after for change in report.replaced}
    assert kinds == {"LoraLinear", "LoraPointwiseConv1d"}
    pointwise = [c for c in report.replaced if c.after == "LoraPointwiseConv1d"]
    assert len(pointwise) == 4
    assert {k.reason for k in report.kept} == {
        "not a pointwise convolution",
        "a subclass with its own behaviour",
    }
    assert list(model.state_dict()) == keys
    lk.unswap(model)
    assert torch.equal(_logits(model, inputs), expected)


def test_live_adapters_merge_and_int8(family):
    model, inputs = family
    lk.add_adapter(model, adapter(model, 3, seed=1), "a")
    lk.add_adapter(model, adapter(model, 5, seed=2), "b")
    names = ["a", None, "b"]
    with lk.use_adapters(names):
        mixed = _logits(model, inputs)
    for row, name in enumerate(names):
        with lk.use_adapters([name] * 3):
            torch.testing.assert_close(_logits(model, inputs)[row], mixed[row], **TOLERANCE)
    lk.quantize(model)
    with lk.use_adapters(names):
        quantized = _logits(model, inputs)
    assert (quantized - mixed).norm() / mixed.norm() < 0.05


def test_merged_equals_live(family):
    model, inputs = family
    lk.add_adapter(model, adapter(model, 3, seed=1), "a")
    with lk.use_adapters("a"):
        live = _logits(model, inputs)
    lk.merge(model, "a")
    torch.testing.assert_close(_logits(model, inputs), live, **TOLERANCE)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_peft_on_linears_and_convolutions(dropout):
    from peft import LoraConfig, get_peft_model

    base, inputs = _wav2vec2()
    config = LoraConfig(
        r=4,
        target_modules=["linear_q", "linear_v", "pointwise_conv1", "pointwise_conv2"],
        init_lora_weights=False,
        lora_dropout=dropout,
    )
    model = get_peft_model(base, config).eval()
    expected = model(**inputs).logits
    expected.square().sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    report = lk.swap(model)
    assert {c.before for c in report.replaced} >= {"peft Linear", "peft Conv1d"}
    result = model(**inputs).logits
    torch.testing.assert_close(result, expected, **TOLERANCE)
    result.square().sum().backward()
    for name, parameter in model.named_parameters():
        if name in gradients:
            scale = gradients[name].abs().max().clamp(min=1)
            torch.testing.assert_close(
                parameter.grad / scale, gradients[name] / scale, atol=1e-3, rtol=1e-3
            )


def test_a_layer_that_all_utterances_share_cannot_be_mixed():
    model, inputs = _wav2vec2()
    name = "wav2vec2_conformer.encoder.layers.0.self_attn.linear_pos"
    lk.add_adapter(model, adapter(model, 3, seed=1, names=[name]), "a")
    with lk.use_adapters("a"):
        assert torch.isfinite(_logits(model, inputs)).all()
    with lk.use_adapters(["a", None, "a"]), pytest.raises(lk.AdapterError, match="relative posit"):
        _logits(model, inputs)
