"""CTC models in ONNX Runtime: INT8 with a merged adapter, and Wav2Vec2-Conformer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from tiny_parakeet import LETTERS

from lora_speech.errors import ModelError
from lora_speech.export.ctc_decoding import collapse
from lora_speech.export.run import export_model

pytestmark = pytest.mark.slow


def run_logits(recognizer: Any, features: np.ndarray) -> np.ndarray:
    """What the graph of a whole recording gives, before tokens are chosen."""
    mask = np.ones(features.shape[:2], bool)
    inputs = {"features": features, "mask": mask, **recognizer.adapters}
    return np.asarray(recognizer.run("recognize", inputs)["logits"])


@torch.inference_mode()
def test_parakeet_in_int8_with_a_merged_adapter(
    tiny_parakeet_folder: Path, parakeet_adapter: Path, tune: Path, tmp_path: Path
) -> None:
    """Whole and in steps; near the floating point model with the adapter, and not without it."""
    from peft import PeftModel
    from transformers import ParakeetForCTC

    report = export_model(
        tiny_parakeet_folder, "onnx", tmp_path / "out", adapters={"accent": parakeet_adapter},
        merge=True, int8=True, check=[tune], options={"chunk": "3", "left": "8"}, max_wer=9.0,
    )  # fmt: skip
    assert report.plan.merged == "accent" and not report.plan.live
    assert not (tmp_path / "out" / "adapters").exists()
    comparisons = {c.way: c for c in report.check.comparisons}
    assert set(comparisons) == {"", "in steps"}
    # A random model has no margins: rounding in another order may turn a token, not the first ones.
    assert all(c.tokens > 2 and c.same >= 2 for c in comparisons.values())
    recognizer: Any = report.target.open(report.output)
    assert recognizer.decoding.int8 and recognizer.decoding.live == []
    inputs = report.plan.model.processor.feature_extractor(
        soundfile.read(tune)[0], sampling_rate=16_000, return_tensors="pt"
    )
    features = inputs["input_features"]
    got = torch.from_numpy(run_logits(recognizer, features.numpy()))
    ours = report.plan.model.model(input_features=features).logits
    base = ParakeetForCTC.from_pretrained(tiny_parakeet_folder).eval()
    plain = base(input_features=features).logits
    adapted = (
        PeftModel.from_pretrained(base, parakeet_adapter).eval()(input_features=features).logits
    )
    change = (adapted - plain).norm()
    assert (got - ours).norm() < 0.05 * change
    assert (got - adapted).norm() < 0.5 * change < (got - plain).norm()
    assert (got - adapted).norm() > 1e-3 * change  # it is INT8 that ran


def wav2vec2(folder: Path, positions: str, recording: Path) -> Path:
    """A small one with its processor, in the Hugging Face layout; random weights."""
    from transformers import (
        Wav2Vec2ConformerConfig,
        Wav2Vec2ConformerForCTC,
        Wav2Vec2CTCTokenizer,
        Wav2Vec2FeatureExtractor,
        Wav2Vec2Processor,
    )

    letters = ["<pad>", "<s>", "</s>", "<unk>", "|", *LETTERS.strip()]
    (folder / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(letters)}))
    extractor = Wav2Vec2FeatureExtractor(return_attention_mask=True)
    processor = Wav2Vec2Processor(extractor, Wav2Vec2CTCTokenizer(str(folder / "vocab.json")))
    config = Wav2Vec2ConformerConfig(
        vocab_size=len(letters), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, conv_dim=(16, 16), conv_stride=(16, 20), conv_kernel=(32, 40),
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2, conv_depthwise_kernel_size=7,
        feat_extract_norm="layer", position_embeddings_type=positions, layerdrop=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Wav2Vec2ConformerForCTC(config).eval()
    inputs = extractor(soundfile.read(recording)[0], sampling_rate=16_000, return_tensors="pt")
    with torch.no_grad():  # weights this wide make frames differ; no letter is likeliest everywhere
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 1.5 / parameter[0].numel() ** 0.5)
        model.lm_head.bias -= model(**inputs).logits[0].median(0).values
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("positions", ["relative", "rotary"])
def test_wav2vec2_conformer_with_a_live_adapter(
    positions: str,
    tune: Path,
    tmp_path: Path,
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import Wav2Vec2ConformerForCTC

    (tmp_path / "base").mkdir()
    base = wav2vec2(tmp_path / "base", positions, tune)
    torch.manual_seed(1)
    adapted: Any = get_peft_model(
        Wav2Vec2ConformerForCTC.from_pretrained(base),
        LoraConfig(r=3, lora_alpha=6, target_modules=["linear_q", "linear_out"]),
    ).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.3)
    adapted.save_pretrained(tmp_path / "accent")
    report = export_model(
        base, "onnx", tmp_path / "out", adapters={"accent": tmp_path / "accent"}, check=[tune]
    )
    assert report.check.identical
    found = {c.adapter: c for c in report.check.comparisons}
    assert set(found) == {None, "accent"} and {c.way for c in found.values()} == {""}
    assert all(c.tokens > 2 for c in found.values())
    assert found["accent"].got != found[None].got
    assert [path.name for path in (tmp_path / "out").glob("*.onnx")] == ["recognize.onnx"]
    # What is compared is not only ours: transformers and peft say the same.
    inputs = report.plan.model.processor.feature_extractor(
        soundfile.read(tune)[0], sampling_rate=16_000, return_tensors="pt"
    )
    recognizer = report.target.open(report.output)
    got = recognizer.decode(inputs["input_values"].numpy(), (), 0, "accent")
    with torch.no_grad():
        best = adapted(**inputs).logits[0].argmax(-1).tolist()
    assert got == collapse(best, blank=0)
    with pytest.raises(ModelError, match="got 'nobody'"):
        recognizer.decode(inputs["input_values"].numpy(), (), 0, "nobody")
