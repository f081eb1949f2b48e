"""The demonstration on a terminal: stages, bars and the closing table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from lora_speech.demo.run import DemoProgress
from lora_speech.progress import counter
from lora_speech.training.bars import training_bars
from lora_speech.training.config import TrainingEvent


class TerminalProgress(DemoProgress):
    """Shows stages as headings and everything else as bars; plain lines where there is no tty."""

    def __init__(self, bars: Progress) -> None:
        self.bars = bars
        self.number = 0

    def stage(self, title: str) -> None:
        self.number += 1
        self.bars.console.print(f"[bold]{self.number}. {title}[/]")

    def counter(self, title: str) -> Callable[[int, int], None]:
        return counter(self.bars, f"   {title}")

    def training(self, title: str) -> Callable[[TrainingEvent], None]:
        return training_bars(self.bars, f"   {title}")


def print_table(report: dict[str, Any], console: Console | None = None) -> None:
    """Print the figures of a report."""
    console = console or Console(highlight=False)
    speed, second = report["tokens_per_second"], report["second_adapter"]
    table = Table(title="What happened", title_justify="left", show_header=False, pad_edge=False)
    table.add_column()
    table.add_column(justify="right")
    accent = report["accent_name"]
    for name, value in (
        (f"word error rate, {accent}, base", f"{report['wer_base']:.1%}"),
        (f"word error rate, {accent}, LoRA", f"[green]{report['wer_adapted']:.1%}[/]"),
        (
            f"word error rate, {accent}, INT8 + LoRA",
            f"[green]{report['wer_int8_adapted']:.1%}[/]",
        ),
        (
            f"word error rate, {second['accent_name']}, base → LoRA",
            f"{second['wer_base']:.1%} → [green]{second['wer_adapted']:.1%}[/]",
        ),
        (
            "mixed batch of two adapters and the base",
            "[green]equal to each alone[/]"
            if report["mixed_batch_equal"]
            else "[red]differs from each alone[/]",
        ),
        ("decoding, INT8 + LoRA (tokens/s)", f"[green]{speed['ours']:,.0f}[/]"),
        ("decoding, transformers + peft (tokens/s)", f"{speed['transformers_peft']:,.0f}"),
        ("ratio", f"[green]{speed['ratio']:.1f}×[/]"),
        ("time", f"{report['seconds']:.0f} s"),
    ):
        table.add_row(name, value)
    console.print(table)
