"""Whether an exported model says what the torch model says, on the same recordings."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from lora_speech.decoding import greedy_decode
from lora_speech.errors import ModelError
from lora_speech.export.ctc_decoding import CtcRecognizer, collapse
from lora_speech.export.folder import CtcDecoding
from lora_speech.export.graph_inputs import make_graphs
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

    speaker = _Whisper(plan, recognizer) if _is_whisper(plan) else _Ctc(plan, recognizer)
    window = plan.model.window_seconds
    longest = None if window is None else int(window * plan.model.sampling_rate)
    comparisons = []
    for name, samples in zip(names, recordings, strict=True):
        features = speaker.features(samples[:longest])
        for adapter in (None, *plan.live):
            for way, by_torch, by_export in speaker.ways(features, adapter):
                expected, torch_ms = _timed(by_torch)
                got, export_ms = _timed(by_export)
                comparisons.append(
                    Comparison(
                        name + way,
                        adapter,
                        speaker.text(expected),
                        speaker.text(got),
                        len(expected),
                        _same(expected, got),
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


def _is_whisper(plan: Plan) -> bool:
    return plan.model.family.objective == "sequence"


Way = tuple[str, Callable[[], Sequence[int]], Callable[[], Sequence[int]]]
"""What is added to the recording's name, and tokens by torch and by the export."""


class _Whisper:
    """Greedy decoding of one window."""

    def __init__(self, plan: Plan, recognizer: Recognizer) -> None:
        self.plan, self.recognizer = plan, recognizer
        tokens = special_tokens(plan.model.model)
        self.language = default_language(tokens)
        self.prompt = prompt_tokens(tokens, self.language)
        self.limit = token_limit(tokens, len(self.prompt), None)

    def features(self, samples: np.ndarray) -> torch.Tensor:
        model = self.plan.model
        return extract_features(model, [samples])[model.family.features.input_name]

    def ways(self, features: torch.Tensor, adapter: str | None) -> list[Way]:
        plan = self.plan

        def by_torch() -> Sequence[int]:
            chosen = [adapter] if plan.live else None
            return greedy_decode(
                plan.model.model, features, adapters=chosen, language=self.language
            ).tokens[0]

        def by_export() -> Sequence[int]:
            return self.recognizer.decode(features.numpy(), self.prompt, self.limit, adapter)

        return [("", by_torch, by_export)]

    def text(self, tokens: Sequence[int]) -> str:
        return decode_text(self.plan.model, tokens)


class _Ctc:
    """The likeliest path, of a whole recording and, where the export has steps, in these."""

    def __init__(self, plan: Plan, recognizer: Recognizer) -> None:
        self.plan, self.recognizer = plan, recognizer
        self.blank = int(plan.model.model.config.pad_token_id)
        self.stream: Any = None
        if getattr(getattr(recognizer, "decoding", None), "chunk", 0):
            graphs, decoding = make_graphs(plan)
            step = graphs["step"]

            def run(name: str, inputs: Any) -> dict[str, np.ndarray]:
                given = [torch.from_numpy(inputs[name]) for name in step.inputs]
                adapters = [torch.from_numpy(inputs[name]) for name in step.adapter_inputs]
                with torch.inference_mode():
                    found = step(given, adapters)
                return {k: v.numpy() for k, v in zip(step.outputs, found, strict=True)}

            assert isinstance(decoding, CtcDecoding)
            self.stream = CtcRecognizer(decoding, run, getattr(recognizer, "adapters", None)).stream

    def features(self, samples: np.ndarray) -> torch.Tensor:
        model = self.plan.model
        found = extract_features(model, [samples])
        mask = found.get("attention_mask")
        features = found[model.family.features.input_name].float()
        return features if mask is None else features[:, : int(mask.sum())]

    def ways(self, features: torch.Tensor, adapter: str | None) -> list[Way]:
        import lora_kernels as lk

        plan, recognizer = self.plan, self.recognizer

        def by_torch() -> Sequence[int]:
            name = plan.model.family.features.input_name
            with torch.inference_mode(), lk.use_adapters(adapter):
                logits = plan.model.model(**{name: features}).logits[0]
            return collapse(logits.argmax(-1).tolist(), self.blank)

        def by_export() -> Sequence[int]:
            return recognizer.decode(features.numpy(), (), 0, adapter)

        ways: list[Way] = [("", by_torch, by_export)]
        if self.stream is not None:
            streamed: Any = recognizer
            ways.append(
                (
                    " (in steps)",
                    lambda: self.stream(features.numpy(), adapter),
                    lambda: streamed.stream(features.numpy(), adapter),
                )
            )
        return ways

    def text(self, tokens: Sequence[int]) -> str:
        tokenizer = self.plan.model.processor.tokenizer
        return str(tokenizer.decode(list(tokens), group_tokens=False)).strip()


def _same(expected: Sequence[int], got: Sequence[int]) -> int:
    """How many tokens come before the first that differs."""
    pairs = enumerate(zip(expected, got, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(expected), len(got)))


def _timed(run: Callable[[], Sequence[int]]) -> tuple[list[int], float]:
    run()
    begin = time.perf_counter()
    found = run()
    return list(found), 1000 * (time.perf_counter() - begin)
