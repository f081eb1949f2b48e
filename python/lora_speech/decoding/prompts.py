"""Whisper's special tokens: prompts, languages, suppression and timestamp rules, label sequences.

Everything is read from the model's own `generation_config` and tokenizer; nothing assumes the
released checkpoints' numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lora_speech.errors import ModelError


@dataclass(frozen=True)
class SpecialTokens:
    """Token ids that steer one Whisper model.

    Attributes
    ----------
    start, end : int
        `<|startoftranscript|>` and `<|endoftext|>`.
    no_timestamps : int or None
        `<|notimestamps|>`; None where the model knows no timestamps.
    languages : dict
        Token per language code; empty for an English-only model.
    tasks : dict
        Token per task; empty for an English-only model.
    suppressed, suppressed_first : tuple of int
        Tokens never emitted, and not emitted first.
    max_positions : int
        Decoder positions, prompt included.
    default_max_length : int
        New tokens at most, where nothing else is asked.
    max_initial_timestamp : int or None
        Largest index of the first timestamp.
    seconds_per_timestamp : float
        Time between two timestamp tokens.
    """

    start: int
    end: int
    no_timestamps: int | None
    languages: dict[str, int]
    tasks: dict[str, int]
    suppressed: tuple[int, ...]
    suppressed_first: tuple[int, ...]
    max_positions: int
    default_max_length: int
    max_initial_timestamp: int | None
    seconds_per_timestamp: float

    @property
    def first_timestamp(self) -> int | None:
        """Id of `<|0.00|>`, the first timestamp token."""
        return None if self.no_timestamps is None else self.no_timestamps + 1

    def language_id(self, language: str) -> int:
        """Token of a language given as code (`"en"`), name (`"english"`) or token."""
        code = language.strip().lower().strip("<|>")
        if code not in self.languages:
            from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

            code = TO_LANGUAGE_CODE.get(code, code)
        if code not in self.languages:
            known = ", ".join(sorted(self.languages)) or "none: it knows English only"
            raise ModelError(
                f"language: expected one that the model knows ({known}), got {language!r}; "
                "choose one of them, or leave it out to detect it"
            )
        return self.languages[code]


def special_tokens(model: Any) -> SpecialTokens:
    """Read the special tokens of a `WhisperForConditionalGeneration`."""
    generation, config = model.generation_config, model.config
    end = generation.eos_token_id if generation.eos_token_id is not None else config.eos_token_id
    languages = getattr(generation, "lang_to_id", None) or {}
    multilingual = getattr(generation, "is_multilingual", True)
    # Whisper's own resolution: one timestamp token per encoder position, that is two mel frames.
    seconds = 0.02
    return SpecialTokens(
        start=int(generation.decoder_start_token_id or config.decoder_start_token_id),
        end=int(end[0] if isinstance(end, (list, tuple)) else end),
        no_timestamps=getattr(generation, "no_timestamps_token_id", None),
        languages={key.strip("<|>"): value for key, value in languages.items()}
        if multilingual
        else {},
        tasks=dict(getattr(generation, "task_to_id", None) or {}) if multilingual else {},
        suppressed=tuple(generation.suppress_tokens or ()),
        suppressed_first=tuple(generation.begin_suppress_tokens or ()),
        max_positions=int(config.max_target_positions),
        default_max_length=int(generation.max_length or config.max_target_positions),
        max_initial_timestamp=getattr(generation, "max_initial_timestamp_index", None),
        seconds_per_timestamp=seconds,
    )


def prompt_tokens(
    tokens: SpecialTokens,
    language: str | int | None = None,
    *,
    task: str = "transcribe",
    timestamps: bool = False,
) -> list[int]:
    """Build the decoder's prompt.

    Parameters
    ----------
    tokens : SpecialTokens
        Of the model.
    language : str or int, optional
        Code, name or token id; None leaves it out (English-only models).
    task : {"transcribe", "translate"}
        Which of Whisper's tasks.
    timestamps : bool
        Whether the model shall write timestamps.

    Returns
    -------
    list of int
        Start, language, task, and `<|notimestamps|>` where asked.
    """
    prompt = [tokens.start]
    if tokens.languages and language is not None:
        prompt.append(language if isinstance(language, int) else tokens.language_id(language))
    if tokens.tasks:
        if task not in tokens.tasks:
            raise ModelError(
                f"task: expected one of {', '.join(sorted(tokens.tasks))}, got {task!r}; "
                "choose one of them"
            )
        prompt.append(tokens.tasks[task])
    if timestamps and tokens.no_timestamps is None:
        raise ModelError(
            "timestamps: expected a model with timestamp tokens, got one whose generation_config "
            "has no no_timestamps_token_id; transcribe without timestamps"
        )
    if not timestamps and tokens.no_timestamps is not None:
        prompt.append(tokens.no_timestamps)
    return prompt


def training_tokens(
    tokenizer: Any,
    tokens: SpecialTokens,
    text: str,
    language: str | None,
    *,
    text_prefix: str = "",
) -> tuple[list[int], list[int]]:
    """Build decoder input and labels of one transcript.

    Returns
    -------
    decoder_input : list of int
        Prompt, then the text's tokens.
    labels : list of int
        What each position predicts: -100 (ignored) inside the prompt, then the text and end.
    """
    language = language or default_language(tokens)
    prompt = prompt_tokens(tokens, language)
    words = tokenizer(text_prefix + text.strip(), add_special_tokens=False)["input_ids"]
    return prompt + words, [-100] * (len(prompt) - 1) + words + [tokens.end]


def default_language(tokens: SpecialTokens) -> str | None:
    """English where the model knows languages, else None."""
    if not tokens.languages:
        return None
    return "en" if "en" in tokens.languages else next(iter(tokens.languages))


def language_codes(
    language: str | Sequence[str | None] | None, batch: int, tokens: SpecialTokens
) -> list[str | None]:
    """Settle the language code of each row: given for all, per row, or None to be detected."""
    if not tokens.languages:
        return [None] * batch
    given = [language] * batch if language is None or isinstance(language, str) else list(language)
    if len(given) != batch:
        raise ModelError(
            f"language: expected one for all or one per row ({batch}), got {len(given)}; "
            "give as many as there are recordings"
        )
    codes = {token: code for code, token in tokens.languages.items()}
    return [None if code is None else codes[tokens.language_id(code)] for code in given]


def token_limit(tokens: SpecialTokens, prompt_length: int, asked: int | None) -> int:
    """New tokens at most: what was asked, or what the model's configuration allows."""
    room = tokens.max_positions - prompt_length
    if asked is None:
        return max(1, min(tokens.default_max_length, room))
    if not 1 <= asked <= room:
        raise ModelError(
            f"max_new_tokens: expected 1 to {room} ({tokens.max_positions} positions less "
            f"{prompt_length} of the prompt), got {asked}; ask for fewer"
        )
    return asked


