"""PEFT folders in and out, and everything that is refused."""

from __future__ import annotations

import filecmp
import json
import os
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import peft_whisper, whisper

import lora_kernels as lk
from lora_kernels.adapters import resolve_scale

CONFIGURATIONS = {
    "list": {"target_modules": ["q_proj", "fc2"]},
    "regex": {"target_modules": r".*decoder.*\.(fc1|v_proj)"},
    "rslora": {"target_modules": ["v_proj"], "use_rslora": True, "lora_alpha": 20},
    "patterns": {
        "target_modules": ["q_proj", "v_proj", "fc1"],
        "rank_pattern": {"decoder.*.q_proj": 7, "^model.encoder.layers.0.fc1": 3},
        "alpha_pattern": {"encoder.layers.1.fc1": 3, "v_proj": 16},
        "lora_alpha": 9,
    },
    "task type and dropout": {"task_type": "SEQ_2_SEQ_LM", "lora_dropout": 0.1},
}


@pytest.fixture
def saved(tmp_path):
    def save(**settings):
        model = peft_whisper(**settings)
        model.save_pretrained(tmp_path / "saved")
        return model, tmp_path / "saved"

    return save


@pytest.mark.parametrize("settings", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_round_trip_is_byte_identical_and_scales_are_peft_s(saved, tmp_path, settings):
    model, folder = saved(**settings)
    adapter = lk.read_peft_folder(folder)
    written = lk.write_peft_folder(adapter, tmp_path / "deep" / "written")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert filecmp.cmp(folder / name, written / name, shallow=False)
    assert sorted(os.listdir(written)) == ["adapter_config.json", "adapter_model.safetensors"]
    assert os.listdir(written.parent) == ["written"]
    base = model.base_model.model
    for name, layer in adapter.layers.items():
        module = base.get_submodule(name)
        assert layer.scale == module.scaling["default"]
        assert torch.equal(layer.lora_a, module.lora_A["default"].weight)
        assert torch.equal(layer.lora_b, module.lora_B["default"].weight)


def test_our_own_adapter_loads_in_plain_peft(tmp_path):
    from peft import PeftModel

    base = whisper()
    names = ["model.encoder.layers.0.fc1", "model.decoder.layers.1.self_attn.q_proj"]
    tensors = {
        name: (torch.randn(r, 32), torch.randn(base.get_submodule(name).out_features, r))
        for name, r in zip(names, (3, 5), strict=True)
    }
    adapter = lk.Adapter.from_tensors(tensors, alpha={names[0]: 6, names[1]: 2.5}, use_rslora=True)
    lk.write_peft_folder(adapter, tmp_path / "a")
    model = PeftModel.from_pretrained(whisper(), tmp_path / "a")
    for name, layer in adapter.layers.items():
        module = model.base_model.model.get_submodule(name)
        assert module.scaling["default"] == pytest.approx(layer.scale)
        assert torch.equal(module.lora_B["default"].weight, layer.lora_b)
    assert lk.read_peft_folder(tmp_path / "a").content_hash == adapter.content_hash


def test_existing_folders_are_replaced_and_files_refused(saved, tmp_path):
    _, folder = saved()
    adapter = lk.read_peft_folder(folder)
    (folder / "README.md").write_text("mine")
    lk.write_peft_folder(adapter, folder)
    assert (folder / "README.md").read_text() == "mine"
    (tmp_path / "file").write_text("")
    with pytest.raises(lk.AdapterError, match="got the file"):
        lk.write_peft_folder(adapter, tmp_path / "file")


def test_nothing_half_written_remains(saved, tmp_path, monkeypatch):
    _, folder = saved()
    adapter = lk.read_peft_folder(folder)

    def fail(*args, **kwargs):
        raise OSError("disk full")

    # By the module object: lora_kernels.adapters is also the name of a function.
    monkeypatch.setattr(sys.modules["lora_kernels.adapters.peft_folder"], "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        lk.write_peft_folder(adapter, tmp_path / "new")
    assert os.listdir(tmp_path) == ["saved"]


def test_content_hash_follows_what_changes_the_output(saved):
    _, folder = saved()
    adapter = lk.read_peft_folder(folder)
    again = lk.read_peft_folder(folder)
    assert adapter.content_hash == again.content_hash
    name = next(iter(adapter))
    layers = dict(adapter.layers)
    layers[name] = lk.AdapterLayer(layers[name].lora_a * 2, layers[name].lora_b, 0.5)
    assert lk.Adapter(layers, adapter.config).content_hash != adapter.content_hash
    config = dict(adapter.config, lora_dropout=0.9)
    assert lk.Adapter(adapter.layers, config).content_hash == adapter.content_hash


REFUSED = {
    "use_dora": ({"use_dora": True}, "DoRA"),
    "lora_bias": ({"lora_bias": True}, "lora_bias"),
    "modules_to_save": ({"modules_to_save": ["proj_out"]}, "modules_to_save.*merge_and_unload"),
    "bias": ({"bias": "all"}, "bias='none'"),
    "embedding": ({"target_modules": ["embed_tokens"]}, "embedding"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("settings", "word"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_served_is_refused_with_the_way_out(saved, settings, word):
    _, folder = saved(**settings)
    with pytest.raises(lk.UnsupportedError, match=word):
        lk.read_peft_folder(folder)


def test_all_reasons_at_once(saved):
    _, folder = saved()
    config = json.loads((folder / "adapter_config.json").read_text())
    config.update(use_dora=True, bias="all", init_lora_weights="pissa_niter_4")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(lk.UnsupportedError) as caught:
        lk.read_peft_folder(folder)
    for word in ("use_dora", "bias", "init_lora_weights"):
        assert word in str(caught.value)


def test_pickled_weights_are_never_opened(saved):
    _, folder = saved()
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(lk.AdapterError, match=r"expected adapter_model.safetensors.*got none"):
        lk.read_peft_folder(folder)
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(lk.UnsupportedError, match=r"pickled.*safe_serialization=True"):
        lk.read_peft_folder(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.999])
def test_truncated_weights(saved, keep):
    _, folder = saved()
    path = folder / "adapter_model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
    with pytest.raises(lk.AdapterError, match="truncated or damaged"):
        lk.read_peft_folder(folder)


def test_missing_and_damaged_configurations(saved, tmp_path):
    _, folder = saved()
    with pytest.raises(lk.AdapterError, match="not a folder"):
        lk.read_peft_folder(tmp_path / "nowhere")
    with pytest.raises(lk.AdapterError, match=r"subfolders.*'saved'"):
        lk.read_peft_folder(tmp_path)
    config = folder / "adapter_config.json"
    config.write_text(config.read_text()[:40])
    with pytest.raises(lk.AdapterError, match="does not parse"):
        lk.read_peft_folder(folder)


def _edit(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_damaged_tensors(saved):
    _, folder = saved()
    original = load_file(folder / "adapter_model.safetensors")
    key = next(key for key in original if key.endswith("lora_A.weight"))

    def expect(word, change):
        save_file(original, folder / "adapter_model.safetensors")
        _edit(folder, change)
        with pytest.raises(lk.AdapterError, match=word):
            lk.read_peft_folder(folder)

    expect("NaN or infinity", lambda t: t[key].mul_(torch.nan))
    expect("got no lora_A", lambda t: t.pop(key))
    expect("expected rank 4", lambda t: t.update({key: t[key][:2].clone()}))
    expect("expected a matrix", lambda t: t.update({key: t[key].unsqueeze(0).repeat(4, 1, 2)}))
    expect("one dtype", lambda t: t.update({key: t[key].half()}))
    expect("float32, float16 or bfloat16", lambda t: t.update({key: t[key].to(torch.int8)}))
    save_file({}, folder / "adapter_model.safetensors")
    with pytest.raises(lk.AdapterError, match="at least one module"):
        lk.read_peft_folder(folder)


def test_resolved_scale_of_wrong_configurations():
    with pytest.raises(lk.AdapterError, match="expected numbers"):
        resolve_scale({"r": "many"}, "m", 4)
    with pytest.raises(lk.AdapterError, match="rank"):
        resolve_scale({"r": 8, "rank_pattern": {"m": 3}}, "a.m", 8)
    assert resolve_scale({"r": 4, "lora_alpha": 2, "use_rslora": True}, "m", 4) == 1.0
