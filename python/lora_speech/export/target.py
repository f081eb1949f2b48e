"""What every target of an export declares and does; one file per target lies in `targets`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module, util
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from lora_speech.errors import MissingExtraError
from lora_speech.models.loading import SpeechModel

TARGETS: tuple[str, ...] = ("peft", "ctranslate2", "onnx", "torchscript", "aoti")
"""Names of the targets, each that of its file in `targets`."""

Say = Callable[[str], None]
"""Told what is done at the moment."""


@dataclass(frozen=True)
class Plan:
    """What is exported.

    Attributes
    ----------
    model : SpeechModel
        With `live` adapters loaded, the merged one in its weights, and INT8 where the target takes
        this package's; in evaluation mode.
    live : tuple of str
        Adapters that the result keeps apart from its weights.
    merged : str or None
        The adapter in its weights.
    int8 : bool
        Whether INT8 was asked for.
    samples : list of numpy.ndarray
        float32 [samples] each, speech to calibrate by, at the model's rate.
    options : dict
        What was given to `--option`, by name.
    """

    model: SpeechModel
    live: tuple[str, ...] = ()
    merged: str | None = None
    int8: bool = False
    samples: list[np.ndarray] = field(default_factory=list)
    options: dict[str, str] = field(default_factory=dict)


class Recognizer(Protocol):
    """A result that was loaded again, by what will run it."""

    def decode(
        self, features: np.ndarray, prompt: Sequence[int], limit: int, adapter: str | None
    ) -> list[int]:
        """Greedy decoding of one window.

        Parameters
        ----------
        features : numpy.ndarray
            float32 [1, mel bands, frames].
        prompt : sequence of int
            Tokens before the text.
        limit : int
            New tokens at most.
        adapter : str or None
            One of the live adapters; None: the base, or what is merged into it.

        Returns
        -------
        list of int
            Emitted tokens, without the prompt and the end.
        """


@dataclass(frozen=True)
class Target:
    """One form in which a model leaves.

    Attributes
    ----------
    name : str
        As in `--to`.
    summary : str
        What it is, in a few words.
    write : callable
        Writes the plan's model into a folder.
    open : callable
        Loads what was written; the result is checked through it.
    live : bool
        Whether adapters can stay apart from the weights.
    int8 : {"ours", "own", None}
        Whether INT8 means this package's quantized layers, the target's own quantization, or is
        not there.
    packages : tuple of str
        Importable names that it needs.
    extra : str
        The extra that installs them.
    usage : callable
        How the written folder is used: lines for the terminal.
    """

    name: str
    summary: str
    write: Callable[[Plan, Path, Say], None]
    open: Callable[[Path], Recognizer]
    live: bool
    int8: Literal["ours", "own"] | None
    packages: tuple[str, ...] = ()
    extra: str = "export"
    usage: Callable[[Path], str] = str

    def require(self) -> None:
        """Refuse, before anything is loaded, if a package is missing.

        Raises
        ------
        MissingExtraError
            Naming the packages and the extra.
        """
        missing = [name for name in self.packages if util.find_spec(name) is None]
        if missing:
            raise MissingExtraError(
                f"--to {self.name}: expected the package{'s' * (len(missing) > 1)} "
                f"{', '.join(missing)}, which {'are' if len(missing) > 1 else 'is'} not installed; "
                f"pip install 'lora-kernels[speech,{self.extra}]'"
            )


def target(name: str) -> Target:
    """The target of a name out of `TARGETS`."""
    found: Target = import_module(f"lora_speech.export.targets.{name}").TARGET
    return found
