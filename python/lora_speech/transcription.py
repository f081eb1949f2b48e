"""Transcribe recordings of any length, `segments, info = transcribe(model, audio)`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lora_speech.data.audio import load_audio, prepare_samples
from lora_speech.data.features import extract_features
from lora_speech.data.windows import Window, cut_windows
from lora_speech.decoding.beam import MOST_BEAMS, MOST_LENGTH_PENALTY, beam_decode
from lora_speech.decoding.greedy import greedy_decode
from lora_speech.decoding.prompts import SpecialTokens, special_tokens
from lora_speech.errors import ModelError, SpeechError
from lora_speech.models.loading import SpeechModel


@dataclass(frozen=True)
class Segment:
    """A stretch of a recording with its text; times in seconds from the recording's start."""

    id: int
    start: float
    end: float
    text: str
    tokens: tuple[int, ...] = ()


@dataclass(frozen=True)
class TranscriptionInfo:
    """What is known of a transcribed recording.

    Attributes
    ----------
    name : str
        The file, or "audio".
    duration : float
        Seconds.
    language : str or None
        Given or detected (in the first window); None for an English-only model.
    adapter : str or None
        The adapter that was used; None: the base only.
    """

    name: str
    duration: float
    language: str | None
    adapter: str | None


def transcribe(
    model: SpeechModel,
    audio: str | os.PathLike[str] | bytes | np.ndarray,
    *,
    adapter: str | None = None,
    language: str | None = None,
    task: str = "transcribe",
    timestamps: bool = False,
    beam_size: int = 1,
    length_penalty: float | None = None,
    batch_size: int = 8,
    sampling_rate: int | None = None,
) -> tuple[list[Segment], TranscriptionInfo]:
    """Transcribe one recording.

    Parameters
    ----------
    model : SpeechModel
        From `load_base` or `load_for_serving`.
    audio : path, bytes or numpy.ndarray
        An audio file, its bytes, or mono float samples.
    adapter : str, optional
        Name of a loaded adapter; None uses the base alone.
    language : str, optional
        Language code or name; None detects it where the model knows several.
    task : {"transcribe", "translate"}
        Whisper's task.
    timestamps : bool
        Let the model write times; otherwise a segment spans the speech of its window.
    beam_size : int
        Hypotheses kept per window; 1 decodes greedily.
    length_penalty : float, optional
        With more than one hypothesis, exponent of the length that a hypothesis' log-probability
        is divided by: above 0 it favours long ones, below 0 short ones; 1.0 by default.
    batch_size : int
        Windows decoded at once.
    sampling_rate : int, optional
        Samples per second of an array; the model's rate by default.

    Returns
    -------
    segments : list of Segment
        In order of time; empty for silence.
    info : TranscriptionInfo
    """
    [result] = transcribe_many(
        model,
        [audio],
        adapters=[adapter],
        language=language,
        task=task,
        timestamps=timestamps,
        beam_size=beam_size,
        length_penalty=length_penalty,
        batch_size=batch_size,
        sampling_rate=sampling_rate,
    )
    return result


def transcribe_many(
    model: SpeechModel,
    recordings: Sequence[str | os.PathLike[str] | bytes | np.ndarray],
    *,
    adapters: Sequence[str | None] | None = None,
    language: str | Sequence[str | None] | None = None,
    task: str = "transcribe",
    timestamps: bool = False,
    beam_size: int = 1,
    length_penalty: float | None = None,
    batch_size: int = 8,
    sampling_rate: int | None = None,
) -> list[tuple[list[Segment], TranscriptionInfo]]:
    """Transcribe several recordings, windows of all of them sharing batches.

    Parameters are those of `transcribe`, with one adapter per recording: a batch may mix adapters
    and the base. All recordings are read before any is transcribed, so that a bad one costs
    nothing.

    Returns
    -------
    list of (segments, info)
        One per recording, in order.
    """
    _check(model, recordings, adapters, batch_size)
    penalty = checked_length_penalty(beam_size, length_penalty)
    decode: Any = greedy_decode
    if penalty is not None:
        decode = partial(beam_decode, beams=beam_size, length_penalty=penalty)
    adapters = list(adapters) if adapters is not None else [None] * len(recordings)
    languages = (
        [language] * len(recordings)
        if language is None or isinstance(language, str)
        else list(language)
    )
    rate = model.sampling_rate
    loaded = [_read(audio, rate, sampling_rate, i) for i, audio in enumerate(recordings)]
    longest = model.window_seconds or 30.0
    jobs = [
        (index, window)
        for index, (_, samples) in enumerate(loaded)
        for window in cut_windows(samples, rate, longest)
    ]
    segments: list[list[Segment]] = [[] for _ in recordings]
    tokens = special_tokens(model.model)
    # The language is settled in a recording's first window, so one window goes ahead of the rest.
    for batch in _batches(jobs, languages, batch_size, bool(tokens.languages)):
        features = extract_features(
            model, [loaded[index][1][window.begin : window.end] for index, window in batch]
        )
        chosen = [adapters[index] for index, _ in batch]
        hypotheses = decode(
            model.model,
            features[model.family.features.input_name],
            adapters=chosen,
            language=[languages[index] for index, _ in batch],
            task=task,
            timestamps=timestamps,
        )
        for (index, window), emitted, code in zip(
            batch, hypotheses.tokens, hypotheses.languages, strict=True
        ):
            languages[index] = languages[index] or code
            segments[index] += _segments(model, tokens, window, emitted, timestamps)
    results = []
    for index, (name, samples) in enumerate(loaded):
        ordered = sorted(segments[index], key=lambda segment: segment.start)
        numbered = [replace(segment, id=number) for number, segment in enumerate(ordered)]
        info = TranscriptionInfo(name, len(samples) / rate, languages[index], adapters[index])
        results.append((numbered, info))
    return results


