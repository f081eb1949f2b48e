"""What another device decoded, judged by the CPU: its choices, and the scores of its beams.

Two devices add up in different orders, and INT8 makes that visible here and there, so that tokens
of a random model part where two are about as likely. What is asked is that each token be the one
that the CPU takes after those before it, or as good as that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from lora_speech.decoding.adapter_rows import AdapterRows
from lora_speech.decoding.greedy import Hypotheses
from lora_speech.decoding.prompts import TimestampRules, prompt_tokens
from lora_speech.decoding.stepping import FlatSteps, RecordedSteps
from lora_speech.decoding.whisper_decoder import WhisperDecoder
from lora_speech.models.loading import SpeechModel

TIE = 0.15
"""Of the standard deviation of a step's logits: so near to the largest is as good."""

EXACT = 0.9
"""Of all choices: those that are the largest itself."""


@torch.inference_mode()
def encode(
    speech: SpeechModel, features: torch.Tensor, names: Sequence[str | None]
) -> torch.Tensor:
    """The encoder's output where the model is, [batch, positions, width], on the CPU."""
    rows = AdapterRows.of(speech.model, names, len(features))
    return WhisperDecoder(speech.model, rows).encode(features.to(speech.device)).cpu()


@torch.inference_mode()
def check_choices(
    model: Any,
    encoded: torch.Tensor,
    found: Hypotheses,
    names: Sequence[str | None],
    *,
    timestamps: bool = False,
    limit: int,
) -> None:
    """Whether a greedy search took the CPU's choices.

    Parameters
    ----------
    model : WhisperForConditionalGeneration
        On the CPU.
    encoded : Tensor
        [batch, positions, width], what was decoded, on the CPU.
    found : Hypotheses
        What another device found, of at most `limit` tokens.
    names : sequence of (str or None)
        Adapter of each row.
    """
    exact = total = 0
    for row, emitted in enumerate(found.tokens):
        steps = _Alone(model, encoded[row : row + 1], names[row])
        tokens = steps.tokens
        rules = TimestampRules(tokens) if timestamps else None
        known = prompt_tokens(tokens, found.languages[row], timestamps=timestamps)
        ended = [tokens.end] if len(emitted) < limit else []
        for place, token in enumerate([*emitted, *ended]):
            logits = steps.after(known)
            spread = logits[logits.isfinite()].std()
            if place == 0:
                logits[list(tokens.suppressed_first)] = -math.inf
            if rules is not None:
                rules(logits[None], [emitted[:place]])
            short = float((logits.max() - logits[token]) / spread)
            assert short <= TIE, f"row {row}, token {place}: {token} is {short:.3f} deviations off"
            exact, total, known = exact + (short == 0.0), total + 1, [token]
    assert exact >= EXACT * total, f"{exact} of {total} choices are the CPU's"


@torch.inference_mode()
def check_scores(
    model: Any,
    encoded: torch.Tensor,
    found: Hypotheses,
    expected: Hypotheses,
    names: Sequence[str | None],
    *,
    timestamps: bool = False,
    limit: int,
) -> None:
    """Whether a beam search's scores are the CPU's of its tokens, and as good as the CPU's search.

    Parameters are those of `check_choices`, and what the CPU found, with a length penalty of 1.
    """
    assert found.scores is not None and expected.scores is not None
    for row, emitted in enumerate(found.tokens):
        steps = _Alone(model, encoded[row : row + 1], names[row])
        known = prompt_tokens(steps.tokens, found.languages[row], timestamps=timestamps)
        total, sequence = 0.0, [*emitted, steps.tokens.end][:limit]
        for token in sequence:
            logits = steps.after(known, suppress=False).float()
            total, known = total + float(logits.log_softmax(-1)[token]), [token]
        score = total / len(sequence)
        assert abs(found.scores[row] - score) < 0.02, f"row {row}: {found.scores[row]}, not {score}"
        assert found.scores[row] > expected.scores[row] - 0.2, f"row {row}: a worse search"


class _Alone:
    """Steps of one utterance on the CPU, call by call."""

    def __init__(self, model: Any, encoded: torch.Tensor, name: str | None) -> None:
        decoder = WhisperDecoder(model, AdapterRows.of(model, [name], 1))
        self.tokens = decoder.tokens
        state = decoder.start(encoded, self.tokens.max_positions)
        self.steps: Any = (RecordedSteps if decoder.parts else FlatSteps)(decoder, state)
        self.length = 0

    def after(self, tokens: list[int], suppress: bool = True) -> torch.Tensor:
        """Logits [vocabulary] after some more tokens."""
        logits = self.steps.logits(torch.tensor([tokens]), self.length, suppress)
        self.length += len(tokens)
        return logits[0]
