"""Adapting the shipped base to a real human speaker (slow; needs the recordings)."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from lora_speech.audio import load_audio
from lora_speech.errors import ModelError
from lora_speech.evaluation import evaluate
from lora_speech.manifest import Utterance
from lora_speech.models.loading import load_for_serving, shipped_model_path
from lora_speech.training import TrainingConfig, finetune

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


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


@pytest.mark.slow
def test_a_real_speaker_is_learnt(real_speech: Path, tmp_path: Path) -> None:
    try:
        base = shipped_model_path()
    except ModelError as error:
        pytest.skip(str(error))
    fsdd = real_speech / "fsdd"
    speaker = "jackson"
    # The data set's own convention: takes 0 to 4 are for testing.
    test = digit_strings(fsdd, speaker, range(5), 30, seed=1)
    held_out = digit_strings(fsdd, speaker, range(5, 10), 12, seed=2)
    train = digit_strings(fsdd, speaker, range(10, 50), 160, seed=3)
    before = evaluate(load_for_serving(base), test, normalization="basic").rates.wer
    config = TrainingConfig(steps=120, validate_every=40)
    finetune(base, train, held_out, tmp_path / "adapter", config)
    tuned = load_for_serving(base, {speaker: tmp_path / "adapter"}, int8=True)
    after = evaluate(tuned, test, adapter=speaker, normalization="basic").rates.wer
    assert after < 0.5 * before
