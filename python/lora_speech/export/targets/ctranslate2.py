"""CTranslate2: a folder that faster-whisper loads, the adapter merged into it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lora_speech.errors import ModelError, SpeechError
from lora_speech.export.target import Plan, Say, Target
from lora_speech.export.targets.peft import save_base

QUANTIZATIONS = ("int8", "int8_float32", "int8_float16", "int8_bfloat16", "int16", "float16",
                 "bfloat16", "float32")  # fmt: skip
_COPIED = ("tokenizer.json", "preprocessor_config.json")  # which faster-whisper reads


def _ready(options: Mapping[str, str]) -> None:
    asked = options.get("quantization")
    if asked is not None and asked not in QUANTIZATIONS:
        raise SpeechError(
            f"--option quantization: expected one of {', '.join(QUANTIZATIONS)}, got {asked!r}; "
            "choose one of them"
        )


def _write(plan: Plan, folder: Path, say: Say) -> None:
    from ctranslate2.converters import TransformersConverter

    quantization = plan.options.get("quantization", "int8" if plan.int8 else "float32")
    with tempfile.TemporaryDirectory(dir=folder.parent) as merged:
        save_base(plan, Path(merged))
        say("converting")
        converter = TransformersConverter(merged, copy_files=list(_COPIED))
        converter.convert(str(folder), quantization=quantization, force=True)


class _Loaded:
    """The folder as faster-whisper loads it, decoding token by token through CTranslate2."""

    def __init__(self, folder: Path) -> None:
        from faster_whisper import WhisperModel

        self.whisper = WhisperModel(str(folder), device="cpu", cpu_threads=1, num_workers=1)

    def decode(
        self, features: np.ndarray, prompt: Sequence[int], limit: int, adapter: str | None
    ) -> list[int]:
        """See `target.Recognizer`."""
        import ctranslate2

        if adapter is not None:
            raise ModelError(f"adapter: expected None, got {adapter!r}: it is merged here")
        [found] = self.whisper.model.generate(
            ctranslate2.StorageView.from_array(np.ascontiguousarray(features)),
            [list(prompt)],
            beam_size=1,
            max_length=2 * limit,  # CTranslate2 makes at most half as many new tokens
        )
        return list(found.sequences_ids[0])


TARGET = Target(
    name="ctranslate2",
    write=_write,
    open=_Loaded,
    live=False,
    int8="own",
    packages=("ctranslate2", "faster_whisper"),
    extra="ctranslate2",
    options={"quantization": "of the weights; int8 with --int8, float32 without"},
    ready=_ready,
    usage=lambda folder: f"faster_whisper.WhisperModel('{folder}').transcribe('talk.wav')",
)
