"""How a decoder takes its steps: call by call, or recorded and run in one call each."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch

from lora_speech.decoding.decoder_step import Head, RecordedStep, suppressing_bias

if TYPE_CHECKING:
    from lora_speech.decoding.whisper_decoder import DecoderState, WhisperDecoder


class Steps(Protocol):
    """Steps of one decoder over one batch: one row per utterance, until it fans out."""

    def logits(self, tokens: torch.Tensor, begin: int, suppress: bool = True) -> torch.Tensor:
        """Logits [rows, vocabulary] after new tokens [rows, count] at position `begin`.

        The caller may write to them. `suppress` takes out the tokens that Whisper never emits.
        """

    def choose(self, tokens: torch.Tensor, begin: int, may_end: bool) -> torch.Tensor:
        """Likeliest token of each row, int64 [rows], after one new token [rows, 1]."""

    def candidates(
        self, tokens: torch.Tensor, begin: int, count: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Likeliest tokens of each row and their log-probabilities, after one new token [rows, 1].

        fp32 and int64 [rows, count], likeliest first, as `likeliest` has them, without the tokens
        that Whisper never emits.
        """

    def fan_out(self, beams: int) -> None:
        """Go on with `beams` rows per utterance, side by side; the prompt is in the cache."""

    def follow(self, parents: list[int], length: int) -> None:
        """After `fan_out`: each row goes on from another, or itself, at `length` positions.

        Parameters
        ----------
        parents : list of int
            One per row that is left, a place among those.
        length : int
            Positions of each in the cache.
        """

    def keep(self, index: torch.Tensor) -> None:
        """Go on with some of the rows only: int64, places among those that are left."""

    def close(self) -> None:
        """The search is over."""


def likeliest(
    logits: torch.Tensor, count: int, leave_out: Callable[[torch.Tensor], object]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Likeliest tokens of each row and their log-probabilities, fp32 and int64 [rows, count].

    `leave_out` writes minus infinity over logits in place. What is left out keeps its share of the
    probabilities, as under the logits processors of `transformers`' beam search.
    """
    logits = logits.float()
    log_sum = logits.logsumexp(-1, keepdim=True)
    leave_out(logits)
    values, columns = logits.topk(count)
    return values - log_sum, columns


class FlatSteps:
    """Steps of a decoder whose linears are in floating point, or not ours to read."""

    def __init__(self, decoder: WhisperDecoder, state: DecoderState) -> None:
        self.decoder, self.state = decoder, state
        self.suppressed = torch.tensor(
            decoder.tokens.suppressed, dtype=torch.int64, device=decoder.embedding.device
        )

    def logits(self, tokens: torch.Tensor, begin: int, suppress: bool = True) -> torch.Tensor:
        """See `Steps`."""
        rows = tokens.shape[0]
        lengths = torch.full((rows,), begin, dtype=torch.int32, device=tokens.device)
        hidden = self.decoder.hidden(tokens, lengths, begin, self.state)[:, -1:]
        project = self.decoder.vocabulary if suppress else self.decoder.all_tokens
        return project(hidden, None)[:, 0]

    def choose(self, tokens: torch.Tensor, begin: int, may_end: bool) -> torch.Tensor:
        """See `Steps`."""
        logits = self.logits(tokens, begin)
        if not may_end:
            logits[..., self.decoder.tokens.end] = -math.inf
        return logits.argmax(-1)

    def candidates(
        self, tokens: torch.Tensor, begin: int, count: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Steps`."""
        return likeliest(
            self.logits(tokens, begin, suppress=False),
            count,
            lambda logits: logits.index_fill_(-1, self.suppressed, -math.inf),
        )

    def fan_out(self, beams: int) -> None:
        """See `Steps`."""
        self.state.fan_out(beams)

    def follow(self, parents: list[int], length: int) -> None:
        """See `Steps`."""
        self.state.follow(parents, length)

    def keep(self, index: torch.Tensor) -> None:
        """See `Steps`."""
        self.state.keep(index)

    def close(self) -> None:
        """See `Steps`."""


class RecordedSteps:
    """Steps of an INT8 decoder, each kind recorded when it is first needed."""

    def __init__(self, decoder: WhisperDecoder, state: DecoderState) -> None:
        self.decoder, self.state = decoder, state
        tokens, words = decoder.tokens, decoder.embedding.shape[0]
        self.bias = suppressing_bias(tokens.suppressed, words, decoder.embedding.device)
        self.end_bias = float(self.bias[tokens.end])
        self.may_end = True
        self.left_out: tuple[torch.Tensor, int] | None = None
        self.recorded: dict[tuple[int, Head, bool, int], RecordedStep] = {}

    def _step(self, count: int, head: Head, suppress: bool, candidates: int = 1) -> RecordedStep:
        key = (count, head, suppress, candidates)
        step = self.recorded.get(key)
        if step is None:
            state, parts = self.state, self.decoder.parts
            assert parts is not None
            bias = self.bias if suppress else None
            if head == "candidates" and self.left_out is None and self.decoder.tokens.suppressed:
                self.left_out = parts.packed_words(self.decoder.tokens.suppressed)
            step = RecordedStep(
                parts, state.self_cache, state.cross_cache, state.rows, state.slots,
                state.cross_slots, state.cross_lengths, count, head, bias, candidates,
                self.left_out,
            )  # fmt: skip
            self.recorded[key] = step
        return step

    def _run(self, step: RecordedStep, tokens: torch.Tensor, begin: int) -> None:
        step.run(tokens, begin)

    def _rows_left(self, result: torch.Tensor) -> torch.Tensor:
        """Of a step's result the rows that are left: all, where others leave the step."""
        return result

    def _let_end(self, may_end: bool) -> None:
        if may_end != self.may_end:
            self.bias[self.decoder.tokens.end] = self.end_bias if may_end else -math.inf
            self.may_end = may_end

    def logits(self, tokens: torch.Tensor, begin: int, suppress: bool = True) -> torch.Tensor:
        """See `Steps`."""
        self._let_end(True)
        step = self._step(tokens.shape[1], "logits", suppress)
        self._run(step, tokens, begin)
        return self._rows_left(step.result)

    def choose(self, tokens: torch.Tensor, begin: int, may_end: bool) -> torch.Tensor:
        """See `Steps`."""
        self._let_end(may_end)
        step = self._step(1, "choice", True)
        self._run(step, tokens, begin)
        return self._rows_left(step.result)[:, 0]

    def candidates(
        self, tokens: torch.Tensor, begin: int, count: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Steps`."""
        self._let_end(True)
        step = self._step(1, "candidates", True, count)
        self._run(step, tokens, begin)
        values = step.values - torch.logaddexp(*step.log_sums)
        return self._rows_left(values), self._rows_left(step.result)

    def fan_out(self, beams: int) -> None:
        """See `Steps`."""
        self.state.fan_out(beams)
        self.recorded.clear()

    def follow(self, parents: list[int], length: int) -> None:
        """See `Steps`."""
        self.state.follow(parents, length)

    def keep(self, index: torch.Tensor) -> None:
        """See `Steps`."""
        self.state.keep(index)
        self.recorded.clear()

    def close(self) -> None:
        """See `Steps`."""
