"""Word error rates of the base model on speech that it was not trained on, and its model card."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import jiwer
import numpy as np
import torch
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from lora_speech.synthetic import corpus, synthesis
from lora_speech.synthetic.synthesis import SAMPLING_RATE, Samples, Speaker

# Unlike any seed of the training data, which is drawn in another way anyway.
EVALUATION_SEED = 1000
NOISY_DB = 10.0


@dataclass(frozen=True)
class Report:
    """Word error rates, 0 to 1 (more with many insertions), all on held-out sentences.

    Attributes
    ----------
    english, spanish, digits : float
        By seen voices, clean; ``digits`` are English digit strings.
    english_noisy : float
        By seen voices, at NOISY_DB of signal to noise.
    accents, accents_noisy : dict of str to float
        English by each accent that was never heard, clean and at NOISY_DB.
    """

    english: float
    spanish: float
    digits: float
    english_noisy: float
    accents: dict[str, float]
    accents_noisy: dict[str, float]

    @property
    def seen(self) -> float:
        """Mean over the languages of the word error rate on seen voices."""
        return (self.english + self.spanish) / 2

    def __str__(self) -> str:
        accents = "  ".join(
            f"{name} {rate:.1%}/{self.accents_noisy[name]:.1%}"
            for name, rate in self.accents.items()
        )
        return (
            f"WER: en {self.english:.1%}/{self.english_noisy:.1%}  es {self.spanish:.1%}  "
            f"digits {self.digits:.1%}  unseen {accents} (clean/{NOISY_DB:.0f} dB)"
        )


def transcribe(
    whisper: WhisperForConditionalGeneration,
    processor: WhisperProcessor,
    utterances: list[Samples],
    *,
    language: str,
    batch_size: int = 48,
) -> list[str]:
    """Transcribe greedily with plain transformers.

    Parameters
    ----------
    whisper, processor
        A model in Hugging Face's layout.
    utterances : list of float32 array [samples]
        At 16 kHz, each shorter than the model's window.
    language : str
        Two letters.
    batch_size : int
        Utterances per call of ``generate``.
    """
    texts: list[str] = []
    for start in range(0, len(utterances), batch_size):
        features = processor(
            utterances[start : start + batch_size],
            sampling_rate=SAMPLING_RATE,
            return_tensors="pt",
        ).input_features
        with torch.inference_mode():
            tokens = whisper.generate(features, language=language, task="transcribe")
        texts.extend(processor.batch_decode(tokens, skip_special_tokens=True))
    return [text.strip() for text in texts]


def speak_all(
    texts: list[str],
    speakers: list[Speaker],
    *,
    snr_db: float | None = None,
    seed: int = EVALUATION_SEED,
) -> list[Samples]:
    """Speak texts by speakers in turn, with noise if asked, cut to the base model's window."""
    rng = np.random.default_rng(seed)
    waves = []
    for index, text in enumerate(texts):
        samples = synthesis.synthesize(text, speakers[index % len(speakers)])
        if snr_db is not None:
            samples = synthesis.add_noise(samples, snr_db, rng)
        waves.append(samples)
    return waves


