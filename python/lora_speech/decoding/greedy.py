"""Greedy decoding of Whisper, and what every search over its decoder starts from.

The tokens are those of `transformers`' `generate(do_sample=False, num_beams=1)`, but for ties that
the INT8 vocabulary breaks otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from lora_speech.decoding import graphed_steps
from lora_speech.decoding.adapter_rows import AdapterRows
from lora_speech.decoding.prompts import (
    TimestampRules,
    default_language,
    language_codes,
    prompt_tokens,
    token_limit,
)
from lora_speech.decoding.stepping import FlatSteps, RecordedSteps, Steps
from lora_speech.decoding.whisper_decoder import WhisperDecoder
from lora_speech.errors import ModelError


@dataclass(frozen=True)
class Hypotheses:
    """What was decoded for one batch.

    Attributes
    ----------
    tokens : list of list of int
        Emitted tokens per row, without the prompt and the end of text.
    languages : list of str or None
        Language code per row, detected or given; None for an English-only model.
    steps : int
        Decoder steps that were run after the prompt.
    scores : list of float or None
        Of a beam search: log-probability per row, divided by its length to the power of the
        length penalty (see `beam_search.Hypothesis`).
    """

    tokens: list[list[int]]
    languages: list[str | None]
    steps: int
    scores: list[float] | None = None


class Start(NamedTuple):
    """What a search over one batch starts from.

    Attributes
    ----------
    decoder : WhisperDecoder
    steps : Steps
        One row per utterance; nothing is in the cache yet.
    prompts : Tensor
        int64 [batch, prompt length].
    languages : list of str or None
        Code per row, given or detected.
    limit : int
        New tokens at most.
    """

    decoder: WhisperDecoder
    steps: Steps
    prompts: torch.Tensor
    languages: list[str | None]
    limit: int


@torch.inference_mode()
def greedy_decode(
    model: Any,
    features: torch.Tensor | None = None,
    *,
    encoded: torch.Tensor | None = None,
    adapters: Any = None,
    language: str | Sequence[str | None] | None = None,
    task: str = "transcribe",
    timestamps: bool = False,
    max_new_tokens: int | None = None,
    min_new_tokens: int = 0,
) -> Hypotheses:
    """Decode a batch of feature windows greedily.

    Parameters
    ----------
    model : WhisperForConditionalGeneration
        Plain, swapped, quantized, or a PEFT model of one.
    features : Tensor, optional
        [batch, mel bands, frames], see `features.extract_features`; on any device.
    encoded : Tensor, optional
        Instead of features: [batch, positions, width], the encoder's output for these adapters.
    adapters : str or sequence of (str or None), optional
        Adapter for all rows, or one per row (None: the base only).
    language : str or sequence, optional
        For all rows, or per row; None detects it (one step from the start token).
    task : {"transcribe", "translate"}
        Whisper's task token.
    timestamps : bool
        Let the model write timestamps, under Whisper's rules.
    max_new_tokens : int, optional
        At most this many tokens per row; by default what `generation_config` allows.
    min_new_tokens : int
        The end of text is suppressed before this many.

    Returns
    -------
    Hypotheses

    Raises
    ------
    ModelError
        The batch, language, task or lengths do not fit the model.
    """
    start = begin_decoding(
        model, features, encoded, adapters, language, task, timestamps, max_new_tokens
    )
    try:
        emitted, count = _step_to_end(
            start.decoder, start.steps, start.prompts, start.limit, min_new_tokens, timestamps
        )
    finally:
        start.steps.close()
    return Hypotheses(emitted, start.languages, count)


def begin_decoding(
    model: Any,
    features: torch.Tensor | None,
    encoded: torch.Tensor | None,
    adapters: Any,
    language: str | Sequence[str | None] | None,
    task: str,
    timestamps: bool,
    max_new_tokens: int | None,
    beams: int = 1,
) -> Start:
    """Encode a batch and settle all that a search starts from.

    Parameters are those of `greedy_decode`, and the hypotheses per utterance to make room for.
    """
    given = _one_of(features, encoded)
    batch = given.shape[0]
    rows = AdapterRows.of(model, adapters, batch)
    decoder = WhisperDecoder(model, rows)
    tokens, device = decoder.tokens, decoder.embedding.device
    given = given.to(device)  # features are made on the host: here they meet the model
    encoded = decoder.encode(given) if encoded is None else given
    languages = language_codes(language, batch, tokens)
    detect = bool(tokens.languages) and any(code is None for code in languages)
    prompt_length = len(
        prompt_tokens(tokens, default_language(tokens), task=task, timestamps=timestamps)
    )
    limit = token_limit(tokens, prompt_length, max_new_tokens)
    steps: Steps
    if decoder.parts and graphed_steps.pay_on(device):
        steps = graphed_steps.take(decoder, encoded, beams)
    else:
        state = decoder.start(encoded, prompt_length + limit, beams)
        steps = RecordedSteps(decoder, state) if decoder.parts else FlatSteps(decoder, state)
    if detect:
        languages = _detect_languages(decoder, steps, languages, batch, device)
    prompts = torch.tensor(
        [prompt_tokens(tokens, code, task=task, timestamps=timestamps) for code in languages],
        device=device,
    )
    return Start(decoder, steps, prompts, languages, limit)


def _step_to_end(
    decoder: WhisperDecoder,
    steps: Steps,
    prompts: torch.Tensor,
    limit: int,
    min_new_tokens: int,
    timestamps: bool,
) -> tuple[list[list[int]], int]:
    batch, prompt_length = prompts.shape
    tokens, device = decoder.tokens, prompts.device
    emitted: list[list[int]] = [[] for _ in range(batch)]
    active = list(range(batch))
    rules = TimestampRules(tokens) if timestamps else None
    first = torch.tensor(tokens.suppressed_first, dtype=torch.int64, device=device)
    end, chosen = tokens.end, prompts
    for step in range(limit):
        begin = prompt_length + step - 1 if step else 0
        if step == 0 or rules is not None:
            logits = steps.logits(chosen, begin)
            if step == 0 and first.numel():
                logits.index_fill_(-1, first, -math.inf)
            if step < min_new_tokens:
                logits[..., end] = -math.inf
            if rules is not None:
                rules(logits, [emitted[row] for row in active])
            best = logits.argmax(-1)
        else:
            best = steps.choose(chosen, begin, step >= min_new_tokens)
        finished = False
        for row, token in zip(active, best.tolist(), strict=True):
            if token == end:
                finished = True
            else:
                emitted[row].append(token)
        if finished:
            keep = (best != end).nonzero().view(-1)
            if not keep.numel():
                return emitted, step
            active = [active[index] for index in keep.tolist()]
            best = best[keep]
            steps.keep(keep)
        chosen = best[:, None]
    return emitted, limit


def _detect_languages(
    decoder: WhisperDecoder,
    steps: Steps,
    languages: list[str | None],
    batch: int,
    device: torch.device,
) -> list[str | None]:
    codes, ids = zip(*decoder.tokens.languages.items(), strict=True)
    start = torch.full((batch, 1), decoder.tokens.start, device=device)
    logits = steps.logits(start, 0, suppress=False)
    best = logits[:, list(ids)].argmax(-1).tolist()
    return [code or codes[index] for code, index in zip(languages, best, strict=True)]


def _one_of(features: torch.Tensor | None, encoded: torch.Tensor | None) -> torch.Tensor:
    given = features if encoded is None else encoded
    if given is None or (features is not None and encoded is not None):
        raise ModelError(
            "features: expected either features or encoded, got "
            f"{'neither' if given is None else 'both'}; give one of them"
        )
    if given.dim() != 3 or not given.shape[0]:
        expected = "features: expected a tensor [batch, mel bands, frames]"
        if encoded is not None:
            expected = "encoded: expected a tensor [batch, positions, width]"
        raise ModelError(
            f"{expected} of at least one row, got "
            f"{list(given.shape)}; make features with features.extract_features"
        )
    return given
