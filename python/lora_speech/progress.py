"""Progress bars on the terminal; silent where standard error is not one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from lora_speech.training_config import TrainingEvent

STDERR = Console(stderr=True, highlight=False)
"""Progress and messages go to standard error, results to standard output."""

Counter = Callable[[int, int], None]
"""Told how much is done, and of how much."""


@contextmanager
def progress_bars(console: Console = STDERR) -> Iterator[Progress]:
    """Show bars while the block runs; each finished one stays as a line."""
    with Progress(
        SpinnerColumn(finished_text="[green]✓[/]"),
        TextColumn("{task.description:<34}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        disable=not console.is_terminal,
    ) as bars:
        yield bars


def counter(bars: Progress, description: str, total: int | None = None) -> Counter:
    """Add a bar; calling the result with (done, total) moves it."""
    task = bars.add_task(description, total=total, note="")

    def move(done: int, total: int) -> None:
        bars.update(task, completed=done, total=total)

    return move


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
