"""Whether an exported model says what the torch model says, on the same recordings."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lora_speech.errors import ModelError
from lora_speech.export.speakers import speaker_of
from lora_speech.export.target import Plan, Recognizer


@dataclass(frozen=True)
class Comparison:
    """One recording by one adapter, by torch and by the export.

    Attributes
    ----------
    recording : str
    adapter : str or None
        Live adapter; None: the base, or what is merged into it.
    expected, got : str
        Texts.
    tokens : int
        Of the torch model.
    same : int
        Tokens before the first that differs.
    identical : bool
        Whether all do not.
    torch_ms, export_ms : float
        Time of encoding and decoding, the first run aside.
    """

    recording: str
    adapter: str | None
    expected: str
    got: str
    tokens: int
    same: int
    identical: bool
    torch_ms: float
    export_ms: float


@dataclass(frozen=True)
class Check:
    """All comparisons of one export.

    Attributes
    ----------
    comparisons : list of Comparison
    wer : float
        Word error rate of the export's texts, the torch model's taken as right.
    """

    comparisons: list[Comparison]
    wer: float

    @property
    def identical(self) -> bool:
        """Whether every token of every recording agrees."""
        return all(comparison.identical for comparison in self.comparisons)

    def record(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {**asdict(self), "identical": self.identical}


def check_export(
    plan: Plan, recognizer: Recognizer, names: Sequence[str], recordings: Sequence[np.ndarray]
) -> Check:
    """Decode recordings both ways.

    Parameters
    ----------
    plan : Plan
        What was exported: the torch model is its own.
    recognizer : Recognizer
        The export, loaded again.
    names : sequence of str
        What the recordings are called.
    recordings : sequence of numpy.ndarray
        float32 [samples] each; what is longer than a window is cut after its first.

    Returns
    -------
    Check
    """
    import jiwer

    speaker = speaker_of(plan, recognizer)
    window = plan.model.window_seconds
    longest = None if window is None else int(window * plan.model.sampling_rate)
    comparisons = []
    for name, samples in zip(names, recordings, strict=True):
        features = speaker.features(samples[:longest])
        for adapter in (None, *plan.live):
            for way, by_torch, by_export in speaker.ways(features, adapter):
                expected, torch_ms = _timed(by_torch)
                got, export_ms = _timed(by_export)
                comparisons.append(
                    Comparison(
                        name + way,
                        adapter,
                        speaker.text(expected),
                        speaker.text(got),
                        len(expected),
                        _same(expected, got),
                        expected == got,
                        torch_ms,
                        export_ms,
                    )
                )
    heard = [c for c in comparisons if c.expected]
    if not heard:
        raise ModelError(
            "check: expected recordings in which the model hears words, got none "
            f"({', '.join(names)}); name some with --check FILE"
        )
    extra = sum(len(c.got.split()) for c in comparisons if not c.expected)
    words = sum(len(c.expected.split()) for c in heard)
    wer = float(jiwer.wer([c.expected for c in heard], [c.got for c in heard])) + extra / words
    return Check(comparisons, wer)


def _same(expected: Sequence[int], got: Sequence[int]) -> int:
    """How many tokens come before the first that differs."""
    pairs = enumerate(zip(expected, got, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(expected), len(got)))


def _timed(run: Callable[[], Sequence[int]]) -> tuple[list[int], float]:
    run()
    begin = time.perf_counter()
    found = run()
    return list(found), 1000 * (time.perf_counter() - begin)
