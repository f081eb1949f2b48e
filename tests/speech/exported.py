"""What tests of exports share: adapters, tones, speech, comparing with torch."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import soundfile
from tiny_whisper import make_adapter, tone

from lora_speech.data.audio import load_audio
from lora_speech.export.check import Check, check_export
from lora_speech.export.run import ExportReport
from lora_speech.synthetic.corpus import DIGITS, sentences
from lora_speech.synthetic.synthesis import SynthesisUnavailable, accent_speakers, synthesize


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


def real_digits(folder: Path, count: int) -> tuple[list[np.ndarray], list[str]]:
    """Strings of four digits, each string by one person, with short pauses; and what they say."""
    rng, pause = random.Random(0), np.zeros(2400, np.float32)
    people = sorted({file.stem.split("_")[1] for file in (folder / "fsdd").glob("*.wav")})
    strings, texts = [], []
    for index in range(count):
        parts = [pause]
        digits = [rng.randrange(10) for _ in range(4)]
        for digit in digits:
            name = f"{digit}_{people[index % len(people)]}_{rng.randrange(10)}.wav"
            parts += [load_audio(folder / "fsdd" / name), pause]
        strings.append(np.concatenate(parts))
        texts.append(" ".join(DIGITS["en"][digit] for digit in digits))
    return strings, texts


def compare(report: ExportReport, recordings: list[np.ndarray]) -> Check:
    """The export, loaded again, against torch, on other recordings than it was made with."""
    names = [str(index) for index in range(len(recordings))]
    return check_export(report.plan, report.target.open(report.output), names, recordings)
