"""The whole story in a few minutes: adapt, quantize, mix adapters in a batch, measure the speed.

All speech is synthesised here, so the demonstration needs no data and no connection. The base
model has never heard the two accents; noise is added on top.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lora_speech.data.features import extract_features
from lora_speech.data.manifest import Utterance
from lora_speech.decoding.greedy import greedy_decode
from lora_speech.demo.speed import measure_speed, within_window
from lora_speech.errors import MissingExtraError, ModelError
from lora_speech.evaluation import Evaluation, evaluate
from lora_speech.files import write_json, write_text
from lora_speech.models.loading import SHIPPED, SpeechModel, load_base, load_for_serving
from lora_speech.training.config import TrainingConfig, TrainingEvent, TrainingResult
from lora_speech.training.finetune import finetune

NORMALIZATION = "basic"
"""Case and punctuation only: the corpus writes numbers as words, and they count word by word."""


@dataclass(frozen=True)
class DemoSettings:
    """Sizes of the demonstration; the defaults take a few minutes on two cores.

    Attributes
    ----------
    train, validation, test : int
        Utterances per accent.
    steps, second_steps : int
        Training steps of the first and the second adapter.
    batch_size, rank, learning_rate
        Of the training.
    noise_db : (float, float)
        Range of the signal-to-noise ratio, in dB.
    speed_rounds : int
        Decodings per contestant, alternating.
    seed : int
        Of everything.
    """

    train: int = 640
    validation: int = 24
    test: int = 60
    steps: int = 350
    second_steps: int = 100
    batch_size: int = 8
    rank: int = 16
    learning_rate: float = 1.5e-3
    noise_db: tuple[float, float] = (10.0, 25.0)
    speed_rounds: int = 9
    seed: int = 0


class DemoProgress:
    """What `run_demo` tells about itself; this one says nothing. See `cli` for one that does."""

    def stage(self, title: str) -> None:
        """A new stage begins."""

    def counter(self, title: str) -> Callable[[int, int], None]:
        """Give a function that is told how much of a stage is done."""
        return lambda done, total: None

    def training(self, title: str) -> Callable[[TrainingEvent], None]:
        """Give a function that is told of training steps."""
        return lambda event: None


def run_demo(
    base: str | os.PathLike[str] = SHIPPED,
    output: str | os.PathLike[str] = ".",
    settings: DemoSettings | None = None,
    progress: DemoProgress | None = None,
) -> dict[str, Any]:
    """Run the demonstration.

    Parameters
    ----------
    base : str or path
        `"shipped"`, a local folder or a hub name of a Whisper.
    output : path
        Folder for `demo_report.json` and `demo_report.html`.
    settings : DemoSettings, optional
        Sizes.
    progress : DemoProgress, optional
        Told what goes on.

    Returns
    -------
    dict
        What `demo_report.json` holds: `wer_base`, `wer_adapted`, `wer_int8_adapted`,
        `mixed_batch_equal`, `tokens_per_second` (`ours`, `transformers_peft`, `ratio`), and more.
    """
    from lora_speech.demo.report import render_report

    settings = settings or DemoSettings()
    progress = progress or DemoProgress()
    started = time.perf_counter()
    output = Path(output)
    base_model = load_base(base)
    if base_model.family.objective != "sequence":
        raise ModelError(
            f"base: expected a Whisper, got a {base_model.family.name}; the demonstration decodes "
            "token by token: name a Whisper, or leave --base out"
        )
    first, second = _accents()
    names_of = _accent_names()
    progress.stage("Synthesising speech that the base has never heard")
    first_data = make_data(first, settings, progress.counter(f"speech in {names_of[first]}"))
    second_data = make_data(
        second, settings, progress.counter(f"speech in {names_of[second]}"), seed=1
    )

    def score(model: SpeechModel, test: list[Utterance], adapter: str | None, title: str):
        return evaluate(
            model,
            test,
            adapter=adapter,
            normalization=NORMALIZATION,
            progress=progress.counter(title),
        )

    progress.stage("Transcribing with the base alone")
    before = score(base_model, first_data.test, None, f"base on {names_of[first]}")
    before_second = score(base_model, second_data.test, None, f"base on {names_of[second]}")

    with tempfile.TemporaryDirectory(prefix="lora_speech_demo_") as scratch:
        progress.stage("Learning the accents with LoRA")
        folders = {name: Path(scratch) / name for name in (first, second)}
        config = TrainingConfig(
            steps=settings.steps,
            batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            rank=settings.rank,
            alpha=2.0 * settings.rank,
            validate_every=max(1, settings.steps // 4),
            checkpoint_every=settings.steps,
            seed=settings.seed,
        )
        run = finetune(
            base, first_data.train, first_data.validation, folders[first], config,
            progress=progress.training(names_of[first]),
        )  # fmt: skip
        second_config = replace(
            config,
            steps=settings.second_steps,
            validate_every=max(1, settings.second_steps // 2),
            checkpoint_every=settings.second_steps,
        )
        finetune(
            base, second_data.train, second_data.validation, folders[second], second_config,
            progress=progress.training(names_of[second]),
        )  # fmt: skip

        progress.stage("Transcribing with live adapters: fp32, then INT8")
        adapted_model = load_for_serving(base_model, folders)
        after = score(adapted_model, first_data.test, first, f"adapter on {names_of[first]}")
        after_second = score(
            adapted_model, second_data.test, second, f"adapter on {names_of[second]}"
        )
        int8_model = load_for_serving(base, folders, int8=True)
        after_int8 = score(
            int8_model, first_data.test, first, f"INT8 + adapter on {names_of[first]}"
        )

        progress.stage("One batch with both adapters and the base")
        mixed = first_data.test[:4] + second_data.test[:4]
        names = [(first, second, None)[index % 3] for index in range(len(mixed))]
        equal = mixed_batch_equal(int8_model, mixed, names)

        progress.stage("Decoding speed, in turns with transformers + peft")
        speed = measure_speed(
            int8_model, base, folders[first], first, first_data.test[0],
            settings.speed_rounds, progress.counter("decoding"),
        )  # fmt: skip
    report = {
        "wer_base": before.rates.wer,
        "wer_adapted": after.rates.wer,
        "wer_int8_adapted": after_int8.rates.wer,
        "mixed_batch_equal": equal,
        "tokens_per_second": speed,
        "second_adapter": {
            "accent": second,
            "accent_name": names_of[second],
            "wer_base": before_second.rates.wer,
            "wer_adapted": after_second.rates.wer,
        },
        "accent": first,
        "accent_name": names_of[first],
        "base": str(base),
        "training": _training_record(run, settings),
        "transcripts": _transcripts(before, after, after_int8),
        "settings": asdict(settings),
        "environment": _environment(),
        "seconds": round(time.perf_counter() - started, 1),
    }
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "demo_report.html", render_report(report))
    write_json(output / "demo_report.json", report)
    return report


@dataclass(frozen=True)
class AccentData:
    """Utterances of one accent; no speaker and no sentence is in two of the lists."""

    train: list[Utterance]
    validation: list[Utterance]
    test: list[Utterance]


def make_data(
    accent: str,
    settings: DemoSettings,
    progress: Callable[[int, int], None],
    seed: int = 0,
) -> AccentData:
    """Synthesise one accent with noise.

    Parameters
    ----------
    accent : str
        One of `synthesis.HELD_OUT_ACCENTS`.
    settings : DemoSettings
        How many utterances, and how noisy.
    progress : callable
        Told how many are done.
    seed : int
        Of sentences, speakers and noise, beside the settings' own.
    """
    from lora_speech.synthetic import corpus, synthesis

    rng = np.random.default_rng([settings.seed, seed])
    speakers = synthesis.accent_speakers(accent, 20, settings.seed + seed)
    held = corpus.sentences(
        settings.validation + settings.test, seed=settings.seed + seed, split="held_out"
    )
    groups = (
        (corpus.sentences(settings.train, seed=settings.seed + seed), speakers[:14]),
        (held[: settings.validation], speakers[14:16]),
        (held[settings.validation :], speakers[16:]),
    )
    total, done = sum(len(texts) for texts, _ in groups), 0
    made: list[list[Utterance]] = []
    for texts, voices in groups:
        utterances = []
        for index, text in enumerate(texts):
            samples = synthesis.synthesize(text, voices[index % len(voices)])
            samples = synthesis.add_noise(samples, float(rng.uniform(*settings.noise_db)), rng)
            utterances.append(
                Utterance(
                    samples, text, language="en", sampling_rate=16_000, name=f"{accent}-{done}"
                )
            )
            done += 1
            progress(done, total)
        made.append(utterances)
    return AccentData(*made)


def mixed_batch_equal(
    model: SpeechModel, utterances: list[Utterance], adapters: list[str | None]
) -> bool:
    """Tell whether a batch of several adapters gives the tokens that each row alone gives."""
    recordings = [within_window(model, u) for u in utterances]
    features = extract_features(model, recordings)[model.family.features.input_name]
    together = greedy_decode(model.model, features, adapters=adapters, language="en").tokens
    alone = [
        greedy_decode(model.model, features[i : i + 1], adapters=[name], language="en").tokens[0]
        for i, name in enumerate(adapters)
    ]
    return together == alone


def _accent_names() -> dict[str, str]:
    from lora_speech.synthetic import synthesis

    return {voice: synthesis.ACCENT_NAMES.get(voice, voice) for voice in synthesis.HELD_OUT_ACCENTS}


def _accents() -> tuple[str, str]:
    from lora_speech.synthetic import synthesis

    if not synthesis.is_available():
        raise MissingExtraError(
            "the demonstration synthesises its speech with espeak-ng, which is not installed; "
            "install the speech extra: pip install 'lora-kernels[speech]'"
        )
    return synthesis.HELD_OUT_ACCENTS[0], synthesis.HELD_OUT_ACCENTS[1]


def _training_record(run: TrainingResult, settings: DemoSettings) -> dict[str, Any]:
    return {
        "losses": [round(loss, 4) for loss in run.losses],
        "validations": [[step, round(wer, 4)] for step, wer in run.validations],
        "best_step": run.best_step,
        "trainable_parameters": run.trainable,
        "parameters": run.total,
        "rank": settings.rank,
        "utterances": settings.train - len(run.skipped),
        "seconds": round(run.seconds, 1),
    }


def _transcripts(
    before: Evaluation, after: Evaluation, after_int8: Evaluation, count: int = 6
) -> list[dict[str, str]]:
    """The utterances that gained most, and one that is still wrong."""
    rows = list(zip(before.utterances, after.utterances, after_int8.utterances, strict=True))
    rows.sort(key=lambda row: row[1].wer - row[0].wer)
    wrong = [row for row in rows[count - 1 :] if row[2].wer > 0]
    chosen = rows[: count - 1] + (wrong[:1] or rows[count - 1 : count])
    return [
        {
            "reference": b.reference,
            "base": b.hypothesis,
            "adapted": a.hypothesis,
            "int8": i.hypothesis,
        }
        for b, a, i in chosen
    ]


def _environment() -> dict[str, Any]:
    import platform

    import peft
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
