"""Batches for pretraining the base model: made up, spoken, spoilt and turned into features.

Nothing is stored: espeak-ng speaks about a thousand times faster than real time, so every batch
is fresh, and one process beside the trainer keeps up with it.
"""

from __future__ import annotations

import math
import multiprocessing
import random
from collections.abc import Iterator
from dataclasses import dataclass
from queue import Empty, Full
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import WhisperFeatureExtractor, WhisperTokenizer

from lora_speech import corpus, synthesis
from lora_speech.synthesis import SAMPLING_RATE, Samples, Speaker

HOP = 160  # samples between feature frames: 10 ms
FRAMES_PER_POSITION = 2  # the encoder's second convolution halves the rate
TIMESTAMP_SECONDS = 0.02
IGNORED = -100  # a label that no loss looks at

# Targets of the CTC loss: 0 is the blank.
CHARACTERS = " 'abcdefghijklmnopqrstuvwxyzáéíñóúü"
_CHARACTER_IDS = {character: index + 1 for index, character in enumerate(CHARACTERS)}

# Windows in seconds. Short ones teach the same sounds for less work.
WINDOWS = (1.5, 2.0, 2.5, 3.5, 5.0)
_MARGIN = 0.1  # seconds of every window without speech, so that its end can be heard

# At 170 words per minute.
_SECONDS_PER_CHARACTER = 0.062

_SPANISH = 0.25
_TIMESTAMPS = 0.25
_NO_SPEECH = 0.015

# Noise is cut from long stretches made once: making it anew would cost as much as the speech.
_NOISE_SAMPLES = 20 * SAMPLING_RATE
_NOISE_COLOURS = 24
_SNR_DB = (3.0, 35.0)


@dataclass
class Batch:
    """One training batch.

    Attributes
    ----------
    features : float32 tensor [batch, mels, frames]
        Log-mel features as the feature extractor makes them.
    tokens : int64 tensor [batch, length]
        Decoder inputs, from <|startoftranscript|>.
    labels : int64 tensor [batch, length]
        The tokens one step later; IGNORED where padded.
    characters : int64 tensor [sum of character_lengths]
        CTC targets of all utterances, end to end.
    character_lengths : int64 tensor [batch]
        CTC targets of each utterance.
    """

    features: torch.Tensor
    tokens: torch.Tensor
    labels: torch.Tensor
    characters: torch.Tensor
    character_lengths: torch.Tensor


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


def window_seconds(step: int, steps: int, rng: random.Random) -> float:
    """Draw the window of a batch: short first, mostly the model's own in the end.

    The decoder finds its alignment on short utterances in a fraction of the steps it needs on long
    ones, and every step on them costs a third.

    Parameters
    ----------
    step, steps : int
        Steps done, and steps in all.
    rng : random.Random
        Draws the window.
    """
    if step < 480:
        return WINDOWS[0]
    if step < 1200:
        return rng.choice(WINDOWS[:3])
    if step < 0.8 * steps:
        return rng.choice(WINDOWS[1:])
    return rng.choice((*WINDOWS[2:], WINDOWS[-1], WINDOWS[-1]))


def token_id(tokenizer: WhisperTokenizer, token: str) -> int:
    """Number of one token that the tokenizer has."""
    number = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(number, int)
    return number


