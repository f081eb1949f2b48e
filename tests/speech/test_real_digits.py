"""Adapting the shipped base to real human speakers (slow; needs the recordings)."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from lora_speech.data.audio import load_audio
from lora_speech.data.manifest import Utterance
from lora_speech.errors import ModelError
from lora_speech.evaluation import ErrorRates, evaluate
from lora_speech.models.loading import load_for_serving, shipped_model_path
from lora_speech.training.finetune import TrainingConfig, finetune

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
SPEAKERS = ("george", "jackson", "lucas")


def digit_strings(folder: Path, speaker: str, takes: range, count: int, seed: int) -> list:
    """Strings of three to five digits by one speaker, with short pauses between them."""
    rng = random.Random(seed)
    utterances = []
    for number in range(count):
        digits = [rng.randrange(10) for _ in range(rng.randint(3, 5))]
        parts = [np.zeros(1600, dtype=np.float32)]
        for digit in digits:
            take = rng.choice(takes)
            parts.append(load_audio(folder / f"{digit}_{speaker}_{take}.wav"))
            parts.append(np.zeros(rng.randint(1600, 3200), dtype=np.float32))
        utterances.append(
            Utterance(
                np.concatenate(parts),
                " ".join(DIGITS[digit] for digit in digits),
                sampling_rate=16_000,
                name=f"{speaker}-{seed}-{number}",
            )
        )
    return utterances


@dataclass(frozen=True)
class Speaker:
    """What one speaker's test strings and adapter came to."""

    base: ErrorRates
    adapted: ErrorRates
    int8: ErrorRates


@pytest.fixture(scope="module")
def speakers(real_speech: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Speaker]:
    """Each speaker's own adapter of the shipped base, in fp32 and on INT8."""
    try:
        shipped_model_path()
    except ModelError as error:
        pytest.skip(str(error))
    fsdd = real_speech / "fsdd"
    found = {}
    for name in SPEAKERS:
        # The data set's own convention: takes 0 to 4 are for testing.
        test = digit_strings(fsdd, name, range(5), 300, seed=1)
        held_out = digit_strings(fsdd, name, range(5, 10), 12, seed=2)
        train = digit_strings(fsdd, name, range(10, 50), 160, seed=3)
        folder = tmp_path_factory.mktemp(name) / "adapter"
        finetune("shipped", train, held_out, folder, TrainingConfig(steps=40, validate_every=40))
        plain = load_for_serving("shipped", {name: folder})
        int8 = load_for_serving("shipped", {name: folder}, int8=True)
        found[name] = Speaker(
            evaluate(load_for_serving("shipped"), test, normalization="basic").rates,
            evaluate(plain, test, adapter=name, normalization="basic").rates,
            evaluate(int8, test, adapter=name, normalization="basic").rates,
        )
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", SPEAKERS)
def test_a_real_speaker_is_learnt(speakers: dict[str, Speaker], name: str) -> None:
    assert speakers[name].int8.wer < 0.25 * speakers[name].base.wer


@pytest.mark.slow
def test_int8_costs_at_most_three_words_in_a_thousand(speakers: dict[str, Speaker]) -> None:
    words = sum(speaker.adapted.words for speaker in speakers.values())
    assert words > 3000
    more = sum(speaker.int8.errors - speaker.adapted.errors for speaker in speakers.values())
    assert more <= 0.003 * words
