"""Swapping plain models: the same tokens before and after, and everything undone again."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import adapter, features, generate, labels, whisper
from torch import nn

import lora_kernels as lk
from lora_kernels.report import collapse


@pytest.fixture
def steps(monkeypatch):
    """Counts the calls of kv_attention_step."""
    calls = []
    original = lk.ops.kv_attention_step

    def counted(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(lk.ops, "kv_attention_step", counted)
    return calls


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("beams", [1, 5])
def test_generate_gives_the_same_tokens(attention, beams, steps):
    model, inputs = whisper(attention=attention), features()
    expected = generate(model, inputs, num_beams=beams)
    assert expected.unique().numel() > 3, "a model that repeats itself would prove nothing"
    keys = list(model.state_dict())
    report = lk.swap(model)
    assert torch.equal(generate(model, inputs, num_beams=beams), expected)
    layers = 2 * model.config.decoder_layers
    assert len(steps) == layers * (expected.shape[1] - 1), "every step after the prefill"
    assert list(model.state_dict()) == keys
    assert len(report.replaced) == 37
    lk.unswap(model)
    steps.clear()
    assert torch.equal(generate(model, inputs, num_beams=beams), expected)
    assert not steps
    assert all("forward" not in m.__dict__ for m in model.modules())
    assert not any(isinstance(m, lk.nn.AdapterHost) for m in model.modules())


def test_sampling_contrastive_and_long_prompts_keep_working(steps):
    model, inputs = whisper(), features()
    prompt = torch.cat((torch.full((3, 1), 3), labels(3, 6)), dim=1)
    expected = generate(model, inputs, decoder_input_ids=prompt)
    lk.swap(model)
    assert torch.equal(generate(model, inputs, decoder_input_ids=prompt), expected)
    assert steps


def test_a_padded_prompt_goes_the_old_way(steps):
    model, inputs = whisper(), features()
    prompt = torch.cat((torch.tensor([[0], [3], [3]]), labels(3, 3)), dim=1)
    mask = (prompt != 0).long()
    settings = {"decoder_input_ids": prompt, "decoder_attention_mask": mask}
    expected = generate(model, inputs, **settings)
    lk.swap(model)
    assert torch.equal(generate(model, inputs, **settings), expected)


def test_returned_attentions_go_the_old_way():
    model, inputs = whisper(attention="eager"), features()
    settings = {"return_dict_in_generate": True, "output_attentions": True, "max_new_tokens": 5}
    with torch.no_grad():
        expected = model.generate(inputs, **settings)
        lk.swap(model)
        result = model.generate(inputs, **settings)
    for before, after in zip(expected.cross_attentions, result.cross_attentions, strict=True):
        for left, right in zip(before, after, strict=True):
            torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-4)


def test_static_caches_and_no_cache_go_the_old_way():
    model, inputs = whisper(), features()
    expected = generate(model, inputs, use_cache=False)
    lk.swap(model)
    assert torch.equal(generate(model, inputs, use_cache=False), expected)
    assert torch.equal(generate(model, inputs), expected)


def test_training_is_unchanged():
    model, inputs, targets = whisper(), features(), labels()
    expected = model(input_features=inputs, labels=targets)
    expected.loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    lk.swap(model)
    model.gradient_checkpointing_enable()
    model.train()
    result = model(input_features=inputs, labels=targets)
    result.loss.backward()
    torch.testing.assert_close(result.loss, expected.loss)
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-4)


def test_save_and_load_after_the_swap(tmp_path):
    model, inputs = whisper(), features()
    expected = generate(model, inputs)
    lk.swap(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    loaded.generation_config = model.generation_config
    assert torch.equal(generate(loaded, inputs), expected)


def test_report_says_what_and_why():
    model = whisper()
    report = lk.swap(model)
    text = str(report)
    assert "model.decoder.layers.0-1.self_attn.q_proj" in text
    assert report.reason("model.encoder.conv1") == "not a pointwise convolution"
    assert "no cache" in report.reason("model.encoder.layers.0.self_attn")
    assert report.reason("model.encoder.layers.0.fc1") is None
    again = lk.swap(model)
    assert not again
    assert again.reason("model.encoder.layers.0.fc1") == "swapped already"


def test_collapse_folds_layer_numbers():
    names = [f"a.{i}.b" for i in (0, 1, 2)] + ["a.7.c", "a.9.c", "d", "3.e"]
    assert collapse(names) == ["a.0-2.b", "a.{7,9}.c", "d", "3.e"]


def test_choosing_modules():
    model = whisper()
    report = lk.swap(model, modules=["fc1"], attention=False)
    assert {change.name.rsplit(".", 1)[-1] for change in report.replaced} == {"fc1"}
    report = lk.swap(model, modules=r"model\.decoder.*\.q_proj", attention=False)
    assert len(report.replaced) == 4
    with pytest.raises(lk.SwapError, match=r"nearest are .*q_proj"):
        lk.swap(model, modules=["query_proj"])
    with pytest.raises(lk.SwapError, match="empty list"):
        lk.swap(model, modules=[])


def test_nothing_to_swap_is_an_error():
    with pytest.raises(lk.SwapError, match="without any"):
        lk.swap(nn.LayerNorm(4))


def test_someone_else_s_forward_is_left_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].forward = lambda x: x
    report = lk.swap(model)
    assert "someone else" in report.reason("0")
    assert [change.name for change in report.replaced] == ["1"]


def test_unswap_drops_live_adapters_and_keeps_quantized_layers():
    model = whisper()
    lk.add_adapter(model, adapter(model, 2, seed=0), "a")
    lk.quantize(model, modules=["fc1"])
    report = lk.unswap(model)
    assert any("'a'" in note or " a" in note for note in report.notes)
    assert lk.list_adapters(model) == {}
    assert "quantized" in report.reason("model.encoder.layers.0.fc1")
    assert generate(model, features()).numel()


def test_copies_of_swapped_models_are_independent():
    model, inputs = whisper(), features()
    lk.swap(model)
    copied = copy.deepcopy(model)
    attention = copied.model.decoder.layers[0].self_attn
    assert attention.forward.__self__ is attention
    expected = generate(model, inputs)
    lk.unswap(model)
    assert torch.equal(generate(copied, inputs), expected)


@pytest.mark.parametrize("beams", [1, 4])
def test_int8_models_read_cross_attention_in_int8(beams, monkeypatch):
    """Packed once per utterance and shared by its beams; the text is that of the modules."""
    model, inputs = whisper(), features()
    lk.quantize(model)
    expected = generate(model, inputs, num_beams=beams)
    lk.swap(model)
    packed, caches = [], set()
    pack, step = lk.ops.kv_pack, lk.ops.kv_attention_step

    def counted_pack(k, v, heads):
        packed.append(k.shape[0])
        return pack(k, v, heads)

    def counted_step(q, k, v, k_cache, v_cache, **settings):
        if k is None:
            caches.add((k_cache.dtype, k_cache.shape[0], q.shape[0]))
        return step(q, k, v, k_cache, v_cache, **settings)

    monkeypatch.setattr(lk.ops, "kv_pack", counted_pack)
    monkeypatch.setattr(lk.ops, "kv_attention_step", counted_step)
    result = generate(model, inputs, num_beams=beams)
    assert packed == [len(inputs)] * model.config.decoder_layers
    assert caches == {(torch.int8, len(inputs), len(inputs) * beams)}
    assert float((result == expected).float().mean()) > 0.9
