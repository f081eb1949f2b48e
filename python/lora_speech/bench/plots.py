"""The record of a run as a page of bar charts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_speech.bench.labels import NAMES, SECTIONS, Section, comparisons, rules
from lora_speech.charts import bar_chart
from lora_speech.errors import SpeechError
from lora_speech.page import escape, page, section

_STYLES = {"ours": "int8", "transformers_peft": "base", "peft": "base"}


def plots_path(json_path: Path) -> Path:
    """Where the plots of a JSON file go: beside it."""
    path = json_path.with_suffix(".html")
    if path == json_path:
        raise SpeechError(
            f"--json: expected a file for the figures, e.g. bench.json, got {str(json_path)!r}, "
            "which is where the plots would go; name another one"
        )
    return path


def render_plots(data: dict[str, Any]) -> str:
    """Write the page.

    Parameters
    ----------
    data : dict
        What `suite.run_bench` returned.

    Returns
    -------
    str
        HTML with its style and charts inside.
    """
    cards = [_card(data, shown, model) for shown in SECTIONS for model in data.get(shown.key, {})]
    if "train" in data:
        cards += [_training(model, figures) for model, figures in data["train"].items()]
    left_out = "; ".join(f"{name}: {why}" for name, why in data["left_out"].items())
    return page(
        "lora_kernels: benchmark",
        "Whisper on this CPU",
        escape(rules(data)),
        cards,
        f"Left out: {escape(left_out)}" if left_out else "Nothing was left out.",
    )


def _card(data: dict[str, Any], shown: Section, model: str) -> str:
    charts = []
    for other, threads, figures in comparisons(data, shown.key):
        if other != model:
            continue
        bars = [_bar(name, figures[name], shown.unit) for name in NAMES if name in figures]
        limit = data["roofline"][model][threads] if shown.key == "decode" else None
        if limit is not None:
            bars.append(_bar("roofline", limit["limit_tokens_per_second"], shown.unit))
        title = f"{shown.title}, {model}, threads {threads}"
        charts.append(f"<p>Threads: {escape(threads)}</p>{bar_chart(bars, label=title)}")
    better = "More is better." if shown.more_is_better else "Less is better."
    return section(
        f"{shown.title}: {model}", f"{escape(shown.explanation)} {better}", "".join(charts)
    )


def _training(model: str, figures: dict[str, Any]) -> str:
    present = [name for name in NAMES if name in figures]
    charts = [
        bar_chart(
            [_bar(name, figures[name][key], unit) for name in present],
            label=f"{unit} of a training step, {model}",
        )
        for key, unit in (("ms_per_step", "ms"), ("peak_mib", "MiB"))
    ]
    return section(
        f"A training step: {model}",
        f"Time, and the peak of memory; threads: {figures['threads']}. Less is better.",
        "".join(charts),
    )


def _bar(name: str, value: float, unit: str) -> tuple[str, float, str, str]:
    return NAMES.get(name, name), value, f"{value:,.0f} {unit}", _STYLES.get(name, "adapted")
