"""Whether an exported model says what the torch model says, on the same recordings."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from lora_speech.decoding import greedy_decode
from lora_speech.errors import ModelError
from lora_speech.export.target import Plan, Recognizer
from lora_speech.features import extract_features
from lora_speech.prompts import default_language, prompt_tokens, special_tokens, token_limit
from lora_speech.transcription import decode_text


@dataclass(frozen=True)
class Comparison:
    """One recording by one adapter, by torch and by the export.

    Attributes
    ----------
    recording : str
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
    torch_ms, export_ms : float
        Time of encoding and decoding, the first run aside.
    """

    recording: str
    adapter: str | None
    expected: str
    got: str
    tokens: int
    same: int
    identical: bool
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
    import jiwer

    model = plan.model
    tokens = special_tokens(model.model)
    language = default_language(tokens)
    prompt = prompt_tokens(tokens, language)
    limit = token_limit(tokens, len(prompt), None)
    longest = int((model.window_seconds or 30.0) * model.sampling_rate)
    comparisons = []
    for name, samples in zip(names, recordings, strict=True):
        features = extract_features(model, [samples[:longest]])[model.family.features.input_name]
        for adapter in (None, *plan.live):

            def by_torch(features: torch.Tensor = features, adapter: str | None = adapter) -> Any:
                chosen = [adapter] if plan.live else None
                found = greedy_decode(model.model, features, adapters=chosen, language=language)
                return found.tokens[0]

            def by_export(features: torch.Tensor = features, adapter: str | None = adapter) -> Any:
                return recognizer.decode(features.numpy(), prompt, limit, adapter)

            expected, torch_ms = _timed(by_torch)
            got, export_ms = _timed(by_export)
            pairs = zip(expected, got, strict=False)
            differ = next((at for at, (a, b) in enumerate(pairs) if a != b), None)
            same = min(len(expected), len(got)) if differ is None else differ
            comparisons.append(
                Comparison(
                    name,
                    adapter,
                    decode_text(model, expected),
                    decode_text(model, got),
                    len(expected),
                    same,
                    expected == got,
                    torch_ms,
                    export_ms,
                )
            )
    heard = [c for c in comparisons if c.expected]
    if not heard:
        raise ModelError(
            "check: expected recordings in which the model hears words, got none "
            f"({', '.join(names)}); name some with --check FILE"
        )
    extra = sum(len(c.got.split()) for c in comparisons if not c.expected)
    words = sum(len(c.expected.split()) for c in heard)
    wer = float(jiwer.wer([c.expected for c in heard], [c.got for c in heard])) + extra / words
    return Check(comparisons, wer)


def _timed(run: Any) -> tuple[list[int], float]:
    run()
    begin = time.perf_counter()
    found = run()
    return list(found), 1000 * (time.perf_counter() - begin)
