"""What `lora-speech bench` is asked to measure."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from lora_speech.errors import SpeechError
from lora_speech.models.base import SHIPPED

RELEASED = {"tiny": (384, 4, 6), "base": (512, 6, 8), "small": (768, 12, 12)}
"""Width, layers and heads of Whisper's sizes (Radford et al., 2022, table 1)."""

SECTIONS = ("decode", "batch", "beam", "encoder", "linear", "train")
RANK = 16
MIXED_RANKS = (4, 8, 12, 16, 24, 32, 48, 64)
"""Of the adapters of a batch in which every row has another."""


def default_threads() -> tuple[int, ...]:
    """One thread, and two where there are as many cores."""
    return (1, 2) if (os.cpu_count() or 1) > 1 else (1,)


@dataclass(frozen=True)
class BenchSettings:
    """What to measure, and for how long.

    Attributes
    ----------
    models : tuple of str
        `tiny`, `base`, `small` (random weights in the released shapes), `shipped`, or folders.
    threads : tuple of int
        Each comparison is made with each of these.
    seconds : float
        For one comparison; slow contestants get `turns` turns all the same.
    only : tuple of str
        Which of `SECTIONS`.
    new_tokens : int
        Decoded per row, or as many as the model has positions for.
    turns : int
        At least so many per contestant.
    """

    models: tuple[str, ...] = (*RELEASED, SHIPPED)
    threads: tuple[int, ...] = (1,)
    seconds: float = 20.0
    only: tuple[str, ...] = SECTIONS
    new_tokens: int = 128
    turns: int = 3

    def __post_init__(self) -> None:
        if not self.seconds >= 0:
            raise SpeechError(
                f"--seconds: expected 0 or more, got {self.seconds}; 20 gives steady medians"
            )
        keys = [model_key(model) for model in self.models]
        if len(set(keys)) < len(keys):
            raise SpeechError(
                f"--models: expected different names, got {', '.join(keys)}; results are kept by "
                "name, so rename one of the folders"
            )

    @classmethod
    def parse(
        cls,
        models: str | None,
        threads: str | None,
        seconds: float,
        only: str | None,
        quick: bool,
    ) -> BenchSettings:
        """Read the options of the command line; None takes the default."""
        return cls(
            models=_models(models) if models is not None else cls.models,
            threads=_threads(threads) if threads is not None else default_threads(),
            seconds=0.0 if quick else seconds,
            only=_sections(only) if only is not None else SECTIONS,
            new_tokens=4 if quick else cls.new_tokens,
        )


def model_key(model: str) -> str:
    """The name that results are kept under."""
    return Path(model).name


def _items(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


def _models(text: str) -> tuple[str, ...]:
    known = (*RELEASED, SHIPPED)
    for item in _items(text) or [""]:
        if item not in known and not (Path(item) / "config.json").is_file():
            raise SpeechError(
                f"--models: expected {', '.join(known)} or a folder of a Whisper, got {item!r}; "
                "e.g. --models tiny,base"
            )
    return tuple(_items(text))


def _threads(text: str) -> tuple[int, ...]:
    cores = os.cpu_count() or 1
    items = _items(text)
    if not items or not all(item.isdecimal() and 1 <= int(item) <= cores for item in items):
        raise SpeechError(
            f"--threads: expected numbers from 1 to {cores} (the cores here) with commas between "
            f"them, got {text!r}; e.g. --threads 1"
        )
    return tuple(dict.fromkeys(int(item) for item in items))


def _sections(text: str) -> tuple[str, ...]:
    items = _items(text)
    if not items or not set(items) <= set(SECTIONS):
        raise SpeechError(
            f"--only: expected some of {', '.join(SECTIONS)}, got {text!r}; e.g. --only decode"
        )
    return tuple(section for section in SECTIONS if section in items)
