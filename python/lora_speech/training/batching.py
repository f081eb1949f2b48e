"""Training examples, their order and their augmentation, all functions of a seed.

The order of epoch e depends on (seed, e) and the label lengths alone, and the augmentation of step
t on (seed, t): a run that was killed continues with exactly the batches it would have seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lora_speech.data.features import extract_features
from lora_speech.data.manifest import Utterance
from lora_speech.decoding.prompts import special_tokens, training_tokens
from lora_speech.errors import TrainingError
from lora_speech.models.loading import SpeechModel

POOL_BATCHES = 16
"""Batches per pool in which examples are sorted by length: enough that lengths within a batch
are close, few enough that the order stays random."""

CACHE_BYTES = 1 << 30
"""Features kept in memory; the rest is computed again when needed."""


@dataclass(frozen=True)
class Example:
    """One utterance ready to train on."""

    utterance: Utterance
    decoder_input: tuple[int, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True)
class Batch:
    """Tensors of one step: features [batch, ...], tokens int64 [batch, positions]."""

    features: torch.Tensor
    decoder_input: torch.Tensor
    labels: torch.Tensor


class ExampleStore:
    """All examples of a run.

    Parameters
    ----------
    speech_model : SpeechModel
        Whose tokenizer and features to use.
    utterances : sequence of Utterance
        Those longer than the model's window, or with more tokens than its decoder has positions,
        are left out and listed in `skipped`.
    language : str, optional
        Of utterances without their own.
    progress : callable, optional
        Called with utterances prepared and in all.
    """

    def __init__(
        self,
        speech_model: SpeechModel,
        utterances: Sequence[Utterance],
        language: str | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.speech_model = speech_model
        self.examples: list[Example] = []
        self.skipped: list[str] = []
        self._cache: dict[int, torch.Tensor] = {}
        self._cached_bytes = 0
        tokens = special_tokens(speech_model.model)
        rate, window = speech_model.sampling_rate, speech_model.window_seconds
        for number, utterance in enumerate(utterances):
            samples = utterance.samples(rate)
            decoder_input, labels = training_tokens(
                speech_model.processor.tokenizer,
                tokens,
                utterance.text,
                utterance.language or language,
            )
            name = utterance.name or f"utterance {number}"
            if window is not None and len(samples) > window * rate:
                self.skipped.append(f"{name} ({len(samples) / rate:.1f} s of {window:g} s)")
            elif len(labels) > tokens.max_positions:
                self.skipped.append(f"{name} ({len(labels)} of {tokens.max_positions} tokens)")
            else:
                self._keep(len(self.examples), self._extract(samples))
                self.examples.append(Example(utterance, tuple(decoder_input), tuple(labels)))
            if progress is not None:
                progress(number + 1, len(utterances))
        if not self.examples:
            raise TrainingError(
                "train: expected at least one utterance that fits the model, all "
                f"{len(self.skipped)} are too long ({'; '.join(self.skipped[:3])}); cut them into "
                "shorter utterances"
            )

    @property
    def lengths(self) -> list[int]:
        """Label tokens of each example."""
        return [len(example.labels) for example in self.examples]

    @property
    def fingerprint(self) -> str:
        """Hash of names and labels, to tell whether a run is resumed on the same data."""
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(f"{example.utterance.name}\0{example.labels}\0".encode())
        return digest.hexdigest()[:16]

    def collate(self, indices: Sequence[int]) -> Batch:
        """Make the batch of some examples, labels padded with -100."""
        chosen = [self.examples[index] for index in indices]
        longest = max(len(example.labels) for example in chosen)
        decoder_input = torch.zeros(len(chosen), longest, dtype=torch.int64)
        labels = torch.full((len(chosen), longest), -100, dtype=torch.int64)
        for row, example in enumerate(chosen):
            # Padding after the end is never attended by earlier positions, nor scored.
            decoder_input[row, : len(example.decoder_input)] = torch.tensor(example.decoder_input)
            labels[row, : len(example.labels)] = torch.tensor(example.labels)
        return Batch(torch.stack([self.features(i) for i in indices]), decoder_input, labels)

    def features(self, index: int) -> torch.Tensor:
        """Features of one example, [mel bands, frames]."""
        if index in self._cache:
            return self._cache[index]
        samples = self.examples[index].utterance.samples(self.speech_model.sampling_rate)
        return self._keep(index, self._extract(samples))

    def _extract(self, samples: Any) -> torch.Tensor:
        name = self.speech_model.family.features.input_name
        return extract_features(self.speech_model, [samples])[name][0]

    def _keep(self, index: int, features: torch.Tensor) -> torch.Tensor:
        size = features.numel() * features.element_size()
        if self._cached_bytes + size <= CACHE_BYTES:
            self._cache[index] = features
            self._cached_bytes += size
        return features


def epoch_batches(
    lengths: Sequence[int], batch_size: int, seed: int, epoch: int
) -> list[list[int]]:
    """Order one epoch: batches of examples of similar length, in random order.

    Parameters
    ----------
    lengths : sequence of int
        Label tokens per example.
    batch_size : int
        Examples per batch; the epoch's last may be smaller.
    seed, epoch : int
        What the order depends on.

    Returns
    -------
    list of list of int
        Every index exactly once.
    """
    generator = torch.Generator().manual_seed(hash_seed(seed, epoch, "order"))
    order = torch.randperm(len(lengths), generator=generator).tolist()
    pool = batch_size * POOL_BATCHES
    batches = []
    for at in range(0, len(order), pool):
        near = sorted(order[at : at + pool], key=lambda index: lengths[index])
        batches += [near[i : i + batch_size] for i in range(0, len(near), batch_size)]
    shuffled = torch.randperm(len(batches), generator=generator).tolist()
    return [batches[index] for index in shuffled]


def spec_augment(
    features: torch.Tensor,
    generator: torch.Generator,
    *,
    frequency_masks: int = 2,
    widest_frequency: int = 12,
    time_masks: int = 2,
    widest_time: float = 0.06,
) -> torch.Tensor:
    """Mask random bands and stretches of time (SpecAugment, arXiv:1904.08779, without warping).

    Parameters
    ----------
    features : Tensor
        [batch, mel bands, frames]; not changed.
    generator : torch.Generator
        Source of the masks.
    frequency_masks, time_masks : int
        Masks per example.
    widest_frequency : int
        Bands at most per mask.
    widest_time : float
        Share of the frames at most per mask.

    Returns
    -------
    Tensor
        Like `features`, masked with each example's mean.
    """
    batch, bands, frames = features.shape
    result = features.clone()
    mean = features.mean(dim=(1, 2), keepdim=True)
    for count, size, widest, axis in (
        (frequency_masks, bands, min(widest_frequency, bands), 1),
        (time_masks, frames, max(1, int(widest_time * frames)), 2),
    ):
        positions = torch.arange(size)
        shape = [batch, 1, 1]
        shape[axis] = size
        for _ in range(count):
            draw = torch.rand(2, batch, 1, generator=generator)
            width = (draw[0] * (widest + 1)).floor()
            start = (draw[1] * (size - width + 1)).floor()
            mask = (positions >= start) & (positions < start + width)
            result = torch.where(mask.view(shape), mean, result)
    return result


def hash_seed(*parts: int | str) -> int:
    """Derive an independent seed from a few values, the same on every machine."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
