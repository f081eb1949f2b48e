"""Settings of a training run, what it tells while it runs, and its outcome."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from lora_speech.errors import TrainingError


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of a run.

    Attributes
    ----------
    steps : int
        Optimizer steps.
    batch_size, accumulation : int
        Utterances per micro-batch, micro-batches per step.
    learning_rate : float
        Peak, after warm-up; a cosine takes it to a tenth.
    warmup : float
        Share of the steps in which the learning rate rises.
    weight_decay, max_gradient_norm : float
        AdamW's decay; gradients are clipped to this norm.
    rank : int
        LoRA rank.
    alpha : float
        LoRA alpha; the update is scaled by alpha / rank.
    dropout : float
        On the LoRA branch's input.
    targets : tuple of str or None
        Names of the linears to adapt; None: those of the model's family.
    rslora : bool
        Scale by alpha / sqrt(rank) instead.
    augment : bool
        SpecAugment on the features.
    validate_every, checkpoint_every : int
        Steps between validations and between checkpoints.
    seed : int
        Of initialisation, order, dropout and augmentation.
    language : str or None
        Of utterances without their own.
    """

    steps: int = 400
    batch_size: int = 8
    accumulation: int = 1
    learning_rate: float = 1e-3
    warmup: float = 0.1
    weight_decay: float = 0.01
    max_gradient_norm: float = 1.0
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.05
    targets: tuple[str, ...] | None = None
    rslora: bool = False
    augment: bool = True
    validate_every: int = 100
    checkpoint_every: int = 100
    seed: int = 0
    language: str | None = None

    def __post_init__(self) -> None:
        positive = (
            "steps", "batch_size", "accumulation", "learning_rate", "max_gradient_norm", "rank",
            "alpha", "validate_every", "checkpoint_every",
        )  # fmt: skip
        problems = [
            f"{name}: expected a positive number, got {getattr(self, name)!r}"
            for name in positive
            if not getattr(self, name) > 0 or not math.isfinite(getattr(self, name))
        ]
        problems += [
            f"{name}: expected at least 0 and less than 1, got {getattr(self, name)!r}"
            for name in ("warmup", "dropout")
            if not 0 <= getattr(self, name) < 1
        ]
        if not self.weight_decay >= 0:
            problems.append(f"weight_decay: expected 0 or more, got {self.weight_decay!r}")
        if problems:
            raise TrainingError("; ".join(problems) + "; correct the settings")

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        warm = max(1, round(self.warmup * self.steps))
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        share = (step - warm) / max(1, self.steps - warm)
        return self.learning_rate * (0.1 + 0.45 * (1.0 + math.cos(math.pi * share)))


@dataclass(frozen=True)
class TrainingEvent:
    """What a progress display is told: examples prepared, a step done, or a validation."""

    stage: str
    done: int
    total: int
    loss: float | None = None
    wer: float | None = None
    best_wer: float | None = None


@dataclass(frozen=True)
class TrainingResult:
    """Outcome of `finetune`.

    Attributes
    ----------
    output : Path
        PEFT folder of the best adapter (of the last, without validation data).
    losses : list of float
        Per step, from the log (a resumed run's earlier steps included).
    validations : list of (int, float)
        Step and word error rate.
    best_wer, best_step
        Of the adapter kept.
    trainable, total : int
        Parameters.
    skipped : tuple of str
        Utterances left out, with the reason.
    seconds : float
        Of this call.
    """

    output: Path
    losses: list[float]
    validations: list[tuple[int, float]]
    best_wer: float | None
    best_step: int
    trainable: int
    total: int
    skipped: tuple[str, ...]
    seconds: float
