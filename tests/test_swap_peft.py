"""PEFT's layers after the swap: the same losses and gradients, and PEFT's life around them."""

from __future__ import annotations

import copy
import filecmp
import pickle

import pytest
import torch
from tiny_models import features, generate, labels, peft_whisper, whisper

import lora_kernels as lk

LAYER = "base_model.model.model.encoder.layers.0.self_attn.q_proj"


@pytest.fixture
def fused(monkeypatch):
    """Counts the calls of lora_linear with LoRA."""
    calls = []
    original = lk.ops.lora_linear

    def counted(*args, **kwargs):
        calls.append(kwargs.get("dropout_p", 0.0))
        return original(*args, **kwargs)

    monkeypatch.setattr(lk.ops, "lora_linear", counted)
    return calls


def _loss_and_gradients(model):
    model.zero_grad()
    loss = model(input_features=features(), labels=labels()).loss
    loss.backward()
    named = model.named_parameters()
    return loss.detach(), {n: p.grad.clone() for n, p in named if p.grad is not None}


def _compare(left, right):
    torch.testing.assert_close(left[0], right[0], atol=1e-5, rtol=1e-5)
    assert left[1].keys() == right[1].keys()
    for name, gradient in left[1].items():
        torch.testing.assert_close(gradient, right[1][name], atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True}, {"rank_pattern": {"fc1": 9}, "alpha_pattern": {"fc1": 3}}],
    ids=["plain", "rslora", "patterns"],
)
def test_losses_and_gradients_are_peft_s(settings, fused):
    model = peft_whisper(**settings)
    expected = _loss_and_gradients(model)
    report = lk.swap(model)
    assert len([c for c in report.replaced if c.before == "peft Linear"]) == 16
    _compare(_loss_and_gradients(model), expected)
    assert len(fused) == 16
    lk.unswap(model)
    _compare(_loss_and_gradients(model), expected)
    assert len(fused) == 16


def test_generation_with_a_peft_adapter():
    model, inputs = peft_whisper().eval(), features()
    for beams in (1, 5):
        expected = generate(model, inputs, num_beams=beams)
        lk.swap(model)
        assert torch.equal(generate(model, inputs, num_beams=beams), expected)
        lk.unswap(model)


def test_gradient_checkpointing_repeats_the_dropout_mask():
    model = peft_whisper(lora_dropout=0.4)
    lk.swap(model)
    model.train()
    torch.manual_seed(3)
    expected = _loss_and_gradients(model)
    torch.manual_seed(3)
    _compare(_loss_and_gradients(model), expected)
    model.base_model.model.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    torch.manual_seed(3)
    _compare(_loss_and_gradients(model), expected)


def test_dropout_is_drawn_anew_in_training_and_off_in_evaluation(fused):
    model = peft_whisper(lora_dropout=0.4)
    lk.swap(model)
    model.train()
    first, second = (_loss_and_gradients(model)[0] for _ in range(2))
    assert first != second
    assert set(fused) == {0.4}
    fused.clear()
    model.eval()
    first, second = (_loss_and_gradients(model)[0] for _ in range(2))
    assert first == second
    assert set(fused) == {0.0}


def test_states_of_peft_fall_back_and_come_back(fused):
    model = peft_whisper().eval()
    reference = copy.deepcopy(model)
    lk.swap(model)

    def same(count):
        fused.clear()
        with torch.no_grad():
            left = model(input_features=features(), labels=labels()).logits
            right = reference(input_features=features(), labels=labels()).logits
        torch.testing.assert_close(left, right, atol=1e-4, rtol=1e-4)
        assert len(fused) == count

    same(16)
    with model.disable_adapter(), reference.disable_adapter():
        same(0)
    model.merge_adapter()
    reference.merge_adapter()
    same(0)
    model.unmerge_adapter()
    reference.unmerge_adapter()
    same(16)
    from peft import LoraConfig

    for m in (model, reference):
        torch.manual_seed(1)
        m.add_adapter("second", LoraConfig(r=3, target_modules=["fc1"], init_lora_weights=False))
        m.set_adapter("second")
    same(4)
    for m in (model, reference):
        m.base_model.set_adapter(["default", "second"])
    same(0)
    for m in (model, reference):
        m.set_adapter("default")
        for module in m.modules():
            if hasattr(module, "set_scale"):
                module.set_scale("default", 3.0)
    same(16)
    names = {"adapter_names": ["default", "__base__", "default"]}
    with torch.no_grad():
        left = model(input_features=features(), labels=labels(), **names).logits
        right = reference(input_features=features(), labels=labels(), **names).logits
    torch.testing.assert_close(left, right, atol=1e-4, rtol=1e-4)
    for m in (model, reference):
        m.delete_adapter("second")
    same(16)


