"""Finds and loads the compiled operators, once."""

from __future__ import annotations

import os
from pathlib import Path

import torch

_PACKAGE = Path(__file__).resolve().parent.parent


def _candidates() -> list[Path]:
    # An editable install may keep the library apart from the sources: every entry of the package's
    # path is searched.
    import lora_kernels

    folders = [Path(p) for p in lora_kernels.__path__] if hasattr(lora_kernels, "__path__") else []
    return list(dict.fromkeys([_PACKAGE, *folders]))


def library_path() -> Path:
    """The compiled library's file: LORA_KERNELS_LIBRARY if set, else the one beside the package.

    Raises
    ------
    ImportError
        If it was never built, or is not where the variable says; the text says how to build it.
    """
    named = os.environ.get("LORA_KERNELS_LIBRARY")
    if named:
        if Path(named).is_file():
            return Path(named)
        raise ImportError(f"LORA_KERNELS_LIBRARY: expected a file, got {named!r}; unset it")
    for folder in _candidates():
        path = folder / "_torch.so"
        if path.is_file():
            return path
    raise ImportError(
        "lora_kernels: the compiled operators (_torch.so) were not found in "
        f"{', '.join(map(str, _candidates()))}. Build them with "
        "`pip install .` (or `-e .`) in the project's folder; torch must be installed first."
    )


def _load() -> None:
    path = library_path()
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise ImportError(
            f"lora_kernels: {path} could not be loaded by torch {torch.__version__}: {error}. "
            "It needs torch 2.10 or later; rebuild it with `pip install --force-reinstall "
            "--no-deps .`"
        ) from error


_load()
