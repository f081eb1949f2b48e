"""Bars of a fine-tuning run on a terminal."""

from __future__ import annotations

from collections.abc import Callable

from rich.progress import Progress, TaskID

from lora_speech.training.config import TrainingEvent


def training_bars(bars: Progress, description: str) -> Callable[[TrainingEvent], None]:
    """Add the bars of a fine-tuning run: preparation, then steps with loss and word error rate."""
    prepare = bars.add_task(f"{description}: features", total=None, note="")
    train: list[TaskID] = []
    note = {"loss": "", "wer": ""}
    smooth: list[float] = []

    def tell(event: TrainingEvent) -> None:
        if event.stage == "prepare":
            bars.update(prepare, completed=event.done, total=event.total)
            return
        if not train:
            train.append(bars.add_task(f"{description}: training", total=event.total, note=""))
        if event.loss is not None:
            smooth.append(event.loss)
            recent = smooth[-20:]
            note["loss"] = f"loss {sum(recent) / len(recent):.3f}"
        if event.wer is not None and event.best_wer is not None:
            note["wer"] = f"validation WER {event.wer:.1%} (best {event.best_wer:.1%})"
        bars.update(
            train[0],
            completed=event.done,
            total=event.total,
            note=" · ".join(text for text in note.values() if text),
        )

    return tell
