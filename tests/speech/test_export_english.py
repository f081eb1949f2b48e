"""A Whisper that knows English only: neither a language nor a task stands in its prompt."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from lora_speech.data.audio import load_audio
from lora_speech.data.features import extract_features
from lora_speech.errors import ModelError
from lora_speech.export.run import ExportReport, export_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def english(tiny_whisper_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Whisper, its generation config as those of the released ``.en`` models."""
    folder = tmp_path_factory.mktemp("english") / "base"
    shutil.copytree(tiny_whisper_folder, folder)
    path = folder / "generation_config.json"
    generation = json.loads(path.read_text())
    for name in ("lang_to_id", "task_to_id"):
        del generation[name]
    generation["is_multilingual"] = False
    # generate() cuts its output at timestamps, which a random model emits unasked.
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    generation["suppress_tokens"] += range(generation["no_timestamps_token_id"] + 1, vocabulary)
    path.write_text(json.dumps(generation))
    return folder


@pytest.fixture(scope="module")
def exported(
    english: Path, tones: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> ExportReport:
    return export_model(english, "onnx", tmp_path_factory.mktemp("onnx") / "out", check=tones)


def test_an_english_only_whisper_says_what_transformers_says(
    exported: ExportReport, english: Path, tones: list[Path]
) -> None:
    from transformers import WhisperForConditionalGeneration

    assert exported.check.identical and exported.plan.language is None
    recognizer = exported.target.open(exported.output)
    decoding = recognizer.decoding
    theirs = WhisperForConditionalGeneration.from_pretrained(english)
    config = theirs.generation_config
    assert decoding.languages == {}
    assert decoding.prompt == [config.decoder_start_token_id, config.no_timestamps_token_id]
    heard = []
    for path in tones:
        features = extract_features(exported.plan.model, [load_audio(path)])["input_features"]
        with torch.no_grad():
            [expected] = theirs.generate(features).tolist()
        got = recognizer.decode(
            features.numpy(), decoding.prompt, decoding.max_new_tokens, adapter=None
        )
        assert got == [token for token in expected if token != config.eos_token_id]
        heard.append(got)
    assert all(len(tokens) > 3 for tokens in heard) and heard[0] != heard[1]


def test_it_takes_no_language(english: Path, tones: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="none: it knows English only"):
        export_model(english, "onnx", tmp_path / "out", check=tones, language="en")
    assert not list(tmp_path.iterdir())