class TimestampRules:
    """Whisper's constraints on timestamp tokens, applied to one step's logits in place.

    Timestamps come in pairs except before the end, never decrease, the first token is one, and
    where all timestamps together are likelier than any single text token, one of them is chosen.
    The same rules as `transformers`' `WhisperTimeStampLogitsProcessor`.
    """

    def __init__(self, tokens: SpecialTokens) -> None:
        if tokens.no_timestamps is None or tokens.first_timestamp is None:
            raise ModelError("timestamps: the model has no timestamp tokens; leave them out")
        self.tokens = tokens
        self.begin = tokens.first_timestamp

    def __call__(self, logits: torch.Tensor, emitted: Sequence[Sequence[int]]) -> None:
        """Mask `logits` [rows, vocabulary] given the tokens emitted so far in each row."""
        begin, end = self.begin, self.tokens.end
        logits[:, self.tokens.no_timestamps] = -math.inf
        for row, sequence in enumerate(emitted):
            last_is = len(sequence) >= 1 and sequence[-1] >= begin
            before_is = len(sequence) < 2 or sequence[-2] >= begin
            if last_is and before_is:
                logits[row, begin:] = -math.inf
            elif last_is:
                logits[row, :end] = -math.inf
            stamps = [token for token in sequence if token >= begin]
            if stamps:
                # The second of a pair may equal the first of the next one, nothing else may repeat.
                lowest = stamps[-1] if last_is and not before_is else stamps[-1] + 1
                logits[row, begin:lowest] = -math.inf
            if not sequence:
                logits[row, :begin] = -math.inf
                if self.tokens.max_initial_timestamp is not None:
                    logits[row, begin + self.tokens.max_initial_timestamp + 1 :] = -math.inf
        log_probabilities = torch.log_softmax(logits.float(), dim=-1)
        stamp_mass = log_probabilities[:, begin:].logsumexp(dim=-1)
        best_text = log_probabilities[:, :begin].max(dim=-1).values
        for row in (stamp_mass > best_text).nonzero().flatten().tolist():
            logits[row, :begin] = -math.inf
