"""Contestants that take turns: one round times each of them once, in another order every time."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Generic, TypeVar

Name = TypeVar("Name", bound=Hashable)


class Turns(Generic[Name]):
    """Seconds of each contestant, taken round by round.

    All contestants see the same moments of a noisy machine under the same conditions, and the
    order is shuffled, not rotated: nobody always comes after the one that leaves the caches worst.

    Parameters
    ----------
    contestants : mapping of name to callable
        What is timed.
    pause : float
        Seconds of rest before each turn, in which the threads of the one before fall asleep.

    Attributes
    ----------
    samples : dict of name to list of float
        Seconds, one per round.
    """

    def __init__(self, contestants: Mapping[Name, Callable[[], Any]], pause: float = 0.0) -> None:
        self.samples: dict[Name, list[float]] = {name: [] for name in contestants}
        self._order = list(contestants.items())
        self._shuffle = random.Random(0).shuffle
        self._pause = pause

    def take(self) -> None:
        """Run one round."""
        self._shuffle(self._order)
        for name, function in self._order:
            if self._pause:
                time.sleep(self._pause)
            begin = time.perf_counter()
            function()
            self.samples[name].append(time.perf_counter() - begin)


def ratio(samples: Sequence[float], to: Sequence[float]) -> float:
    """Median over the rounds of one contestant's time as a multiple of another's."""
    return statistics.median(a / b for a, b in zip(samples, to, strict=True))


def percentiles(samples: Sequence[float]) -> dict[str, float]:
    """p20, p50 and p80, in the unit of the samples."""
    if len(samples) == 1:
        return dict.fromkeys(("p20", "p50", "p80"), samples[0])
    # Inclusive: the samples' own range, also where there are only a few.
    cuts = statistics.quantiles(samples, n=10, method="inclusive")
    return {"p20": cuts[1], "p50": cuts[4], "p80": cuts[7]}
