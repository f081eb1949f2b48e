"""Beam search over one utterance: which hypotheses go on, which are finished, when it ends.

The search is that of `transformers`' `generate(num_beams=..., do_sample=False)` with its default
`early_stopping=False`. It knows no model and no tensor: it is told the likeliest next tokens of
every hypothesis and says which hypothesis each of the next ones extends. A decoder runs one search
per utterance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Hypothesis:
    """A finished hypothesis.

    Attributes
    ----------
    score : float
        Log-probability of its tokens and the end of text, divided by their count to the power of
        the length penalty.
    tokens : list of int
        Without the end of text.
    """

    score: float
    tokens: list[int]


class BeamSearch:
    """Search of one utterance.

    Parameters
    ----------
    beams : int
        Hypotheses that are kept, running and finished alike.
    end : int
        End of text.
    limit : int
        Tokens at most, the end of text counted.
    length_penalty : float
        Exponent of the length that divides a finished hypothesis' log-probability: above 0 it
        favours long hypotheses, below 0 short ones.

    Attributes
    ----------
    tokens : list of list of int
        Running hypotheses, likeliest first: one without tokens before the first step, then `beams`.
    scores : list of float
        Their log-probabilities.
    finished : list of Hypothesis
        At most `beams`, best first.
    done : bool
        Whether no running hypothesis is expected to beat the finished ones.
    """

    def __init__(self, beams: int, end: int, limit: int, length_penalty: float = 1.0) -> None:
        self.beams, self.end, self.limit, self.length_penalty = beams, end, limit, length_penalty
        self.tokens: list[list[int]] = [[]]
        self.scores = [0.0]
        self.finished: list[Hypothesis] = []
        self.done = False
        self._length = 0

    @property
    def candidates(self) -> int:
        """Likeliest next tokens that a step looks at, over all hypotheses.

        Twice the beams: each hypothesis may end, and as many as there are beams still go on.
        """
        return 2 * self.beams

    @property
    def best(self) -> Hypothesis:
        """The result, once the search is done."""
        return self.finished[0] if self.finished else Hypothesis(-math.inf, [])

    def advance(
        self, log_probabilities: Sequence[Sequence[float]], tokens: Sequence[Sequence[int]]
    ) -> list[int]:
        """Take one step.

        Parameters
        ----------
        log_probabilities, tokens : sequence of sequences
            Of each running hypothesis, its likeliest next tokens, likeliest first: as many for
            all, and at least `candidates`. One of minus infinity is no candidate.

        Returns
        -------
        list of int
            Of each of the `beams` hypotheses that run now, the one before the step that it
            extends.
        """
        width = len(tokens[0])
        totals = [
            score + value
            for score, row in zip(self.scores, log_probabilities, strict=True)
            for value in row
        ]
        # A stable sort: of equals, the likelier parent's comes first.
        order = sorted(range(len(totals)), key=totals.__getitem__, reverse=True)
        self._length = length = self._length + 1
        penalty = length**self.length_penalty
        scores: list[float] = []
        parents: list[int] = []
        extended: list[list[int]] = []
        for rank, choice in enumerate(order[: self.candidates]):
            score = totals[choice]
            if score == -math.inf:
                break
            parent = choice // width
            token = tokens[parent][choice % width]
            ends = token == self.end
            if ends or length == self.limit:
                # One that ends below the first `beams` would not have been kept had it gone on.
                if rank < self.beams:
                    text = self.tokens[parent]
                    text = text if ends else [*text, token]
                    self.finished.append(Hypothesis(score / penalty, text))
            elif len(scores) < self.beams:
                scores.append(score)
                parents.append(parent)
                extended.append([*self.tokens[parent], token])
        self.finished.sort(key=lambda hypothesis: hypothesis.score, reverse=True)
        del self.finished[self.beams :]
        self.done = not scores or (
            len(self.finished) == self.beams and scores[0] / penalty <= self.finished[-1].score
        )
        # With fewer tokens to choose from than beams, the rest repeat the first without a chance.
        spare = self.beams - len(scores)
        scores += [-math.inf] * spare
        parents += (parents[:1] or [0]) * spare
        extended += (extended[:1] or [[]]) * spare
        self.scores, self.tokens = scores, extended
        return parents
