"""Batches for pretraining the base model: speech is spoilt and turned into features and targets.

Nothing is stored: espeak-ng speaks about a thousand times faster than real time, so every batch
is fresh, and one process beside the trainer keeps up with it.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from queue import Empty
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import WhisperFeatureExtractor, WhisperTokenizer

from lora_speech.pretraining.speech import Utterance, random_utterance
from lora_speech.synthetic import corpus, synthesis
from lora_speech.synthetic.synthesis import SAMPLING_RATE, Samples

HOP = 160  # samples between feature frames: 10 ms
FRAMES_PER_POSITION = 2  # the encoder's second convolution halves the rate
TIMESTAMP_SECONDS = 0.02
IGNORED = -100  # a label that no loss looks at

# Targets of the CTC loss: 0 is the blank.
CHARACTERS = " 'abcdefghijklmnopqrstuvwxyzáéíñóúü"
_CHARACTER_IDS = {character: index + 1 for index, character in enumerate(CHARACTERS)}

# Windows in seconds. Short ones teach the same sounds for less work.
WINDOWS = (1.5, 2.0, 2.5, 3.5, 5.0)

_TIMESTAMPS = 0.25  # share of the utterances

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
        utterances = [random_utterance(window, rng) for _ in range(count)]
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
    threading.Thread(target=_end_with_trainer, daemon=True).start()
    for index in range(first, steps):
        batch = maker.make(index, steps)
        arrays = {name: value.numpy() for name, value in vars(batch).items()}
        arrays["features"] = arrays["features"].astype(np.float16)
        queue.put(arrays)


def _end_with_trainer() -> None:
    """A trainer that was killed cannot end this process, which waits for room in the queue."""
    trainer = multiprocessing.parent_process()
    if trainer is not None:
        trainer.join()
        os._exit(1)  # whatever the other thread does: it may never come back


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
