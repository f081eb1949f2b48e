"""The command `lora-speech export`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lora_speech.cli.options import Base, Language, named_folders
from lora_speech.errors import SpeechError
from lora_speech.export.names import MAX_WER, TARGETS

if TYPE_CHECKING:
    from lora_speech.export.run import ExportReport

To = Enum("To", {name: name for name in TARGETS}, type=str)  # type: ignore[misc]


def export(
    to: Annotated[
        To,  # type: ignore[valid-type]
        typer.Option(
            help="What for. " + "; ".join(f"{name}: {what}" for name, what in TARGETS.items()) + "."
        ),
    ],
    output: Annotated[Path, typer.Option(help="A new folder for the result.")],
    base: Base = "shipped",
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            help="An adapter to export with the base, repeatable. It stays apart from the weights "
            "where the target can do that, and is merged into them where not.",
            metavar="[NAME=]FOLDER",
        ),
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Merge the adapter into the weights in any case.")
    ] = False,
    int8: Annotated[bool, typer.Option("--int8", help="Make the weights INT8.")] = False,
    language: Language = None,
    check: Annotated[
        list[Path] | None,
        typer.Option(
            help="A recording to compare the result with torch by, repeatable; by default "
            "sentences that are synthesised here.",
            metavar="FILE",
        ),
    ] = None,
    max_wer: Annotated[
        float,
        typer.Option(
            help="Word error rate against torch's own text beyond which nothing is written.",
            min=0.0,
        ),
    ] = MAX_WER,
    option: Annotated[
        list[str] | None,
        typer.Option(
            help="What a target takes besides, repeatable; see docs/export.md.",
            metavar="NAME=VALUE",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier export in --output.")
    ] = False,
) -> None:
    """Write a model as another runtime loads it, and check that it hears the same.

    Example: lora-speech export --to onnx --adapter me=adapters/me --output exported
    """
    from rich.markup import escape

    from lora_speech.data.audio import check_audio_file
    from lora_speech.progress import STDERR

    folders = named_folders(adapter)
    options = _options(option)
    for file in check or []:  # before the model takes its time to load
        check_audio_file(file)
    with STDERR.status("export") as status:
        from lora_speech.export.run import export_model

        told = [""]

        def say(text: str) -> None:
            status.update(f"export: {escape(text)}")
            stage = text.partition(":")[0]
            if not STDERR.is_terminal and stage != told[0]:
                told[0] = stage
                STDERR.print(f"export: {stage}", markup=False)

        report = export_model(
            base,
            str(to.value),
            output,
            adapters=folders,
            merge=merge,
            int8=int8,
            language=language,
            check=check or [],
            max_wer=max_wer,
            options=options,
            overwrite=overwrite,
            say=say,
        )
    _print(report)


def _options(given: list[str] | None) -> dict[str, str]:
    options: dict[str, str] = {}
    for text in given or []:
        name, separator, value = text.partition("=")
        if not name or not separator:
            raise SpeechError(f"--option: expected NAME=VALUE, got {text!r}; see docs/export.md")
        options[name] = value
    return options


def _print(report: ExportReport) -> None:
    """Tell what was compared, what lies where, and how it is used."""
    from rich.console import Console
    from rich.table import Table

    plan, check = report.plan, report.check
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("recording", "adapter", "tokens", "same", "torch", "export", "text"):
        table.add_column(column, justify="right" if column in _NUMBERS else "left")
    for found in check.comparisons:
        text = found.got
        if not found.identical:
            text = f"{found.got}\n(torch: {found.expected})"
        table.add_row(
            f"{found.recording} {found.way}".rstrip(),
            found.adapter or plan.merged or "base",
            str(found.tokens),
            "all" if found.identical else str(found.same),
            f"{found.torch_ms:.0f} ms",
            f"{found.export_ms:.0f} ms",
            text,
        )
    console = Console(highlight=False, markup=False)
    console.print(table)
    count = len(check.comparisons)
    if check.identical:
        typer.echo(f"check: identical to torch, every token of {count}")
    else:
        differ = sum(not found.identical for found in check.comparisons)
        typer.echo(f"check: {differ} of {count} texts differ from torch's, WER {check.wer:.1%}")
    total = sum(report.bytes.values())
    largest = sorted(report.bytes.items(), key=lambda item: -item[1])[:4]
    shown = [(name, size) for name, size in largest if size >= 50_000] or largest[:1]
    listed = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in shown)
    typer.echo(f"{report.output}: {total / 1e6:.1f} MB ({listed})")
    adapters = f"live: {', '.join(plan.live)}" if plan.live else f"merged: {plan.merged or 'none'}"
    typer.echo(f"adapters {adapters}; weights {'INT8' if plan.int8 else 'floating point'}")
    if usage := report.target.usage(report.output):
        typer.echo(usage)


_NUMBERS = ("tokens", "same", "torch", "export")
