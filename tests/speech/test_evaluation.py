"""Error rates: counting, totals, files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_whisper import make_adapter, tone

from lora_speech import evaluation
from lora_speech.data.manifest import Utterance
from lora_speech.errors import SpeechError
from lora_speech.evaluation import evaluate, total_rates, write_evaluation
from lora_speech.models.loading import load_base, load_for_serving
from lora_speech.transcription import Segment, TranscriptionInfo


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces transcription: what the model shall have heard, utterance by utterance."""
    texts: list[str] = []

    def transcribe_many(model: object, recordings: list, **kwargs: object) -> list:
        given = kwargs["adapters"]
        return [
            ([Segment(0, 0, 1, texts.pop(0))], TranscriptionInfo("x", 1.0, "en", adapter))
            for _, adapter in zip(recordings, given, strict=True)
        ]

    monkeypatch.setattr(evaluation, "transcribe_many", transcribe_many)
    return texts


def utterances(*texts: str) -> list[Utterance]:
    return [Utterance(tone(0.1), t, sampling_rate=16_000, name=str(i)) for i, t in enumerate(texts)]


def test_rates_add_errors_over_all_words(tiny_whisper_folder: Path, answers: list[str]) -> None:
    answers += ["turn left please", "Stop!", "go"]
    result = evaluate(
        load_base(tiny_whisper_folder),
        utterances("turn right", "stop", "go up now"),
        normalization="basic",
    )
    rates = result.rates
    assert (rates.substitutions, rates.insertions, rates.deletions, rates.words) == (1, 1, 2, 6)
    assert rates.wer == pytest.approx(4 / 6)
    assert rates.wer_raw == pytest.approx(5 / 6)  # "Stop!" is not "stop"
    assert [u.wer for u in result.utterances] == pytest.approx([1.0, 0.0, 2 / 3])
    assert 0 < rates.cer < 1


def test_normalised_and_raw_differ(tiny_whisper_folder: Path, answers: list[str]) -> None:
    answers += ["Seven, three!"]
    result = evaluate(load_base(tiny_whisper_folder), utterances("seven 3"))
    assert result.rates.wer == 0.0
    assert result.rates.cer == 0.0
    assert result.rates.wer_raw == 1.0


def test_empty_references_and_hypotheses(tiny_whisper_folder: Path, answers: list[str]) -> None:
    answers += ["", "noise here"]
    result = evaluate(load_base(tiny_whisper_folder), utterances("stop", ""))
    assert result.rates.deletions == 1
    assert result.rates.insertions == 2
    assert result.rates.wer == 3.0
    assert total_rates([]).wer == 0.0


def test_files(tiny_whisper_folder: Path, answers: list[str], tmp_path: Path) -> None:
    answers += ["stop", "góne"]
    told = []
    result = evaluate(
        load_base(tiny_whisper_folder),
        utterances("stop", "go"),
        progress=lambda done, total: told.append((done, total)),
    )
    write_evaluation(result, tmp_path / "out" / "r.json", tmp_path / "u.jsonl")
    totals = json.loads((tmp_path / "out" / "r.json").read_text())
    assert totals["wer"] == 0.5
    assert {"cer", "wer_raw", "cer_raw", "utterances", "normalizer", "rtfx"} <= totals.keys()
    lines = [json.loads(line) for line in (tmp_path / "u.jsonl").read_text().splitlines()]
    assert [(r["name"], r["reference"], r["hypothesis"]) for r in lines] == [
        ("0", "stop", "stop"),
        ("1", "go", "góne"),
    ]
    assert told == [(2, 2)]
    assert not list(tmp_path.rglob("*.partial"))


def test_each_utterance_uses_its_own_adapter(tiny_whisper_folder: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tiny_whisper_folder, tmp_path / "me", rank=4, seed=5)
    data = [
        Utterance(tone(1.0), "go", adapter="me", sampling_rate=16_000),
        Utterance(tone(1.0), "go", sampling_rate=16_000),
    ]
    base_only = evaluate(load_base(tiny_whisper_folder), data)
    assert [u.adapter for u in base_only.utterances] == [None, None]
    assert base_only.utterances[0].hypothesis == base_only.utterances[1].hypothesis
    model = load_for_serving(tiny_whisper_folder, {"me": adapter})
    own = evaluate(model, data)
    assert [u.adapter for u in own.utterances] == ["me", None]
    assert own.utterances[0].hypothesis != own.utterances[1].hypothesis
    assert own.utterances[1].hypothesis == base_only.utterances[1].hypothesis
    assert own.totals()["adapters"] == ["me", None]
    assert base_only.totals()["adapters"] == [None]
    assert (own.totals()["beam_size"], own.totals()["length_penalty"]) == (1, None)


def test_an_unknown_normalizer_fails_first(tiny_whisper_folder: Path) -> None:
    with pytest.raises(SpeechError, match="normalizer"):
        evaluate(load_base(tiny_whisper_folder), utterances("x"), normalization="odd")
