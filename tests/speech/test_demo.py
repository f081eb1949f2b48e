"""The demonstration: whole on a tiny random model, and for real on the shipped one (slow)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_whisper import make_adapter, tone

from lora_speech.data.manifest import Utterance
from lora_speech.demo.run import DemoProgress, DemoSettings, mixed_batch_equal, run_demo
from lora_speech.demo.terminal import print_table
from lora_speech.errors import ModelError
from lora_speech.models.loading import load_for_serving, shipped_model_path
from lora_speech.synthetic import synthesis

needs_voice = pytest.mark.skipif(
    not synthesis.is_available(), reason="espeak-ng (espeakng-loader) is not installed"
)
SMALL = DemoSettings(
    train=8, validation=2, test=3, steps=4, second_steps=2, batch_size=2, rank=2, speed_rounds=2
)


@needs_voice
def test_the_report_is_complete(
    tiny_whisper_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages: list[str] = []

    class Recorder(DemoProgress):
        def stage(self, title: str) -> None:
            stages.append(title)

    report = run_demo(tiny_whisper_folder, tmp_path, SMALL, Recorder())
    written = json.loads((tmp_path / "demo_report.json").read_text())
    for key in ("wer_base", "wer_adapted", "wer_int8_adapted"):
        assert isinstance(written[key], float)
    assert isinstance(written["mixed_batch_equal"], bool)
    for key in ("ours", "transformers_peft"):
        assert written["tokens_per_second"][key] > 0
    assert len(written["training"]["losses"]) == 4
    assert (tmp_path / "demo_report.html").read_text().startswith("<!doctype html>")
    assert len(stages) == 6
    print_table(report)
    assert "mixed batch" in capsys.readouterr().out
    assert not list(tmp_path.rglob("*.partial"))


def test_mixed_batch_is_compared_row_by_row(tiny_whisper_folder: Path, tmp_path: Path) -> None:
    folders = {
        "a": make_adapter(tiny_whisper_folder, tmp_path / "a", rank=4, seed=5),
        "b": make_adapter(tiny_whisper_folder, tmp_path / "b", rank=2, seed=6),
    }
    model = load_for_serving(tiny_whisper_folder, folders, int8=True)
    data = [Utterance(tone(1.0 + i / 4), "x", sampling_rate=16_000) for i in range(3)]
    assert mixed_batch_equal(model, data, ["a", None, "b"])


def _shipped() -> Path | None:
    try:
        return shipped_model_path()
    except ModelError:
        return None


@pytest.mark.slow
@needs_voice
@pytest.mark.skipif(_shipped() is None, reason="the shipped base model is not in this checkout")
def test_the_shipped_model_learns_an_accent(tmp_path: Path) -> None:
    # Of 150 sentences one word is a tenth of a point: half learnt, many are close calls.
    settings = DemoSettings(train=120, validation=12, test=150, steps=80, second_steps=30)
    report = run_demo(output=tmp_path, settings=settings)
    assert report["wer_adapted"] < 0.8 * report["wer_base"]
    assert abs(report["wer_int8_adapted"] - report["wer_adapted"]) <= 0.03
    assert report["mixed_batch_equal"]
    assert report["tokens_per_second"]["ratio"] > 2.0
