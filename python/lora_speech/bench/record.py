"""The growing record of a run: kept whole on disk after every comparison."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.progress import Progress

from lora_speech.bench.measure import Comparison
from lora_speech.bench.settings import BenchSettings, model_key
from lora_speech.files import write_json
from lora_speech.progress import Counter, counter


class BenchProgress:
    """What a run tells about itself; this one says nothing."""

    def counter(self, title: str) -> Counter:
        """Give a function that is told how many turns of a comparison are done."""
        return lambda done, total: None

    def note(self, text: str) -> None:
        """Something that the reader should know."""


class TerminalProgress(BenchProgress):
    """A bar for each comparison, and remarks between them."""

    def __init__(self, bars: Progress) -> None:
        self.bars = bars

    def counter(self, title: str) -> Counter:
        """A new bar."""
        return counter(self.bars, title)

    def note(self, text: str) -> None:
        """Printed above the bars, or as a line where there is no terminal."""
        self.bars.console.print(text, markup=False, style="yellow")


class Record:
    """Figures, timings and what was left out.

    Parameters
    ----------
    settings : BenchSettings
        Of the run.
    progress : BenchProgress
        Told what was left out.
    path : Path, optional
        Where the JSON goes.

    Attributes
    ----------
    data : dict
        What the JSON holds.
    """

    def __init__(
        self, settings: BenchSettings, progress: BenchProgress, path: Path | None = None
    ) -> None:
        from lora_kernels import environment

        self.progress, self.path = progress, path
        facts = environment.facts()
        facts.pop("threads")  # each comparison sets its own
        facts["versions"] |= environment.versions(("ctranslate2", "openvino"))
        self.data: dict[str, Any] = {
            "suite": "cpu",
            "complete": False,
            "settings": asdict(settings),
            "environment": facts,
            "models": {},
            "left_out": {},
            "timings": {},
        }
        # Without the folders' paths, which say nothing to others.
        self.data["settings"]["models"] = [model_key(model) for model in settings.models]

    def add(
        self, path: tuple[str, ...], comparison: Comparison, figure: Callable[[float], float]
    ) -> dict[str, Any]:
        """Keep a comparison.

        Parameters
        ----------
        path : tuple of str
            Keys that lead to it, both among the figures and among the timings.
        comparison : Comparison
            What was measured.
        figure : callable
            Seconds per call to the figure of merit, e.g. tokens per second.

        Returns
        -------
        dict
            The figures by name, to which more can be added.
        """
        for name, why in comparison.failed.items():
            self.leave_out(f"{name} in {'.'.join(path)}", why)
        figures = comparison.figures(figure)
        if figures:
            self.put(path, figures)
            _place(self.data["timings"], path, comparison.timings())
        return figures

    def put(self, path: tuple[str, ...], value: Any) -> None:
        """Keep anything else."""
        _place(self.data, path, value)
        self.save()

    def leave_out(self, name: str, why: str) -> None:
        """Keep and say that something was not measured."""
        self.data["left_out"][name] = why
        self.progress.note(f"{name}: left out, {why}")

    def save(self) -> None:
        """Write the JSON whole, where one is wanted."""
        if self.path is not None:
            write_json(self.path, self.data)


def _place(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value
