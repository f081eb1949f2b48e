"""Utterances for pretraining the base model: made up, spoken, and placed in a window of silence."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from lora_speech.synthetic import corpus, synthesis
from lora_speech.synthetic.synthesis import SAMPLING_RATE, Samples, Speaker

# Shares of the utterances.
_SPANISH = 0.25
_NO_SPEECH = 0.015

_MARGIN = 0.1  # seconds of every window without speech, so that its end can be heard

# At 170 words per minute.
_SECONDS_PER_CHARACTER = 0.062


@dataclass
class Segment:
    """A stretch of speech: seconds from the window's start, and its words."""

    start: float
    end: float
    text: str


@dataclass
class Utterance:
    """Dry speech in a window of silence; no segments means that nobody speaks."""

    samples: Samples
    segments: list[Segment]
    language: str


def random_utterance(window: float, rng: random.Random) -> Utterance:
    """Draw an utterance that fits into a window, and its place there.

    Parameters
    ----------
    window : float
        Seconds.
    rng : random.Random
        Draws everything: language, speaker, words, pauses.
    """
    total = round(window * SAMPLING_RATE)
    if rng.random() < _NO_SPEECH:
        return Utterance(np.zeros(total, np.float32), [], rng.choice(corpus.LANGUAGES))
    language = "es" if rng.random() < _SPANISH else "en"
    room = total - round(_MARGIN * SAMPLING_RATE)
    parts = _parts(language, room, rng)
    slack = room - sum(len(samples) + pause for samples, _, pause in parts)
    lead = rng.randint(0, min(slack, SAMPLING_RATE)) if rng.random() < 0.8 else 0
    samples = np.zeros(total, np.float32)
    segments = []
    for spoken, text, pause in parts:
        lead += pause
        samples[lead : lead + len(spoken)] = spoken
        end = lead + len(spoken)
        segments.append(Segment(lead / SAMPLING_RATE, end / SAMPLING_RATE, text))
        lead = end
    return Utterance(samples, segments, language)


def _parts(language: str, room: int, rng: random.Random) -> list[tuple[Samples, str, int]]:
    """Draw one sentence, or two with a pause: (samples, text, samples of silence before)."""
    first = None
    while first is None:
        first = _speak(language, room, rng)
    parts = [(*first, 0)]
    pause = rng.randint(SAMPLING_RATE // 5, SAMPLING_RATE)
    left = room - len(first[0]) - pause
    if left > SAMPLING_RATE and rng.random() < 0.35:
        second = _speak(language, left, rng)
        if second is not None:
            parts.append((*second, pause))
    return parts


def _speak(language: str, room: int, rng: random.Random) -> tuple[Samples, str] | None:
    """Have a drawn seen speaker say a drawn text; None if that is longer than ``room`` samples."""
    accent = rng.choice([a for a in synthesis.SEEN_ACCENTS if a.split("-")[0] == language])
    speaker = synthesis.random_speaker(accent, rng)
    kind = rng.random()
    if kind < 0.12:
        return _spaced_digits(language, speaker, room, rng)
    if kind < 0.22:
        digits = rng.choices(corpus.DIGITS[language], k=rng.randint(1, 7))
        text = " ".join(digits)
    elif kind < 0.27:
        text = rng.choice(sorted(corpus.VOCABULARY[language]))
    else:
        text = next(corpus.sentence_stream(rng, language=language))
    # Synthesis is what costs here, so what is clearly too long is not spoken.
    expected = len(text) * _SECONDS_PER_CHARACTER * 170 / speaker.rate * SAMPLING_RATE
    if corpus.split_of(text) != "train" or expected > 1.25 * room:
        return None
    samples = _varied(synthesis.synthesize(text, speaker), rng)
    return (samples, text) if len(samples) <= room else None


def _spaced_digits(
    language: str, speaker: Speaker, room: int, rng: random.Random
) -> tuple[Samples, str] | None:
    """Digits spoken one by one with short silences between them."""
    most = max(1, min(6, int(room / SAMPLING_RATE / 0.45)))
    digits = rng.choices(corpus.DIGITS[language], k=rng.randint(1, most))
    if corpus.split_of(" ".join(digits)) != "train":
        return None
    longest = rng.choice((0.05, 0.2, 0.4)) * SAMPLING_RATE
    parts: list[Samples] = []
    for digit in digits:
        if parts:
            parts.append(np.zeros(int(rng.uniform(0.0, longest)), np.float32))
        parts.append(_varied(synthesis.synthesize(digit, speaker), rng))
    samples = np.concatenate(parts)
    return (samples, " ".join(digits)) if len(samples) <= room else None


def _varied(samples: Samples, rng: random.Random) -> Samples:
    """Play a little faster or slower, which moves the formants: another vocal tract's length."""
    if rng.random() < 0.5:
        return samples
    positions = np.arange(0, len(samples) - 1, rng.uniform(0.88, 1.14))
    return np.interp(positions, np.arange(len(samples)), samples).astype(np.float32)