def evaluate(
    whisper: WhisperForConditionalGeneration, processor: WhisperProcessor, *, count: int
) -> Report:
    """Measure word error rates with ``count`` English sentences, half of that for the rest.

    Parameters
    ----------
    whisper, processor
        A model in Hugging Face's layout; left in training mode if it was.
    count : int
        English sentences; halves of it for Spanish, digits and every accent.
    """
    training = whisper.training
    whisper.eval()

    def rate(said: list[str], speakers: list[Speaker], snr_db: float | None = None) -> float:
        waves = speak_all(said, speakers, snr_db=snr_db)
        heard = transcribe(whisper, processor, waves, language=speakers[0].language)
        return float(jiwer.wer(said, heard))

    def texts(number: int, language: str = "en") -> list[str]:
        return corpus.sentences(number, language=language, seed=EVALUATION_SEED, split="held_out")

    english, spanish = texts(count), texts(count // 2, "es")
    digits = corpus.digit_strings(count // 2, seed=EVALUATION_SEED, split="held_out")
    rng = np.random.default_rng(EVALUATION_SEED)
    voices = {
        language: [speakers[i] for i in rng.permutation(len(speakers))]
        for language in corpus.LANGUAGES
        for speakers in [synthesis.seen_speakers(EVALUATION_SEED, language=language)]
    }
    unseen = {
        accent: synthesis.accent_speakers(accent, count // 2, EVALUATION_SEED)
        for accent in synthesis.HELD_OUT_ACCENTS
    }
    half = english[: count // 2]
    report = Report(
        english=rate(english, voices["en"]),
        spanish=rate(spanish, voices["es"]),
        digits=rate(digits, voices["en"]),
        english_noisy=rate(half, voices["en"], NOISY_DB),
        accents={name: rate(half, speakers) for name, speakers in unseen.items()},
        accents_noisy={name: rate(half, speakers, NOISY_DB) for name, speakers in unseen.items()},
    )
    whisper.train(training)
    return report


_CARD = """---
license: apache-2.0
language: [en, es]
library_name: transformers
pipeline_tag: automatic-speech-recognition
---

# A small Whisper for tests and demonstrations

A Whisper of {millions:.2f} million parameters ({encoder_layers} encoder layers and
{decoder_layers} decoder layers of width {width}, windows of 5 s), trained from nothing on
synthetic speech alone. It knows small vocabularies of numbers, times, commands and names, and is
meant for showing and testing what an adapter changes; it is no use as a general recogniser.

## Data

Every utterance was spoken by espeak-ng while training, with random rates, pitches, rooms,
microphones, gains and noise. No recording of a person was used.

- English, {english_words} words, and Spanish, {spanish_words} words: grammars of
  `lora_speech.synthetic.grammars`.
- Accents (espeak-ng voices): {accents}, each in {variants} variants.
- Never heard: the accents {unseen}, and one sentence in ten of each grammar.

The prompts are Whisper's: a language token, `<|transcribe|>`, and `<|notimestamps|>` or timestamps.
Speech may start anywhere in the window; windows without speech are labelled `<|nospeech|>`.

## Word error rates

Held-out sentences, greedy search; speakers drawn at other rates and pitches than in training.

| speech | WER |
|---|---|
{rows}

## How it was made

```
python -m lora_speech.pretraining --output DIR {options}
```

{steps} steps in {minutes:.0f} minutes on two CPU cores, of which other work took a share.
"""


def write_model_card(
    path: Path,
    whisper: WhisperForConditionalGeneration,
    report: Report,
    recipe: dict[str, float | int],
    seconds: float,
) -> None:
    """Write the README.md of the model's folder.

    Parameters
    ----------
    path : Path
        File to write.
    whisper : WhisperForConditionalGeneration
        The model described.
    report : Report
        Its word error rates.
    recipe : dict
        What it was trained by.
    seconds : float
        How long that took.
    """
    noisy = f"noise at {NOISY_DB:.0f} dB"
    rates = [
        ("English, seen accents", report.english),
        (f"English, seen accents, {noisy}", report.english_noisy),
        ("English digit strings, seen accents", report.digits),
        ("Spanish, seen accents", report.spanish),
        *((f"English, `{name}`, never heard", rate) for name, rate in report.accents.items()),
        *(
            (f"English, `{name}`, never heard, {noisy}", rate)
            for name, rate in report.accents_noisy.items()
        ),
    ]
    named = ("steps", "batch_size", "learning_rate", "encoder_layers", "decoder_layers", "seed")
    card = _CARD.format(
        millions=sum(p.numel() for p in whisper.parameters()) / 1e6,
        encoder_layers=recipe["encoder_layers"],
        decoder_layers=recipe["decoder_layers"],
        width=recipe["width"],
        english_words=len(corpus.VOCABULARY["en"]),
        spanish_words=len(corpus.VOCABULARY["es"]),
        accents=", ".join(f"`{accent}`" for accent in synthesis.SEEN_ACCENTS),
        variants=len(synthesis.VARIANTS),
        unseen=", ".join(f"`{accent}`" for accent in synthesis.HELD_OUT_ACCENTS),
        rows="\n".join(f"| {name} | {rate:.1%} |" for name, rate in rates),
        options=" ".join(f"--{name.replace('_', '-')} {recipe[name]}" for name in named),
        steps=recipe["steps"],
        minutes=seconds / 60,
    )
    path.write_text(card, encoding="utf-8")
