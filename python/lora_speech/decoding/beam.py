"""Whisper's beam search over one preallocated key/value cache that is never copied.

A row of the decoder is one hypothesis of one utterance. Where each position of its history lives
in the self-attention's cache says a table of small integers; to go on from another hypothesis is
to copy a row of that table. Keys and values of the cross-attention are one per utterance, read by
all of its hypotheses. Under INT8 the candidates and their log-probabilities are the epilogue of
the vocabulary's product, and the recorded step serves until an utterance leaves the batch; on a
GPU none leaves, and the step is the replay of a graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from lora_speech.decoding.beam_search import BeamSearch
from lora_speech.decoding.greedy import Hypotheses, begin_decoding
from lora_speech.decoding.prompts import SpecialTokens, TimestampRules
from lora_speech.decoding.stepping import Steps, likeliest
from lora_speech.errors import ModelError

MOST_BEAMS = 100
"""A step asks for twice as many candidates and one more, and `int8_lora_topk` has at most 256."""

MOST_LENGTH_PENALTY = 10.0
"""Lengths to this power, either way, are still floating-point numbers."""


@torch.inference_mode()
def beam_decode(
    model: Any,
    features: torch.Tensor | None = None,
    *,
    encoded: torch.Tensor | None = None,
    beams: int = 5,
    length_penalty: float = 1.0,
    adapters: Any = None,
    language: str | Sequence[str | None] | None = None,
    task: str = "transcribe",
    timestamps: bool = False,
    max_new_tokens: int | None = None,
    min_new_tokens: int = 0,
) -> Hypotheses:
    """Decode a batch of feature windows by beam search.

    The search of `transformers`' `generate(num_beams=beams, do_sample=False)`: the same hypotheses
    but for ties, under INT8 within what its rounding decides. With one beam it is `greedy_decode`.

    Parameters
    ----------
    model, features, encoded
        As `greedy_decode` has them.
    beams : int
        Hypotheses kept per utterance, 1 to 100.
    length_penalty : float
        Exponent of the length that a hypothesis' log-probability is divided by: above 0 it favours
        long hypotheses, below 0 short ones.
    adapters, language, task, timestamps, max_new_tokens, min_new_tokens
        As `greedy_decode` has them.

    Returns
    -------
    Hypotheses
        The best of each utterance, with its score.

    Raises
    ------
    ModelError
        The beams, length penalty, batch, language, task or lengths do not fit the model.
    """
    _check(beams, length_penalty)
    start = begin_decoding(
        model, features, encoded, adapters, language, task, timestamps, max_new_tokens, beams
    )
    tokens, prompts = start.decoder.tokens, start.prompts
    searches = [BeamSearch(beams, tokens.end, start.limit, length_penalty) for _ in prompts]
    left_out = _LeftOut(tokens, timestamps, min_new_tokens, prompts.device)
    try:
        count = _search_to_end(searches, start.steps, prompts, left_out)
    finally:
        start.steps.close()
    best = [search.best for search in searches]
    return Hypotheses(
        [hypothesis.tokens for hypothesis in best],
        start.languages,
        count,
        [hypothesis.score for hypothesis in best],
    )


class _LeftOut:
    """Tokens that no hypothesis may go on with, and when."""

    def __init__(
        self, tokens: SpecialTokens, timestamps: bool, min_new_tokens: int, device: torch.device
    ) -> None:
        self.end, self.min_new_tokens = tokens.end, min_new_tokens
        self.rules = TimestampRules(tokens) if timestamps else None
        self._never = torch.tensor(tokens.suppressed, dtype=torch.int64, device=device)
        self._first = torch.tensor(tokens.suppressed_first, dtype=torch.int64, device=device)

    def of_logits(self, active: list[BeamSearch], step: int, logits: torch.Tensor) -> None:
        """Mask logits [rows, vocabulary] in place."""
        logits.index_fill_(-1, self._never, -math.inf)
        if step == 0:
            logits.index_fill_(-1, self._first, -math.inf)
        if step < self.min_new_tokens:
            logits[:, self.end] = -math.inf
        if self.rules is not None:
            self.rules(logits, [emitted for search in active for emitted in search.tokens])

    def of_candidates(self, step: int, values: torch.Tensor, columns: torch.Tensor) -> None:
        """Mask what a later step found among the tokens that are not suppressed, in place."""
        if step < self.min_new_tokens:
            values.masked_fill_(columns == self.end, -math.inf)


def _search_to_end(
    searches: list[BeamSearch], steps: Steps, prompts: torch.Tensor, left_out: _LeftOut
) -> int:
    """Run all searches; return the steps after the prompt."""
    prompt_length, device = prompts.shape[1], prompts.device
    beams, limit = searches[0].beams, searches[0].limit
    count = searches[0].candidates + 1  # one of them may be an end that comes too early
    active, chosen = searches, prompts
    for step in range(limit):
        begin = prompt_length + step - 1 if step else 0
        if step == 0 or left_out.rules is not None:
            logits = steps.logits(chosen, begin, suppress=False)
            found = likeliest(logits, count, partial(left_out.of_logits, active, step))
        else:
            found = steps.candidates(chosen, begin, count)
            left_out.of_candidates(step, *found)
        parents = _advance(active, *found)
        kept = [place for place, search in enumerate(active) if not search.done]
        if not kept:
            return step
        if step == 0:
            steps.fan_out(beams)
        steps.follow(parents, prompt_length + step)
        if len(kept) < len(active):
            rows = [place * beams + beam for place in kept for beam in range(beams)]
            steps.keep(torch.tensor(rows, device=device))
            active = [active[place] for place in kept]
        chosen = torch.tensor(
            [[emitted[-1]] for search in active for emitted in search.tokens], device=device
        )
    return limit


def _advance(searches: list[BeamSearch], values: torch.Tensor, columns: torch.Tensor) -> list[int]:
    """Take a step of each search; return the row that each row continues."""
    all_values, all_columns = values.tolist(), columns.tolist()
    parents: list[int] = []
    at = 0
    for place, search in enumerate(searches):
        to = at + len(search.tokens)
        found = search.advance(all_values[at:to], all_columns[at:to])
        parents += [place * search.beams + parent for parent in found]
        at = to
    return parents


def _check(beams: int, length_penalty: float) -> None:
    if isinstance(beams, bool) or not isinstance(beams, int) or not 1 <= beams <= MOST_BEAMS:
        raise ModelError(f"beams: expected 1 to {MOST_BEAMS}, got {beams!r}; 5 is usual")
    if not abs(length_penalty) <= MOST_LENGTH_PENALTY:
        raise ModelError(
            f"length_penalty: expected {-MOST_LENGTH_PENALTY:g} to {MOST_LENGTH_PENALTY:g}, got "
            f"{length_penalty}; 1.0 is usual"
        )
