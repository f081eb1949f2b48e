"""What the tests of OpenVINO and LiteRT share: adapters, tones, speech, and comparing with torch."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import soundfile
from tiny_whisper import make_adapter, tone

from lora_speech.audio import load_audio
from lora_speech.corpus import sentences
from lora_speech.export.check import Check, check_export
from lora_speech.export.run import ExportReport
from lora_speech.synthesis import SynthesisUnavailable, accent_speakers, synthesize


def make_adapters(base: Path, folder: Path) -> dict[str, Path]:
    """Two adapters of a tiny Whisper, of different ranks and of different linears."""
    return {
        "all": make_adapter(base, folder / "all", rank=3, seed=3),
        "some": make_adapter(base, folder / "some", rank=5, seed=4, targets=["q_proj", "fc2"]),
    }


def write_tones(folder: Path) -> list[Path]:
    """Recordings for a random model, which hears something in anything."""
    paths = []
    for frequency in (300.0, 1234.5):
        paths.append(folder / f"{frequency:.0f}.wav")
        soundfile.write(paths[-1], tone(1.5, frequency=frequency), 16_000)
    return paths


def spoken(count: int, seed: int) -> list[np.ndarray]:
    """Sentences that the shipped model was not trained on."""
    try:
        speakers = accent_speakers("en-us", count)
        texts = sentences(count, split="held_out", seed=seed)
        return [synthesize(text, who) for text, who in zip(texts, speakers, strict=True)]
    except SynthesisUnavailable as error:
        pytest.skip(str(error))


def real_digits(folder: Path, count: int) -> list[np.ndarray]:
    """Strings of three digits by people, a file each."""
    rng, files = random.Random(0), sorted((folder / "fsdd").glob("*.wav"))
    return [
        np.concatenate([load_audio(file) for file in rng.sample(files, 3)]) for _ in range(count)
    ]


def compare(report: ExportReport, recordings: list[np.ndarray]) -> Check:
    """The export, loaded again, against torch, on other recordings than it was made with."""
    names = [str(index) for index in range(len(recordings))]
    return check_export(report.plan, report.target.open(report.output), names, recordings)
