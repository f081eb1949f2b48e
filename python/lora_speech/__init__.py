"""Speech recognition with live LoRA adapters: adapt, evaluate and transcribe.

    import lora_speech

    model = lora_speech.load_for_serving("shipped", {"me": "adapters/me"}, int8=True)
    segments, info = lora_speech.transcribe(model, "talk.mp3", adapter="me")

Names are imported on first use, so that `import lora_speech` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "AudioError": "errors",
    "Evaluation": "evaluation",
    "ManifestError": "errors",
    "ModelError": "errors",
    "Segment": "transcription",
    "SpeechError": "errors",
    "SpeechModel": "models.loading",
    "TrainingConfig": "training.config",
    "TrainingError": "errors",
    "TrainingResult": "training.config",
    "TranscriptionInfo": "transcription",
    "Utterance": "data.manifest",
    "beam_decode": "decoding.beam",
    "evaluate": "evaluation",
    "finetune": "training.finetune",
    "greedy_decode": "decoding.greedy",
    "load_audio": "data.audio",
    "load_base": "models.loading",
    "load_for_serving": "models.loading",
    "load_utterances": "data.manifest",
    "normalizer": "data.text",
    "read_manifest": "data.manifest",
    "run_demo": "demo.run",
    "transcribe": "transcription",
    "transcribe_many": "transcription",
    "write_evaluation": "evaluation",
    "write_manifest": "data.manifest",
}
"""Public name to the module that defines it."""

__all__ = [
    "AudioError",
    "Evaluation",
    "ManifestError",
    "ModelError",
    "Segment",
    "SpeechError",
    "SpeechModel",
    "TrainingConfig",
    "TrainingError",
    "TrainingResult",
    "TranscriptionInfo",
    "Utterance",
    "beam_decode",
    "evaluate",
    "finetune",
    "greedy_decode",
    "load_audio",
    "load_base",
    "load_for_serving",
    "load_utterances",
    "normalizer",
    "read_manifest",
    "run_demo",
    "transcribe",
    "transcribe_many",
    "write_evaluation",
    "write_manifest",
]

if TYPE_CHECKING:
    from lora_speech.data.audio import load_audio
    from lora_speech.data.manifest import Utterance, load_utterances, read_manifest, write_manifest
    from lora_speech.data.text import normalizer
    from lora_speech.decoding.beam import beam_decode
    from lora_speech.decoding.greedy import greedy_decode
    from lora_speech.demo.run import run_demo
    from lora_speech.errors import (
        AudioError,
        ManifestError,
        ModelError,
        SpeechError,
        TrainingError,
    )
    from lora_speech.evaluation import Evaluation, evaluate, write_evaluation
    from lora_speech.models.loading import SpeechModel, load_base, load_for_serving
    from lora_speech.training.config import TrainingConfig, TrainingResult
    from lora_speech.training.finetune import finetune
    from lora_speech.transcription import (
        Segment,
        TranscriptionInfo,
        transcribe,
        transcribe_many,
    )


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lora_speech' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"lora_speech.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
