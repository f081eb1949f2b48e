"""A LiteRT file: torch's tokens in floating point, nearly all of its words in INT8."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jiwer
import numpy as np
import pytest
from exported import compare, real_digits, spoken

from lora_speech.errors import ModelError, SpeechError
from lora_speech.export.run import ExportReport, export_model

pytestmark = [
    pytest.mark.skipif(
        find_spec(name) is None,
        reason=f"needs {name}: pip install '.[litert]'",
    )
    for name in ("litert_torch", "ai_edge_quantizer", "ai_edge_litert")
]


@pytest.fixture(scope="module")
def live(
    tiny_whisper_folder: Path,
    adapters: Any,
    tones: list[Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> ExportReport:
    output = tmp_path_factory.mktemp("live") / "out"
    return export_model(tiny_whisper_folder, "litert", output, adapters=adapters, check=tones)


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> ExportReport:
    spoken(1, seed=1)  # skips where nothing can speak
    return export_model("shipped", "litert", tmp_path_factory.mktemp("int8") / "out", int8=True)


@pytest.mark.slow
def test_live_adapters_give_the_tokens_of_torch(live: ExportReport) -> None:
    assert live.check.identical and live.check.wer == 0
    texts = {c.adapter: c.got for c in live.check.comparisons[:3]}
    assert len(set(texts.values())) == 3 and set(texts) == {None, "all", "some"}
    assert max(c.tokens for c in live.check.comparisons) > 10


@pytest.mark.slow
def test_other_sizes_and_adapters_are_refused(live: ExportReport) -> None:
    recognizer: Any = live.target.open(live.output)
    window = np.zeros((1, 80, 200), np.float32)
    with pytest.raises(ModelError, match="expected one of all, some, got 'nobody'"):
        recognizer.decode(window, recognizer.decoding.prompt, 4, "nobody")
    with pytest.raises(ModelError, match=r"tokens: expected shape \(1, 4\), got \(1, 2\)"):
        recognizer.decode(window, [1, 2], 4, None)


@pytest.mark.slow
def test_a_merged_adapter(
    tiny_whisper_folder: Path, adapters: Any, tones: list[Path], live: ExportReport, tmp_path: Path
) -> None:
    one = {"all": adapters["all"]}
    report = export_model(
        tiny_whisper_folder, "litert", tmp_path / "out", adapters=one, merge=True, check=tones
    )
    assert report.check.identical and report.plan.merged == "all"
    assert not (tmp_path / "out" / "adapters").exists()
    with_all = [c.got for c in live.check.comparisons if c.adapter == "all"]
    assert [c.got for c in report.check.comparisons] == with_all


@pytest.mark.slow
def test_int8_hears_what_torch_hears(int8: ExportReport) -> None:
    """On other sentences than it was checked with."""
    found = compare(int8, spoken(8, seed=7))
    assert sum(len(c.expected.split()) for c in found.comparisons) > 30
    assert found.wer <= 0.05
    assert int8.bytes["model.tflite"] < 3_000_000  # of 8.0 MB in fp32
    assert [name for name in int8.bytes if name.endswith(".tflite")] == ["model.tflite"]


@pytest.mark.slow
def test_int8_hears_people_as_well_as_torch(int8: ExportReport, real_speech: Path) -> None:
    """Of voices that the model was never trained on, and so hears badly: as badly as torch."""
    recordings, texts = real_digits(real_speech, 12)
    found = compare(int8, recordings).comparisons
    torch_wer = jiwer.wer(texts, [c.expected for c in found])
    assert torch_wer < 1 and jiwer.wer(texts, [c.got for c in found]) <= torch_wer + 0.1


def test_an_unwritable_output_leaves_nothing(
    tiny_whisper_folder: Path, tones: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import litert_torch

    def full(path: str) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(litert_torch.Converter, "convert", lambda _: SimpleNamespace(export=full))
    with pytest.raises(SpeechError, match="No space left on device"):
        export_model(tiny_whisper_folder, "litert", tmp_path / "out", check=tones)
    assert not list(tmp_path.iterdir())
