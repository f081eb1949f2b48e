"""How a decoder takes its steps: call by call, or recorded and run in one call each."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

import torch

from lora_speech.decoder_step import Head, RecordedStep, suppressing_bias

if TYPE_CHECKING:
    from lora_speech.whisper_decoder import DecoderState, WhisperDecoder


class Steps(Protocol):
    """Steps of one decoder over one batch.

    Attributes
    ----------
    state : DecoderState
        Cache and routing; rows that leave the batch leave it here, then `keep` is called.
    """

    state: DecoderState

    def logits(self, tokens: torch.Tensor, begin: int, suppress: bool = True) -> torch.Tensor:
        """Logits [rows, vocabulary] after new tokens [rows, count] at position `begin`.

        The caller may write to them. `suppress` takes out the tokens that Whisper never emits.
        """

    def choose(self, tokens: torch.Tensor, begin: int, may_end: bool) -> torch.Tensor:
        """Likeliest token of each row, int64 [rows], after one new token [rows, 1]."""

    def keep(self) -> None:
        """Go on with the rows that the state names now."""


class FlatSteps:
    """Steps of a decoder whose linears are in floating point, or not ours to read."""

    def __init__(self, decoder: WhisperDecoder, state: DecoderState) -> None:
        self.decoder, self.state = decoder, state

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

    def keep(self) -> None:
        """See `Steps`: nothing is kept between steps."""


class RecordedSteps:
    """Steps of an INT8 decoder, each kind recorded when it is first needed."""

    def __init__(self, decoder: WhisperDecoder, state: DecoderState) -> None:
        self.decoder, self.state = decoder, state
        tokens, words = decoder.tokens, decoder.embedding.shape[0]
        self.bias = suppressing_bias(tokens.suppressed, words)
        self.end_bias = float(self.bias[tokens.end])
        self.recorded: dict[tuple[int, Head, bool], RecordedStep] = {}

    def _step(self, count: int, head: Head, suppress: bool) -> RecordedStep:
        key = (count, head, suppress)
        step = self.recorded.get(key)
        if step is None:
            state, parts = self.state, self.decoder.parts
            assert parts is not None
            bias = self.bias if suppress else None
            step = RecordedStep(
                parts, state.self_cache, state.cross_cache, state.rows, state.slots,
                state.cross_lengths, count, head, bias,
            )  # fmt: skip
            self.recorded[key] = step
        return step

    def logits(self, tokens: torch.Tensor, begin: int, suppress: bool = True) -> torch.Tensor:
        """See `Steps`."""
        self.bias[self.decoder.tokens.end] = self.end_bias
        return self._step(tokens.shape[1], "logits", suppress).run(tokens, begin)

    def choose(self, tokens: torch.Tensor, begin: int, may_end: bool) -> torch.Tensor:
        """See `Steps`."""
        self.bias[self.decoder.tokens.end] = self.end_bias if may_end else -math.inf
        return self._step(1, "choice", True).run(tokens, begin)[:, 0]

    def keep(self) -> None:
        """See `Steps`."""
        self.recorded.clear()
