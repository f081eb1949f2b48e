"""The record of a run as tables on a terminal."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lora_speech.bench.labels import NAMES, SECTIONS, Section, advantage, comparisons, rules

THREADS = "thr."
"""Short, because the widest table has to fit 80 columns."""


def print_tables(data: dict[str, Any], console: Console | None = None) -> None:
    """Print what `suite.run_bench` returned."""
    console = console or Console(highlight=False)
    tables = [_whole_models(data, section) for section in SECTIONS if section.key in data]
    tables += [_linears(data)] if "linear" in data else []
    tables += [_training(data)] if "train" in data else []
    for table in tables:
        console.print(table)
        console.print()
    console.print(rules(data), markup=False, style="dim")
    for name, why in data["left_out"].items():
        console.print(f"left out: {name}, {why}", markup=False, style="yellow")


def _whole_models(data: dict[str, Any], section: Section) -> Table:
    found = list(comparisons(data, section.key))
    names = [name for name in NAMES if any(name in figures for _, _, figures in found)]
    limited = section.key == "decode"
    mixed = section.key == "decode_batch8_adapters"
    table = _table(
        f"{section.title}, {section.unit}",
        ["model"],
        [THREADS, *(NAMES[name] for name in names), "speed vs\nbest peer"]
        + ["of\nroofline"] * limited
        + ["time over\none adapter"] * mixed,
    )
    for model, threads, figures in found:
        timings = data["timings"][section.key][model][threads]
        cells = [threads, *(_figure(name, figures, timings) for name in names)]
        ahead = advantage(section, figures)
        cells.append("" if ahead is None else _coloured(f"{ahead[0]:.2f}×", ahead[0] > 1))
        if limited:
            cells.append(f"{data['roofline'][model][threads]['fraction']:.0%}")
        if mixed:
            cells.append(f"{figures['over_one_adapter']:.2f}")
        table.add_row(escape(model), *cells)
    return table


def _figure(name: str, figures: dict[str, float], timings: dict[str, Any]) -> str:
    if name not in figures:
        return "–"
    variant = timings[name].get("variant")
    return _number(figures[name]) + (f"\n[dim]{variant}[/]" if variant else "")


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:,.1f}"


def _linears(data: dict[str, Any]) -> Table:
    columns = ("int8", "int8_lora", "torch_dynamic_int8", "torch_dynamic_int8_lora")
    titles = ["INT8", "INT8 + LoRA", "torch INT8", "torch INT8 + LoRA"]
    table = _table(
        "One projection, µs", ["model", "layer"], [THREADS, "rows", *titles, "LoRA / alone"]
    )
    for model, threads, layers in comparisons(data, "linear"):
        for layer, by_rows in layers.items():
            for rows, figures in by_rows.items():
                cells = [_number(figures[name]) if name in figures else "–" for name in columns]
                ratio = f"{figures['lora_over_int8']:.2f}"
                table.add_row(escape(model), layer, threads, rows, *cells, ratio)
    return table


def _training(data: dict[str, Any]) -> Table:
    table = _table("A training step", ["model", "contestant"], [THREADS, "ms per step", "peak MiB"])
    for model, figures in data["train"].items():
        for name in (name for name in NAMES if name in figures):
            step = figures[name]
            table.add_row(
                escape(model),
                NAMES[name],
                str(figures["threads"]),
                f"{step['ms_per_step']:,.0f}",
                f"{step['peak_mib']:,}",
            )
    return table


def _table(title: str, left: list[str], right: list[str]) -> Table:
    table = Table(
        title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
    )
    for name in left:
        table.add_column(name)
    for name in right:  # two lines of header keep the columns narrow
        table.add_column(name if "\n" in name else name.replace(" ", "\n", 1), justify="right")
    return table


def _coloured(text: str, good: bool) -> str:
    return f"[green]{text}[/]" if good else f"[red]{text}[/]"
