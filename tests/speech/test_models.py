"""Families, loading, and Conformers through `lora_kernels.swap`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_whisper import make_adapter

import lora_kernels as lk
from lora_speech.errors import ModelError
from lora_speech.models import FAMILIES, family_of
from lora_speech.models.base import FeatureRecipe, ModelFamily
from lora_speech.models.loading import load_base, load_for_serving, quantized_names


def tiny_parakeet() -> torch.nn.Module:
    from transformers import ParakeetCTCConfig, ParakeetForCTC

    encoder = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "subsampling_conv_channels": 8,
        "num_mel_bins": 16,
        "layerdrop": 0.0,
    }
    torch.manual_seed(0)
    return ParakeetForCTC(ParakeetCTCConfig(vocab_size=20, encoder_config=encoder)).eval()


def tiny_wav2vec2_conformer() -> torch.nn.Module:
    from transformers import Wav2Vec2ConformerConfig, Wav2Vec2ConformerForCTC

    config = Wav2Vec2ConformerConfig(
        vocab_size=20,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        conv_dim=(16, 16),
        conv_stride=(5, 4),
        conv_kernel=(10, 8),
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
        conv_depthwise_kernel_size=7,
        layerdrop=0.0,
    )
    torch.manual_seed(0)
    return Wav2Vec2ConformerForCTC(config).eval()


CONFORMERS = {
    "Parakeet": (tiny_parakeet, lambda: {"input_features": torch.randn(2, 96, 16)}),
    "Wav2Vec2-Conformer": (
        tiny_wav2vec2_conformer,
        lambda: {"input_values": torch.randn(2, 4000)},
    ),
}


def family_named(name: str) -> ModelFamily:
    return next(family for family in FAMILIES if family.name == name)


@pytest.mark.parametrize("name", CONFORMERS)
def test_conformers_swap_with_the_same_outputs(name: str) -> None:
    make, inputs = CONFORMERS[name]
    model, batch = make(), inputs()
    with torch.no_grad():
        before = model(**batch).logits
        keys = list(model.state_dict())
        report = lk.swap(model)
        torch.testing.assert_close(model(**batch).logits, before)
        assert list(model.state_dict()) == keys
        lk.unswap(model)
        torch.testing.assert_close(model(**batch).logits, before)
    family = family_named(name)
    replaced = {change.name for change in report.replaced}
    for suffix in {*family.lora_targets, *family.quantized}:
        found = [n for n, _ in model.named_modules() if family.covers(n, (suffix,))]
        assert found, f"{suffix} names no module of {name}"
        assert set(found) <= replaced


@pytest.mark.parametrize("name", CONFORMERS)
def test_conformers_train_and_serve_peft_adapters(name: str, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    make, inputs = CONFORMERS[name]
    batch, family = inputs(), family_named(name)
    tuned = get_peft_model(make(), LoraConfig(r=4, target_modules=list(family.lora_targets))).eval()
    with torch.no_grad():
        for key, parameter in tuned.named_parameters():
            if "lora_B" in key:
                parameter.normal_(0.0, 0.2)
        expected = tuned(**batch).logits
        lk.swap(tuned)
        torch.testing.assert_close(tuned(**batch).logits, expected, rtol=1e-4, atol=1e-4)
        tuned.save_pretrained(tmp_path)
        served = make()
        lk.swap(served)
        lk.load_adapter(served, tmp_path, name="a")
        with lk.use_adapters("a"):
            torch.testing.assert_close(served(**batch).logits, expected, rtol=1e-4, atol=1e-4)


def test_families_are_found_by_model_type() -> None:
    assert family_of("whisper").name == "Whisper"
    with pytest.raises(ModelError, match=r"known family, Whisper .* got model_type 'bert'"):
        family_of("bert")


def test_a_family_must_not_contradict_itself() -> None:
    with pytest.raises(ValueError, match="both quantized and floating point"):
        ModelFamily("X", ("x",), "A", "B", "ctc", (), ("a",), ("a",), FeatureRecipe("input", False))


def test_loading_a_folder(tiny_whisper_folder: Path) -> None:
    speech = load_base(tiny_whisper_folder)
    assert speech.family.name == "Whisper"
    assert (speech.window_seconds, speech.sampling_rate) == (2.0, 16_000)
    assert not speech.model.training
    assert not any(p.requires_grad for p in speech.model.parameters())


def test_int8_covers_what_the_family_declares(tiny_whisper_folder: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tiny_whisper_folder, tmp_path / "a", rank=2, seed=0)
    speech = load_base(tiny_whisper_folder)
    names = quantized_names(speech)
    assert len(names) == 2 * 6 + 2 * 10
    load_for_serving(speech, {"a": adapter}, int8=True)
    kinds = {n: type(m).__name__ for n, m in speech.model.named_modules()}
    assert {kinds[name] for name in names} == {"Int8LoraLinear"}
    assert kinds["proj_out"] != "Int8LoraLinear"
    assert speech.adapters == ("a",)


@pytest.mark.parametrize("base", ["./nowhere", "/nowhere/at/all", "a/b/c"])
def test_missing_bases(base: str) -> None:
    with pytest.raises(ModelError, match="hub name, got nothing there; check the path"):
        load_base(base)


def test_damaged_bases(tiny_whisper_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config.json"):
        load_base(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(tiny_whisper_folder, copy)
    (copy / "model.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(ModelError, match="loading failed"):
        load_base(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not JSON"):
        load_base(copy)
    (copy / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ModelError, match="'bert'"):
        load_base(copy)


def test_pickled_weights_are_refused(tiny_whisper_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_whisper_folder, copy)
    (copy / "model.safetensors").unlink()
    torch.save({}, copy / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        load_base(copy)


def test_hub_names_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import transformers

    def offline(*args: object, **kwargs: object) -> None:
        raise OSError("We couldn't connect to 'https://huggingface.co'\nmore lines")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", offline)
    with pytest.raises(ModelError, match="connection, or use --base shipped") as caught:
        load_base("openai/whisper-nonexistent")
    assert "\n" not in str(caught.value)
