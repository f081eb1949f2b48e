"""Whether an exported model says what the torch model says, on the same recordings."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
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
    way : str
        "" for a whole recording (or window), "in steps" for a streaming export.
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
    wer : float
        Word error rate of all recordings by this adapter, in this way: torch's texts are right.
    torch_ms, export_ms : float
        Time of encoding and decoding, the first run aside.
    """

    recording: str
    way: str
    adapter: str | None
    expected: str
    got: str
    tokens: int
    same: int
    identical: bool
    wer: float
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

    @property
    def worst(self) -> Comparison:
        """Of the adapter with the highest word error rate, a text that differs most."""
        return max(self.comparisons, key=lambda c: (c.wer, c.tokens - c.same))

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
                        name,
                        way,
                        adapter,
                        speaker.text(expected),
                        speaker.text(got),
                        len(expected),
                        _same(expected, got),
                        expected == got,
                        0.0,
                        torch_ms,
                        export_ms,
                    )
                )
    if not any(comparison.expected for comparison in comparisons):
        raise ModelError(
            "check: expected recordings in which the model hears words, got none "
            f"({', '.join(names)}); name some with --check FILE"
        )
    groups: dict[tuple[str, str | None], list[Comparison]] = {}
    for comparison in comparisons:
        groups.setdefault((comparison.way, comparison.adapter), []).append(comparison)
    rates = {key: _wer(group) for key, group in groups.items()}
    rated = [replace(c, wer=rates[c.way, c.adapter]) for c in comparisons]
    return Check(rated, _wer(comparisons))


def _wer(comparisons: Sequence[Comparison]) -> float:
    """Errors over torch's words; where torch hears none, words that are there count as errors."""
    import jiwer

    heard = [c for c in comparisons if c.expected]
    extra = sum(len(c.got.split()) for c in comparisons if not c.expected)
    words = sum(len(c.expected.split()) for c in heard)
    if not heard:
        return float(extra > 0)
    return float(jiwer.wer([c.expected for c in heard], [c.got for c in heard])) + extra / words


def _same(expected: Sequence[int], got: Sequence[int]) -> int:
    """How many tokens come before the first that differs."""
    pairs = enumerate(zip(expected, got, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(expected), len(got)))


def _timed(run: Callable[[], Sequence[int]]) -> tuple[list[int], float]:
    run()
    begin = time.perf_counter()
    found = run()
    return list(found), 1000 * (time.perf_counter() - begin)
