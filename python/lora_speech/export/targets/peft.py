"""transformers and peft: the base as `from_pretrained` loads it, adapters as PEFT folders."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_speech.export.folder import ADAPTERS
from lora_speech.export.target import Plan, Say, Target

BASE = "base"


def save_base(plan: Plan, folder: Path) -> None:
    """Write the base, with what is merged into it, and its processor, in the Hugging Face layout.

    The feature extractor is there in a file of its own too, where other libraries look for it.
    """
    plan.model.model.save_pretrained(folder)
    plan.model.processor.save_pretrained(folder)
    plan.model.processor.feature_extractor.save_pretrained(folder)


def _write(plan: Plan, folder: Path, say: Say) -> None:
    import lora_kernels as lk

    say("writing the base")
    save_base(plan, folder / BASE if plan.live else folder)
    for name in plan.live:
        lk.save_adapter(plan.model.model, name, folder / ADAPTERS / name)


class _Loaded:
    """What transformers and peft make of the folder."""

    def __init__(self, folder: Path) -> None:
        from peft import PeftModel
        from transformers import WhisperForConditionalGeneration

        live = sorted(path for path in (folder / ADAPTERS).glob("*") if path.is_dir())
        base = folder / BASE if live else folder
        self.model: Any = WhisperForConditionalGeneration.from_pretrained(base).eval()
        if live:
            first, *rest = live
            self.model = PeftModel.from_pretrained(self.model, first, adapter_name=first.name)
            for path in rest:
                self.model.load_adapter(path, adapter_name=path.name)

    def decode(
        self, features: np.ndarray, prompt: Sequence[int], limit: int, adapter: str | None
    ) -> list[int]:
        """See `target.Recognizer`."""
        import torch

        model = self.model
        inputs = {
            "input_features": torch.from_numpy(features),
            "decoder_input_ids": torch.tensor([list(prompt)]),
            "max_new_tokens": limit,
            "do_sample": False,
            "num_beams": 1,
        }
        if hasattr(model, "set_adapter") and adapter is not None:
            model.set_adapter(adapter)
            found = model.generate(**inputs)
        elif hasattr(model, "disable_adapter"):
            with model.disable_adapter():
                found = model.generate(**inputs)
        else:
            found = model.generate(**inputs)
        tokens = found[0].tolist()
        tokens = tokens[len(prompt) :] if tokens[: len(prompt)] == list(prompt) else tokens
        end = model.generation_config.eos_token_id
        return tokens[: tokens.index(end)] if end in tokens else tokens


def _usage(folder: Path) -> str:
    if not (folder / ADAPTERS).is_dir():
        return f"WhisperForConditionalGeneration.from_pretrained({os.fspath(folder)!r})"
    name = min(path.name for path in (folder / ADAPTERS).iterdir())
    return (
        f"model = WhisperForConditionalGeneration.from_pretrained('{folder / BASE}')\n"
        f"model = PeftModel.from_pretrained(model, '{folder / ADAPTERS / name}')"
    )


TARGET = Target(
    name="peft",
    write=_write,
    open=_Loaded,
    live=True,
    int8=None,
    packages=("transformers", "peft"),
    extra="",
    usage=_usage,
)