def test_the_scale_tensor_is_cached_until_the_scale_changes():
    model = peft_whisper().eval()
    lk.swap(model)
    layer = model.get_submodule(LAYER)
    x = torch.randn(1, 4, 32)
    with torch.no_grad():
        layer(x)
        plan = layer.__dict__["_lora_kernels_plans"]["default"]
        scales = plan.scales
        layer(x)
        assert plan.scales is scales
        layer.scale_layer(2.0)
        layer(x)
    assert plan.scales is not scales
    assert plan.scales.item() == 2 * scales.item()


@pytest.mark.filterwarnings("ignore")
def test_static_reasons_are_reported():
    dora = peft_whisper(use_dora=True)
    assert "DoRA" in lk.swap(dora).reason(LAYER)
    assert "lora_bias" in lk.swap(peft_whisper(lora_bias=True, target_modules=["q_proj"])).reason(
        LAYER
    )
    embedding = peft_whisper(target_modules=["q_proj", "embed_tokens"])
    assert "Embedding" in lk.swap(embedding).reason("base_model.model.model.decoder.embed_tokens")
    hooked = peft_whisper()
    hooked.get_submodule(LAYER).base_layer.register_forward_hook(lambda *_: None)
    assert "hooks" in lk.swap(hooked).reason(LAYER)
    merged = peft_whisper()
    merged.merge_adapter()
    assert any("merged" in note for note in lk.swap(merged).notes)


def test_a_pickled_model_computes_the_same_and_can_be_swapped_again(fused):
    model = peft_whisper().eval()
    lk.swap(model)
    expected = _loss_and_gradients(model)
    loaded = pickle.loads(pickle.dumps(model))
    fused.clear()
    _compare(_loss_and_gradients(loaded), expected)
    assert not fused
    assert len([c for c in lk.swap(loaded).replaced if c.before == "peft Linear"]) == 16
    _compare(_loss_and_gradients(loaded), expected)
    assert len(fused) == 16


def test_swapping_before_peft_wraps_the_model(fused):
    model = whisper()
    lk.swap(model)
    wrapped = peft_whisper(model)
    expected = _loss_and_gradients(peft_whisper())
    lk.swap(wrapped)
    _compare(_loss_and_gradients(wrapped), expected)
    assert len(fused) == 16


def test_an_unfrozen_base_is_refused():
    model = peft_whisper()
    model.requires_grad_(True)
    with pytest.raises(lk.SwapError, match=r"all \d+ parameters trainable.*requires_grad_"):
        lk.swap(model)


def test_autocast(fused):
    model = peft_whisper().eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(input_features=features(), labels=labels()).logits
        lk.swap(model)
        result = model(input_features=features(), labels=labels()).logits
    assert result.dtype == expected.dtype
    assert fused
    assert (result - expected).float().norm() / expected.float().norm() < 0.05


def _train(folder, swapped):
    """An ordinary PEFT script; the swap is its one new line."""
    from transformers import Trainer, TrainingArguments

    model = peft_whisper()
    if swapped:
        lk.swap(model)
    dataset = [
        {"input_features": f, "labels": t} for f, t in zip(features(12), labels(12), strict=True)
    ]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=5e-3,
        logging_steps=1,
        save_steps=3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_num_workers=0,
        seed=0,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=dataset)
    trainer.train()
    model.save_pretrained(folder / "adapter")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return model.eval(), losses


def test_an_unmodified_trainer_script(tmp_path):
    from peft import PeftModel

    _, expected = _train(tmp_path / "peft", swapped=False)
    model, losses = _train(tmp_path / "ours", swapped=True)
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    assert losses == pytest.approx(expected, rel=1e-3)
    plain = PeftModel.from_pretrained(whisper(), tmp_path / "ours" / "adapter").eval()
    inputs = {"input_features": features(), "labels": labels()}
    with torch.no_grad():
        result = plain(**inputs).logits
        torch.testing.assert_close(result, model(**inputs).logits, atol=1e-4, rtol=1e-4)
        lk.unswap(model)
        assert torch.equal(result, model(**inputs).logits)
    # A checkpoint of the swapped run holds the files that PEFT's own run holds.
    ours, theirs = (
        sorted(p.name for p in (tmp_path / run / "checkpoint-3").iterdir())
        for run in ("ours", "peft")
    )
    assert ours == theirs
    config = "adapter/adapter_config.json"
    assert filecmp.cmp(tmp_path / "ours" / config, tmp_path / "peft" / config, shallow=False)