def checked_length_penalty(beam_size: int, length_penalty: float | None) -> float | None:
    """The length penalty that a search is run with; None: it is greedy.

    Raises
    ------
    SpeechError
        One of them is out of range, or a greedy search, which compares no hypotheses of different
        lengths, is given a length penalty.
    """
    if not 1 <= beam_size <= MOST_BEAMS:
        raise SpeechError(
            f"beam_size: expected 1 to {MOST_BEAMS}, got {beam_size}; use 1 for speed, or e.g. 5"
        )
    if beam_size == 1 and length_penalty is not None:
        raise SpeechError(
            f"length_penalty: expected none with beam_size 1, which compares no hypotheses, got "
            f"{length_penalty}; give a beam size too, e.g. 5, or leave the length penalty out"
        )
    if length_penalty is not None and not abs(length_penalty) <= MOST_LENGTH_PENALTY:
        raise SpeechError(
            f"length_penalty: expected {-MOST_LENGTH_PENALTY:g} to {MOST_LENGTH_PENALTY:g}, got "
            f"{length_penalty}; 1.0 is usual"
        )
    if beam_size == 1:
        return None
    return 1.0 if length_penalty is None else length_penalty


def decode_text(model: SpeechModel, tokens: Sequence[int]) -> str:
    """Turn emitted tokens into text, special tokens and timestamps left out."""
    begin = special_tokens(model.model).first_timestamp
    words = [token for token in tokens if begin is None or token < begin]
    return str(model.processor.tokenizer.decode(words, skip_special_tokens=True)).strip()


def _segments(
    model: SpeechModel,
    tokens: SpecialTokens,
    window: Window,
    emitted: Sequence[int],
    timestamps: bool,
) -> list[Segment]:
    """Split a window's tokens at timestamps; without any, the window's speech is one segment."""
    rate = model.sampling_rate
    offset, limit = window.begin / rate, window.end / rate
    begin = tokens.first_timestamp
    if not timestamps or begin is None or not any(token >= begin for token in emitted):
        text = decode_text(model, emitted)
        start, end = window.speech_begin / rate, window.speech_end / rate
        return [Segment(0, start, end, text, tuple(emitted))] if text else []
    found: list[Segment] = []
    start, words = 0.0, []
    for token in emitted:
        if token < begin:
            words.append(token)
            continue
        time = (token - begin) * tokens.seconds_per_timestamp
        if words:
            found.append(_segment(model, words, offset + start, offset + time, limit))
            words = []
        start = time
    if words:
        found.append(_segment(model, words, offset + start, limit, limit))
    return [segment for segment in found if segment.text]


def _segment(
    model: SpeechModel, words: Sequence[int], start: float, end: float, limit: float
) -> Segment:
    end = min(end, limit)
    return Segment(0, min(start, end), end, decode_text(model, words), tuple(words))


def _batches(
    jobs: list[tuple[int, Window]],
    languages: list[str | None],
    batch_size: int,
    multilingual: bool,
) -> list[list[tuple[int, Window]]]:
    """Group windows; where a language is to be detected, recordings' first windows come first."""
    seen: set[int] = set()
    first: list[tuple[int, Window]] = []
    rest: list[tuple[int, Window]] = []
    for job in jobs:
        leads = multilingual and languages[job[0]] is None and job[0] not in seen
        seen.add(job[0])
        (first if leads else rest).append(job)
    return [
        group[at : at + batch_size]
        for group in (first, rest)
        for at in range(0, len(group), batch_size)
    ]


def _read(
    audio: str | os.PathLike[str] | bytes | np.ndarray,
    rate: int,
    array_rate: int | None,
    index: int,
) -> tuple[str, np.ndarray]:
    if isinstance(audio, np.ndarray):
        name = f"audio {index}"
        return name, prepare_samples(audio, array_rate or rate, rate, name=name)
    name = f"audio {index}" if isinstance(audio, bytes) else str(Path(audio))
    return name, load_audio(audio, rate, name=name)


def _check(
    model: SpeechModel,
    recordings: Sequence[object],
    adapters: Sequence[str | None] | None,
    batch_size: int,
) -> None:
    if model.family.objective != "sequence":
        raise ModelError(
            f"model: expected a Whisper, got a {model.family.name}; transcription with CTC "
            "families is not available yet"
        )
    if batch_size < 1:
        raise SpeechError(f"batch_size: expected at least 1, got {batch_size}; use e.g. 8")
    if adapters is not None and len(adapters) != len(recordings):
        raise SpeechError(
            f"adapters: expected one (or None) per recording ({len(recordings)}), got "
            f"{len(adapters)}; give as many as there are recordings"
        )
    unknown = {name for name in adapters or () if name} - set(model.adapters)
    if unknown:
        loaded = ", ".join(map(repr, model.adapters)) or "none"
        raise ModelError(
            f"adapter: expected one that is loaded ({loaded}), got "
            f"{', '.join(map(repr, sorted(unknown)))}; load it with --adapter NAME=FOLDER or "
            "load_for_serving"
        )
