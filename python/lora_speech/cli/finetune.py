"""The command `lora-speech finetune`."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer

from lora_speech.cli.options import Base, Language
from lora_speech.training.config import TrainingConfig


def finetune(
    train: Annotated[
        str,
        typer.Option(
            help='Recordings to learn from: a JSONL file with one {"audio": ..., "text": ...} '
            "per line, a folder saved by Hugging Face datasets, or a hub name (owner/name:split).",
        ),
    ],
    output: Annotated[
        Path, typer.Option(help="Folder for the adapter (PEFT layout), the log and checkpoints.")
    ],
    base: Base = "shipped",
    validation: Annotated[
        str | None,
        typer.Option(help="Recordings to choose the best adapter by; the same kinds as --train."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Training steps.")] = TrainingConfig.steps,
    batch_size: Annotated[
        int, typer.Option(help="Recordings per step.")
    ] = TrainingConfig.batch_size,
    accumulation: Annotated[
        int, typer.Option(help="Batches whose gradients are added up for one step.")
    ] = TrainingConfig.accumulation,
    learning_rate: Annotated[
        float, typer.Option(help="Peak learning rate.")
    ] = TrainingConfig.learning_rate,
    rank: Annotated[int, typer.Option(help="LoRA rank: the adapter's size.")] = TrainingConfig.rank,
    alpha: Annotated[
        float, typer.Option(help="LoRA alpha: the update is scaled by alpha / rank.")
    ] = TrainingConfig.alpha,
    dropout: Annotated[
        float, typer.Option(help="Dropout on the adapter's input.")
    ] = TrainingConfig.dropout,
    target: Annotated[
        list[str] | None,
        typer.Option(help="Name of the linears to adapt, repeatable; by default all of them."),
    ] = None,
    augment: Annotated[
        bool, typer.Option(help="Mask bands and stretches of the features (SpecAugment).")
    ] = TrainingConfig.augment,
    validate_every: Annotated[
        int, typer.Option(help="Steps between validations.")
    ] = TrainingConfig.validate_every,
    checkpoint_every: Annotated[
        int, typer.Option(help="Steps between checkpoints.")
    ] = TrainingConfig.checkpoint_every,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = TrainingConfig.seed,
    language: Language = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue where an interrupted run stopped.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier run in --output.")
    ] = False,
) -> None:
    """Train a LoRA adapter on your recordings and keep the best one.

    Example: lora-speech finetune --train train.jsonl --validation dev.jsonl --output adapters/me
    """
    from lora_speech.progress import STDERR, progress_bars
    from lora_speech.training.bars import training_bars
    from lora_speech.training.finetune import finetune as run

    given = locals()
    settings = {f.name: given[f.name] for f in fields(TrainingConfig) if f.name in given}
    config = TrainingConfig(**settings, targets=tuple(target) if target else None)
    with progress_bars() as bars:
        result = run(
            base,
            train,
            validation,
            output,
            config,
            resume=resume,
            overwrite=overwrite,
            progress=training_bars(bars, "finetune"),
        )
    if result.skipped:
        STDERR.print(
            f"left out {len(result.skipped)} recordings that do not fit the model: "
            + "; ".join(result.skipped[:3]),
            markup=False,
        )
    best = "" if result.best_wer is None else f", validation WER {result.best_wer:.2%}"
    typer.echo(f"adapter: {result.output} (step {result.best_step}{best})")
