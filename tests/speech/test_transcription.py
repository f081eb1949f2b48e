"""Windows, segments, formats, and several recordings in one batch."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
from tiny_whisper import make_adapter, tone

from lora_speech import transcription
from lora_speech.data.features import extract_features
from lora_speech.data.windows import cut_windows
from lora_speech.decoding.beam import beam_decode
from lora_speech.decoding.greedy import Hypotheses
from lora_speech.decoding.prompts import special_tokens
from lora_speech.errors import ModelError, SpeechError
from lora_speech.formats import clock, render
from lora_speech.models.loading import SpeechModel, load_base, load_for_serving
from lora_speech.transcription import Segment, TranscriptionInfo, transcribe, transcribe_many

RATE = 16_000
INFO = TranscriptionInfo("a.wav", 2.5, "en", None)
SEGMENTS = [Segment(0, 0.0, 1.5, "hello & <you>"), Segment(1, 3661.5, 3662.004, "bye")]


@pytest.fixture(scope="module")
def speech(tiny_whisper_folder: Path) -> SpeechModel:
    return load_base(tiny_whisper_folder)


def bursts(*spans: tuple[float, float], total: float) -> np.ndarray:
    """Silence with faint noise, and tones at the given spans (seconds)."""
    samples = np.random.default_rng(0).normal(0, 1e-4, int(total * RATE)).astype(np.float32)
    for begin, end in spans:
        burst = tone(end - begin)
        at = int(begin * RATE)
        samples[at : at + len(burst)] += burst
    return samples


class TestWindows:
    """Cutting by level."""

    def test_short_recordings_stay_whole(self) -> None:
        [window] = cut_windows(bursts((0.5, 1.0), total=1.8), RATE, 2.0)
        assert (window.begin, window.end) == (0, int(1.8 * RATE))
        assert window.speech_begin / RATE == pytest.approx(0.5, abs=0.04)
        assert window.speech_end / RATE == pytest.approx(1.0, abs=0.04)

    def test_cuts_fall_into_pauses(self) -> None:
        samples = bursts((0.2, 1.4), (1.7, 3.0), (3.3, 4.6), total=5.0)
        windows = cut_windows(samples, RATE, 2.0)
        assert len(windows) == 3
        for window, (begin, end) in zip(windows, [(0.2, 1.4), (1.7, 3.0), (3.3, 4.6)], strict=True):
            assert window.begin / RATE <= begin
            assert window.end / RATE >= end - 0.02

    @pytest.mark.parametrize("seed", range(5))
    def test_windows_cover_all_speech_without_overlap(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        spans, at = [], 0.0
        while at < 20.0:
            begin = at + rng.uniform(0.05, 1.5)
            spans.append((begin, begin + rng.uniform(0.1, 4.0)))
            at = spans[-1][1]
        samples = bursts(*spans, total=at + 0.5)
        windows = cut_windows(samples, RATE, 2.0)
        inside = np.zeros(len(samples), dtype=bool)
        for one, two in pairwise(windows):
            assert one.end <= two.begin
        for window in windows:
            assert 0 < window.end - window.begin <= 2 * RATE
            inside[window.begin : window.end] = True
        loud = np.abs(samples) > 0.1
        assert inside[loud].mean() > 0.995

    def test_silence_has_no_windows(self) -> None:
        assert cut_windows(np.zeros(RATE, dtype=np.float32), RATE, 2.0) == []
        assert cut_windows(np.zeros(9 * RATE, dtype=np.float32), RATE, 2.0) == []

    def test_steady_sound_is_cut_by_length(self) -> None:
        windows = cut_windows(tone(7.0), RATE, 2.0)
        assert sum(w.end - w.begin for w in windows) / RATE == pytest.approx(7.0, abs=0.1)


class TestFormats:
    """What `--format` writes."""

    def test_clock(self) -> None:
        assert clock(3661.5, ",") == "01:01:01,500"
        assert clock(0.0004, ".") == "00:00:00.000"
        assert clock(59.9996, ".") == "00:01:00.000"

    def test_text(self) -> None:
        assert render(SEGMENTS, INFO) == "hello & <you> bye\n"
        assert render([], INFO) == "\n"

    def test_srt(self) -> None:
        assert render(SEGMENTS, INFO, "srt") == (
            "1\n00:00:00,000 --> 00:00:01,500\nhello & <you>\n\n"
            "2\n01:01:01,500 --> 01:01:02,004\nbye\n"
        )

    def test_vtt(self) -> None:
        assert render(SEGMENTS, INFO, "vtt") == (
            "WEBVTT\n\n00:00:00.000 --> 00:00:01.500\nhello &amp; &lt;you&gt;\n"
            "\n01:01:01.500 --> 01:01:02.004\nbye\n"
        )

    def test_json(self) -> None:
        record = json.loads(render(SEGMENTS, INFO, "json"))
        assert record["text"] == "hello & <you> bye"
        assert record["segments"][1] == {"id": 1, "start": 3661.5, "end": 3662.004, "text": "bye"}
        assert (record["duration"], record["language"], record["adapter"]) == (2.5, "en", None)

    def test_unknown(self) -> None:
        with pytest.raises(SpeechError, match="text, json, srt, vtt, got 'doc'"):
            render(SEGMENTS, INFO, "doc")


def test_a_long_file(speech: SpeechModel, tmp_path: Path) -> None:
    path = tmp_path / "long.flac"
    soundfile.write(path, bursts((0.3, 1.5), (2.4, 3.6), (4.9, 5.9), total=6.5), RATE)
    segments, info = transcribe(speech, path, language="en")
    assert info.duration == pytest.approx(6.5)
    assert info.language == "en"
    assert [s.id for s in segments] == list(range(len(segments)))
    assert len(segments) == 3
    for segment, begin in zip(segments, (0.3, 2.4, 4.9), strict=True):
        assert segment.start == pytest.approx(begin, abs=0.05)
    assert transcribe(speech, path, language="en", batch_size=1)[0] == segments


def test_silence_gives_nothing(speech: SpeechModel) -> None:
    segments, info = transcribe(speech, np.zeros(RATE, dtype=np.float32), language="en")
    assert segments == []
    assert info.duration == 1.0


def test_the_language_is_settled_in_the_first_window(
    speech: SpeechModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str | None]] = []

    def decode(model: object, features: object, **kwargs: object) -> Hypotheses:
        asked.append(list(kwargs["language"]))
        return Hypotheses([[270]] * len(asked[-1]), [c or "es" for c in asked[-1]], 1)

    monkeypatch.setattr(transcription, "greedy_decode", decode)
    long = bursts((0.3, 1.5), (2.4, 3.6), total=4.0)
    results = transcribe_many(speech, [long, tone(1.0)])
    assert asked == [[None, None], ["es"]]
    assert [info.language for _, info in results] == ["es", "es"]


def test_timestamps_of_the_model_become_segments(
    speech: SpeechModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = special_tokens(speech.model).first_timestamp
    go, stop = speech.processor.tokenizer("gostop", add_special_tokens=False)["input_ids"]
    emitted = [first, go, first + 25, first + 30, stop, go]

    def decode(*args: object, **kwargs: object) -> Hypotheses:
        return Hypotheses([emitted], ["en"], 6)

    monkeypatch.setattr(transcription, "greedy_decode", decode)
    segments, _ = transcribe(speech, tone(1.0), timestamps=True)
    assert [(s.start, s.end, s.text) for s in segments] == [
        (0.0, 0.5, "go"),
        (0.6, 1.0, "stopgo"),
    ]


def test_one_batch_mixes_adapters(tiny_whisper_folder: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tiny_whisper_folder, tmp_path / "a", rank=4, seed=5)
    model = load_for_serving(tiny_whisper_folder, {"a": adapter}, int8=True)
    audio = [tone(1.0), tone(1.0), tone(0.7, frequency=300.0)]
    mixed = transcribe_many(model, audio, adapters=["a", None, "a"], language="en")
    for samples, name, (segments, info) in zip(audio, ["a", None, "a"], mixed, strict=True):
        assert transcribe(model, samples, adapter=name, language="en")[0] == segments
        assert info.adapter == name
    assert mixed[0][0] != mixed[1][0]


def test_beam_size(speech: SpeechModel) -> None:
    [segment], info = transcribe(speech, tone(1.0), language="es", beam_size=4)
    features = extract_features(speech, [tone(1.0)])["input_features"]
    expected = beam_decode(speech.model, features, beams=4, language="es")
    assert list(segment.tokens) == expected.tokens[0]
    assert info.language == "es"
    assert transcribe(speech, tone(1.0), language="es")[0] != [segment]  # greedy


def test_length_penalty(speech: SpeechModel) -> None:
    features = extract_features(speech, [tone(1.0)])["input_features"]
    lengths = set()
    for penalty in (-5.0, None, 5.0):
        segments, _ = transcribe(
            speech, tone(1.0), language="es", beam_size=4, length_penalty=penalty
        )
        expected = beam_decode(
            speech.model, features, beams=4, language="es",
            length_penalty=1.0 if penalty is None else penalty,
        )  # fmt: skip
        assert [list(segment.tokens) for segment in segments] == expected.tokens
        lengths.add(len(expected.tokens[0]))
    assert len(lengths) > 1


def test_bad_requests(speech: SpeechModel, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"loaded \(none\), got 'me'"):
        transcribe(speech, tone(), adapter="me")
    with pytest.raises(SpeechError, match="one \\(or None\\) per recording \\(1\\), got 2"):
        transcribe_many(speech, [tone()], adapters=[None, None])
    for beam_size in (0, 101):
        with pytest.raises(SpeechError, match=f"beam_size: expected 1 to 100, got {beam_size}"):
            transcribe(speech, tone(), beam_size=beam_size)
    with pytest.raises(SpeechError, match="length_penalty: expected none with beam_size 1"):
        transcribe(speech, tone(), length_penalty=1.0)
    with pytest.raises(SpeechError, match="length_penalty: expected -10 to 10, got nan"):
        transcribe(speech, tone(), beam_size=2, length_penalty=float("nan"))
    with pytest.raises(SpeechError, match="batch_size"):
        transcribe(speech, tone(), batch_size=0)
    with pytest.raises(SpeechError, match="no such audio file"):
        transcribe(speech, tmp_path / "gone.wav")
