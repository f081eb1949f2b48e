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
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

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
