"""Turns of the contestants of one comparison, and what is kept of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lora_kernels.benchmarking.turns import Turns, percentiles, ratio
from lora_speech.bench.settings import BenchSettings
from lora_speech.progress import Counter

OURS = "ours"

PAUSE = 0.05
"""Seconds before each turn. The thread pools of OpenMP and TBB go on spinning for some
milliseconds after their work; without the rest, one contestant's would run in the next one's
time."""

MOST_TURNS = 200

HOPELESS = 1.5
"""A variant that needs so many times the seconds of the fastest of its name takes no turns."""

LONG = 1.0
"""Seconds of a call in which preparation goes under."""


@dataclass(frozen=True)
class Contestant:
    """One way to do the work of a comparison.

    Attributes
    ----------
    name : str
        What results are kept under.
    run : callable
        Does the work once.
    variant : str
        How, where one name comes in several ways: each takes turns, and the fastest stands for it.
    calls : int
        What one run does so many times; timings are per call.
    """

    name: str
    run: Callable[[], Any]
    variant: str = ""
    calls: int = 1

    @property
    def key(self) -> tuple[str, str]:
        """Name and variant."""
        return self.name, self.variant


class Comparison:
    """What the turns of one comparison gave.

    Attributes
    ----------
    samples : dict
        Seconds per call of each (name, variant).
    slower : dict
        Seconds per call, once, of variants that took no turns because others of their name are
        so much faster.
    failed : dict
        Why those that could not run were left out.
    """

    def __init__(self) -> None:
        self.samples: dict[tuple[str, str], list[float]] = {}
        self.slower: dict[tuple[str, str], float] = {}
        self.failed: dict[str, str] = {}

    def median(self, name: str) -> float:
        """Seconds per call of the fastest variant of a name."""
        return percentiles(self.samples[name, self.best(name)])["p50"]

    def best(self, name: str) -> str:
        """The variant of a name with the smallest median."""
        medians = {
            variant: percentiles(samples)["p50"]
            for (other, variant), samples in self.samples.items()
            if other == name
        }
        return min(medians, key=medians.__getitem__)

    def ratio(self, name: str, to: str) -> float:
        """Median over the turns of one name's time as a multiple of another's."""
        return ratio(self.samples[name, self.best(name)], self.samples[to, self.best(to)])

    @property
    def names(self) -> list[str]:
        """Of the contestants that ran, in their order."""
        return list(dict.fromkeys(name for name, _ in self.samples))

    def figures(self, figure: Callable[[float], float]) -> dict[str, float]:
        """The figure of merit of each name's median."""
        return {name: significant(figure(self.median(name))) for name in self.names}

    def timings(self) -> dict[str, dict[str, Any]]:
        """Percentiles in milliseconds of each name, with its variants where it has several."""
        record: dict[str, dict[str, Any]] = {}
        for name in self.names:
            variants = {v: s for (other, v), s in self.samples.items() if other == name}
            best = self.best(name)
            record[name] = _milliseconds(variants[best])
            if best:
                record[name]["variant"] = best
                record[name]["variants"] = {v: _milliseconds(s) for v, s in variants.items()}
                record[name]["slower_ms"] = {
                    v: significant(s * 1e3) for (n, v), s in self.slower.items() if n == name
                }
        return record


def compare(
    contestants: Sequence[Contestant],
    settings: BenchSettings,
    progress: Counter,
    *,
    share: float = 1.0,
    beside: Callable[[], Any] | None = None,
) -> Comparison:
    """Let contestants take turns in random order.

    Parameters
    ----------
    contestants : sequence of Contestant
        A peer that raises at its first call is left out; ours must not.
    settings : BenchSettings
        Says for how long.
    progress : callable
        Told how many turns are done.
    share : float
        Of `settings.seconds`.
    beside : callable, optional
        Called once a round, untimed: what must be measured in the same moments.
    """
    result = Comparison()
    chosen = _warm_up(contestants, result)
    if not chosen:
        return result
    turns = Turns({contestant.key: contestant.run for contestant in chosen}, PAUSE)
    begin = time.perf_counter()
    turns.take()
    once = time.perf_counter() - begin
    total = int(max(settings.turns, min(MOST_TURNS, share * settings.seconds / once)))
    for done in range(1, total + 1):
        if beside is not None:
            beside()
        progress(done, total)
        if done < total:
            turns.take()
    calls = {contestant.key: contestant.calls for contestant in chosen}
    result.samples = {k: [s / calls[k] for s in v] for k, v in turns.samples.items()}
    return result


def _warm_up(contestants: Sequence[Contestant], result: Comparison) -> list[Contestant]:
    """Run each, and choose those that shall take turns."""
    seconds: dict[Contestant, float] = {}
    for contestant in contestants:
        try:
            taken = _timed(contestant)
            if taken < LONG:  # the first call prepares things, which shows in a short one
                taken = _timed(contestant)
        except Exception as error:  # peers raise what they like
            if contestant.name == OURS:
                raise
            result.failed[" ".join(filter(None, contestant.key))] = reason(error)
        else:
            seconds[contestant] = taken / contestant.calls
    fastest: dict[str, float] = {}
    for contestant, taken in seconds.items():
        fastest[contestant.name] = min(taken, fastest.get(contestant.name, taken))
    chosen = [c for c, taken in seconds.items() if taken <= HOPELESS * fastest[c.name]]
    result.slower = {c.key: taken for c, taken in seconds.items() if c not in chosen}
    return chosen


def _timed(contestant: Contestant) -> float:
    begin = time.perf_counter()
    contestant.run()
    return time.perf_counter() - begin


def reason(error: BaseException) -> str:
    """The first line of an error, with its type."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def significant(value: float) -> float:
    """Four significant digits: more would be noise."""
    return float(f"{value:.4g}")


def _milliseconds(seconds: list[float]) -> dict[str, Any]:
    record: dict[str, Any] = {
        f"{name}_ms": significant(value * 1e3) for name, value in percentiles(seconds).items()
    }
    return record | {"turns": len(seconds)}
