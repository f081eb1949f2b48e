"""Options that commands share, and those that need reading: which adapters for which files."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from lora_speech.errors import SpeechError

Base = Annotated[
    str,
    typer.Option(
        help="The model to start from: 'shipped' (a small one inside this package), a folder in "
        "the Hugging Face layout, or a hub name such as openai/whisper-tiny.",
        show_default=True,
    ),
]
Language = Annotated[
    str | None,
    typer.Option(help="Language of the speech, e.g. en or es.", metavar="CODE"),
]
Int8 = Annotated[bool, typer.Option("--int8", help="Quantize the base to INT8.")]
Device = Annotated[
    str,
    typer.Option(
        help="Where the model runs: auto (an NVIDIA GPU, where there is one and the build has CUDA "
        "kernels, else the CPU), cpu, cuda, or cuda:N.",
        metavar="auto|cpu|cuda[:N]",
    ),
]
BeamSize = Annotated[
    int, typer.Option(help="Hypotheses kept while decoding; 1 is greedy and fastest.", min=1)
]
LengthPenalty = Annotated[
    float | None,
    typer.Option(
        help="With --beam-size 2 or more: above 0 favours long texts, below 0 short ones; "
        "1.0 by default."
    ),
]
BatchSize = Annotated[int, typer.Option(help="Recordings decoded at once.", min=1, max=1024)]


class Format(str, Enum):
    """What `transcribe` writes."""

    text = "text"
    json = "json"
    srt = "srt"
    vtt = "vtt"


class Normalizer(str, Enum):
    """What `evaluate` does to texts before counting."""

    auto = "auto"
    whisper = "whisper"
    basic = "basic"
    none = "none"


class Suite(str, Enum):
    """What `bench` measures."""

    cpu = "cpu"


def named_folders(options: list[str] | None) -> dict[str, Path]:
    """Read `NAME=FOLDER` (or `FOLDER`, named after itself) and check that the folders are there."""
    folders: dict[str, Path] = {}
    for option in options or []:
        name, separator, folder = option.partition("=")
        if not separator or Path(option).is_dir():  # a folder's own name may hold one
            name, folder = Path(option).name or option, option
        if not name or not folder:
            raise SpeechError(
                f"--adapter: expected NAME=FOLDER, got {option!r}; e.g. medical=adapters/medical"
            )
        if name in folders:
            raise SpeechError(
                f"--adapter: expected different names, got {name!r} twice; name them NAME=FOLDER"
            )
        if not Path(folder).is_dir():
            raise SpeechError(
                f"--adapter {name}: expected a folder with adapter_config.json and "
                f"adapter_model.safetensors, got {folder!r}, which is not there; check the path"
            )
        folders[name] = Path(folder)
    return folders


def choose_adapters(names: list[str], use: list[str], count: int) -> list[str | None]:
    """Settle which adapter each of `count` files uses."""
    if not use:
        if len(names) > 1:
            raise SpeechError(
                f"--use: expected the adapter to use, because {len(names)} are loaded "
                f"({', '.join(names)}); give --use NAME once, or once per file"
            )
        use = names or ["base"]
    unknown = [name for name in use if name not in names and name != "base"]
    if unknown:
        raise SpeechError(
            f"--use: expected one of {', '.join([*names, 'base'])}, got {unknown[0]!r}; load it "
            "with --adapter NAME=FOLDER"
        )
    if len(use) not in (1, count):
        raise SpeechError(
            f"--use: expected one name, or one per file ({count}), got {len(use)}; correct it"
        )
    use = use * count if len(use) == 1 else use
    return [name if name in names else None for name in use]
