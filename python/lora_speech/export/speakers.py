"""How a model of a family says what it hears, by torch and by an export of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from lora_speech.data.features import extract_features
from lora_speech.decoding.greedy import greedy_decode
from lora_speech.decoding.prompts import prompt_tokens, special_tokens, token_limit
from lora_speech.export.ctc_decoding import CtcRecognizer, collapse
from lora_speech.export.folder import CtcDecoding
from lora_speech.export.graph_inputs import make_graphs
from lora_speech.export.target import Plan, Recognizer
from lora_speech.transcription import decode_text

Way = tuple[str, Callable[[], Sequence[int]], Callable[[], Sequence[int]]]
"""What is added to the recording's name, and tokens by torch and by the export."""


class WhisperSpeaker:
    """Greedy decoding of one window."""

    def __init__(self, plan: Plan, recognizer: Recognizer) -> None:
        self.plan, self.recognizer = plan, recognizer
        tokens = special_tokens(plan.model.model)
        self.language = plan.language
        self.prompt = prompt_tokens(tokens, self.language)
        self.limit = token_limit(tokens, len(self.prompt), None)

    def features(self, samples: np.ndarray) -> torch.Tensor:
        """Model input of one recording."""
        model = self.plan.model
        return extract_features(model, [samples])[model.family.features.input_name]

    def ways(self, features: torch.Tensor, adapter: str | None) -> list[Way]:
        """How the recording is decoded with an adapter, or with the base."""
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
        """Tokens as words."""
        return decode_text(self.plan.model, tokens)


class CtcSpeaker:
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
        """Model input of one recording."""
        model = self.plan.model
        found = extract_features(model, [samples])
        mask = found.get("attention_mask")
        features = found[model.family.features.input_name].float()
        return features if mask is None else features[:, : int(mask.sum())]

    def ways(self, features: torch.Tensor, adapter: str | None) -> list[Way]:
        """How the recording is decoded with an adapter, or with the base."""
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
                    "in steps",
                    lambda: self.stream(features.numpy(), adapter),
                    lambda: streamed.stream(features.numpy(), adapter),
                )
            )
        return ways

    def text(self, tokens: Sequence[int]) -> str:
        """Tokens as words."""
        tokenizer = self.plan.model.processor.tokenizer
        return str(tokenizer.decode(list(tokens), group_tokens=False)).strip()


def speaker_of(plan: Plan, recognizer: Recognizer) -> WhisperSpeaker | CtcSpeaker:
    """The speaker of a plan's family."""
    whisper = plan.model.family.objective == "sequence"
    return WhisperSpeaker(plan, recognizer) if whisper else CtcSpeaker(plan, recognizer)
