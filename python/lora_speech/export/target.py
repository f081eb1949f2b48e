"""What every target of an export declares and does; one file per target lies in `targets`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from lora_kernels import environment
from lora_speech.errors import SpeechError
from lora_speech.export.names import TARGETS
from lora_speech.export.packages import installed, require_packages
from lora_speech.models.loading import SpeechModel

Say = Callable[[str], None]
"""Told what is done at the moment: a stage, and after a colon how far it is."""


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
    language : str or None
        Of the prompt; None where the model knows none.
    samples : list of numpy.ndarray
        float32 [samples] each, speech to calibrate by, at the model's rate.
    options : dict
        What was given to `--option`, by name.
    """

    model: SpeechModel
    live: tuple[str, ...] = ()
    merged: str | None = None
    int8: bool = False
    language: str | None = None
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


def _no_objection(given: object) -> None:
    """Whatever it is, it can be exported."""


@dataclass(frozen=True)
class Target:
    """One form in which a model leaves.

    Attributes
    ----------
    name : str
        As in `--to`.
    write : callable
        Writes the plan's model into a folder.
    open : callable
        Loads what was written; the result is checked through it.
    live : bool
        Whether adapters can stay apart from the weights.
    int8 : {"ours", "own", None}
        Whether INT8 means this package's quantized layers, the target's own quantization, or is
        not there.
    objectives : tuple of str
        Of the families that it takes.
    packages : tuple of str
        Importable names that it needs.
    extra : str
        The extra that installs them beside `speech`; "" where that does.
    options : mapping
        What it takes besides, by `--option NAME=VALUE`, and what that means.
    ready : callable
        Refuses options, and a machine that cannot do it, before anything is loaded.
    fits : callable
        Refuses a plan that it cannot write, before anything is written.
    usage : callable
        How the written folder is used: lines for the terminal.
    """

    name: str
    write: Callable[[Plan, Path, Say], None]
    open: Callable[[Path], Recognizer]
    live: bool
    int8: Literal["ours", "own"] | None
    objectives: tuple[str, ...] = ("sequence",)
    packages: tuple[str, ...] = ()
    extra: str = "export"
    options: Mapping[str, str] = field(default_factory=dict)
    ready: Callable[[Mapping[str, str]], None] = _no_objection
    fits: Callable[[Plan], None] = _no_objection
    usage: Callable[[Path], str] = str

    def require(self, options: Mapping[str, str]) -> None:
        """Refuse, before anything is loaded, what cannot be done.

        Raises
        ------
        MissingExtraError
            Naming the packages that are missing or of another version, and the extra.
        SpeechError
            An option is unknown or wrong.
        """
        unknown = [name for name in options if name not in self.options]
        if unknown:
            known = ", ".join(f"{name} ({what})" for name, what in self.options.items()) or "none"
            raise SpeechError(
                f"--option: expected one that {self.name} takes, {known}, got {unknown[0]!r}; "
                "leave it out"
            )
        require_packages(self.name, self.packages, self.extra)
        self.ready(options)

    def environment(self) -> dict[str, Any]:
        """The machine, torch's threads, and the versions of what made and ran an export."""
        facts = environment.facts()
        names = ("platform", "python", "cpu", "cores", "threads", "forced")
        return {name: facts[name] for name in names} | {
            "versions": facts["versions"] | installed(self.packages)
        }


def whole_number(options: Mapping[str, str], name: str, default: int) -> int:
    """An option that is a whole number from 1 on.

    Raises
    ------
    SpeechError
        It is none.
    """
    text = options.get(name, str(default))
    if not text.isdecimal() or not int(text):
        raise SpeechError(f"--option {name}: expected a whole number from 1 on, got {text!r}")
    return int(text)


def target(name: str) -> Target:
    """The target of a name out of `TARGETS`.

    Raises
    ------
    SpeechError
        There is none of that name.
    """
    if name not in TARGETS:
        raise SpeechError(f"to: expected one of {', '.join(TARGETS)}, got {name!r}; choose one")
    found: Target = import_module(f"lora_speech.export.targets.{name}").TARGET
    return found