class BatchMaker:
    """Makes batch after batch from one seed.

    Parameters
    ----------
    tokenizer, extractor
        Those that the model ships with.
    batch_size : int
        Utterances in a full-length window; shorter windows take more, for the same work.
    seed : int
        The same seed gives the same batches in a new process.
    """

    def __init__(
        self,
        tokenizer: WhisperTokenizer,
        extractor: WhisperFeatureExtractor,
        *,
        batch_size: int,
        seed: int,
    ) -> None:
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.seed = seed
        noise = np.random.default_rng((seed, 0))
        self._noises = [
            synthesis.coloured_noise(_NOISE_SAMPLES, noise) for _ in range(_NOISE_COLOURS)
        ]
        self._filters = torch.tensor(np.asarray(extractor.mel_filters).T, dtype=torch.float32)
        self._fft_size = int(extractor.n_fft)
        self._hann = torch.hann_window(self._fft_size)
        self._ids = {
            token: token_id(tokenizer, token)
            for token in (
                *("<|startoftranscript|>", "<|transcribe|>", "<|notimestamps|>", "<|nospeech|>"),
                *("<|endoftext|>", "<|0.00|>", *(f"<|{name}|>" for name in corpus.LANGUAGES)),
            )
        }

    def make(self, index: int, steps: int) -> Batch:
        """Make the batch of step ``index`` in a training of ``steps``."""
        rng = random.Random(f"{self.seed}/{index}")
        noise = np.random.default_rng((self.seed, index))
        window = window_seconds(index, steps, rng)
        count = min(int(self.batch_size * WINDOWS[-1] / window), 2 * self.batch_size)
        utterances = [self._utterance(window, rng) for _ in range(count)]
        waves = np.stack([self._spoil(utterance, noise) for utterance in utterances])
        features = self._features(torch.from_numpy(waves), noise)
        texts = [" ".join(part.text for part in item.segments) for item in utterances]
        characters = [[_CHARACTER_IDS[letter] for letter in text] for text in texts]
        tokens, labels = self._targets(utterances, rng)
        return Batch(
            features=features,
            tokens=tokens,
            labels=labels,
            characters=torch.tensor([letter for row in characters for letter in row]),
            character_lengths=torch.tensor([len(row) for row in characters]),
        )

    def _utterance(self, window: float, rng: random.Random) -> Utterance:
        """Draw an utterance that fits into a window, and its place there."""
        total = round(window * SAMPLING_RATE)
        if rng.random() < _NO_SPEECH:
            return Utterance(np.zeros(total, np.float32), [], rng.choice(corpus.LANGUAGES))
        language = "es" if rng.random() < _SPANISH else "en"
        room = total - round(_MARGIN * SAMPLING_RATE)
        parts = self._parts(language, room, rng)
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

    def _parts(
        self, language: str, room: int, rng: random.Random
    ) -> list[tuple[Samples, str, int]]:
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

    def _noise(self, count: int, rng: np.random.Generator) -> Samples:
        noise = self._noises[rng.integers(len(self._noises))]
        start = int(rng.integers(noise.size - count))
        return noise[start : start + count]

    def _spoil(self, utterance: Utterance, rng: np.random.Generator) -> Samples:
        """Add a room, noise and a gain."""
        samples = utterance.samples
        if not utterance.segments:
            level = 10.0 ** rng.uniform(-4.0, -0.5) if rng.random() < 0.8 else 0.0
            return self._noise(samples.size, rng) * np.float32(level)
        if rng.random() < 0.3:
            samples = synthesis.reverberate(samples, rng, decay=rng.uniform(0.1, 0.5))
        if rng.random() < 0.7:
            # Over the whole window, or only where a recording would have been cut.
            first, last = 0, samples.size
            spoken = slice(
                int(utterance.segments[0].start * SAMPLING_RATE),
                int(utterance.segments[-1].end * SAMPLING_RATE),
            )
            if rng.random() < 0.4:
                first, last = spoken.start, spoken.stop
            # The ratio is that of the speech, without the silence around it.
            level = np.sqrt(np.mean(np.square(samples[spoken]))) * 10.0 ** (
                -rng.uniform(*_SNR_DB) / 20.0
            )
            samples = samples.copy()
            samples[first:last] += self._noise(last - first, rng) * np.float32(level)
        gain = 10.0 ** rng.uniform(-1.3, 0.0) / (np.abs(samples).max() + 1e-9)
        return samples * np.float32(gain)

    def _features(self, waves: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        """Log-mel features, equalised at random: WhisperFeatureExtractor's own formula."""
        spectrum = torch.stft(waves, self._fft_size, HOP, window=self._hann, return_complex=True)
        # Not abs().square(): the root would be as slow as the whole transform.
        power = torch.view_as_real(spectrum[..., :-1]).square().sum(-1)
        mels = self._filters @ power
        mels = mels * torch.from_numpy(_equalisers(mels.shape[0], mels.shape[1], rng))
        logs = mels.clamp(min=1e-10).log10()
        logs = torch.maximum(logs, logs.amax(dim=(1, 2), keepdim=True) - 8.0)
        features = (logs + 4.0) / 4.0
        for row in features:
            _mask(row, rng)
        return features

    def _targets(
        self, utterances: list[Utterance], rng: random.Random
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Decoder inputs and labels, with timestamps for some utterances."""
        rows: list[list[int]] = []
        for utterance in utterances:
            ids = self._ids
            row = [ids["<|startoftranscript|>"], ids[f"<|{utterance.language}|>"]]
            row.append(ids["<|transcribe|>"])
            if utterance.segments and rng.random() < _TIMESTAMPS:
                for segment in utterance.segments:
                    row.append(ids["<|0.00|>"] + round(segment.start / TIMESTAMP_SECONDS))
                    row.extend(self._encode(segment.text))
                    row.append(ids["<|0.00|>"] + round(segment.end / TIMESTAMP_SECONDS))
            else:
                row.append(ids["<|notimestamps|>"])
                row.extend(self._encode(" ".join(part.text for part in utterance.segments)))
            rows.append([*row, ids["<|endoftext|>"]])
        # Lengths in steps of 8 keep the number of distinct shapes small.
        length = math.ceil((max(map(len, rows)) - 1) / 8) * 8
        tokens = torch.full((len(rows), length), self._ids["<|endoftext|>"])
        labels = torch.full((len(rows), length), IGNORED)
        for place, (row, utterance) in enumerate(zip(rows, utterances, strict=True)):
            tokens[place, : len(row) - 1] = torch.tensor(row[:-1])
            labels[place, : len(row) - 1] = torch.tensor(row[1:])
            if not utterance.segments:
                # Nobody can tell the language of silence.
                labels[place, 0] = self._ids["<|nospeech|>"]
                labels[place, 1:3] = IGNORED
        return tokens, labels

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids


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


def _equalisers(batch: int, mels: int, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """Random microphones: a smooth gain per mel band, sometimes with a telephone's low pass."""
    knots = np.linspace(0, mels - 1, 6)
    decibels = np.zeros((batch, mels, 1), np.float32)
    for row in decibels:
        if rng.random() < 0.6:
            row[:, 0] = np.interp(np.arange(mels), knots, rng.normal(0.0, 4.0, knots.size))
        if rng.random() < 0.15:
            # Whisper's band 62 of 80 ends at about 4 kHz.
            row[round(mels * rng.uniform(0.7, 0.8)) :] -= rng.uniform(20.0, 60.0)
    return np.power(np.float32(10.0), decibels / np.float32(10.0))


def _mask(features: torch.Tensor, rng: np.random.Generator) -> None:
    """SpecAugment, lightly: hide a few bands and a few frames of [mels, frames] in place."""
    floor = float(features.min())
    if rng.random() < 0.5:
        width = int(rng.integers(1, 10))
        start = int(rng.integers(0, features.shape[0] - width))
        features[start : start + width] = floor
    if rng.random() < 0.4:
        width = int(rng.integers(1, 9))
        start = int(rng.integers(0, features.shape[1] - width))
        features[:, start : start + width] = floor


def _produce(queue: Any, maker: BatchMaker, first: int, steps: int) -> None:
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    for index in range(first, steps):
        batch = maker.make(index, steps)
        arrays = {name: value.numpy() for name, value in vars(batch).items()}
        arrays["features"] = arrays["features"].astype(np.float16)
        while not _put(queue, arrays):
            # A trainer that was killed cannot end this process, so it looks for itself.
            if parent is None or not parent.is_alive():
                return


def _put(queue: Any, arrays: dict[str, npt.NDArray[Any]]) -> bool:
    try:
        queue.put(arrays, timeout=5.0)
    except Full:
        return False
    return True


def batches(maker: BatchMaker, first: int, steps: int, *, ahead: int = 24) -> Iterator[Batch]:
    """Yield the batches of steps ``first`` to ``steps - 1``, made by one process ahead of time."""
    context = multiprocessing.get_context("spawn")
    queue: Any = context.Queue(maxsize=ahead)
    process = context.Process(target=_produce, args=(queue, maker, first, steps), daemon=True)
    process.start()
    try:
        for _ in range(first, steps):
            arrays = _next(queue, process)
            tensors = {name: torch.from_numpy(value) for name, value in arrays.items()}
            tensors["features"] = tensors["features"].float()
            yield Batch(**tensors)
    finally:
        process.terminate()
        process.join()


def _next(queue: Any, process: Any) -> dict[str, npt.NDArray[Any]]:
    """Wait for a batch, but not for a dead process."""
    while True:
        try:
            arrays: dict[str, npt.NDArray[Any]] = queue.get(timeout=5.0)
            return arrays
        except Empty:
            if not process.is_alive():
                raise RuntimeError(
                    f"the process that makes the batches ended with code {process.exitcode}; its "
                    "own message is above; run the same command again to go on"
                ) from None
