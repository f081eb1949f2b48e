"""Files and folders that appear whole or not at all.

A writer works beside the place where its result shall stand, under `.NAME.PID.partial`, and renames
it when it is complete. What a failure leaves there it removes itself; what a kill leaves, `sweep`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lora_speech.errors import SpeechError

_SUFFIX = ".partial"


@contextmanager
def staging(path: Path) -> Iterator[Path]:
    """Give a free path beside `path` to write a file or a folder to; `publish` it from there.

    Folders above `path` are made. What is not published by the end is removed, such folders too
    while they are empty; writers side by side want a folder that is there before them.
    """
    made = [folder for folder in path.parents if not folder.exists()]
    partial = path.with_name(f".{path.name}.{os.getpid()}{_SUFFIX}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(partial)
        yield partial
    finally:
        with suppress(OSError):  # a name that is too long for any file
            _remove(partial)
        for (
            folder
        ) in made:  # the innermost first, as far as they are there and nothing lies in them
            with suppress(OSError):
                folder.rmdir()


def publish(partial: Path, path: Path) -> None:
    """Put a finished file, or a new folder, in its place; a file may stand there already.

    It is on disk before it has its name: not even a power cut leaves half of it.
    """
    for part in (partial, *partial.rglob("*")):
        _sync(part)
    partial.replace(path)
    with suppress(OSError):  # a folder may be one that can be written and not read
        _sync(path.parent)


def sweep(folder: Path) -> None:
    """Remove what killed writers left directly in a folder.

    Call it before the first write: what bears this process's own number is of an earlier one too
    (in a container every run may have the same). What living processes write is left to them.
    """
    for partial in folder.glob(f".*{_SUFFIX}"):
        number = partial.name.removesuffix(_SUFFIX).rpartition(".")[2]
        if number.isdecimal() and (int(number) == os.getpid() or not _lives(int(number))):
            _remove(partial)


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write a text file of which no reader ever sees half."""
    path = Path(path)
    try:
        with staging(path) as partial:
            partial.write_text(text, encoding="utf-8")
            publish(partial, path)
    except OSError as error:
        raise SpeechError(
            f"{path}: expected a file that can be written, got: {error}; choose another path or "
            "make room"
        ) from error
    return path


def write_json(path: str | os.PathLike[str], record: Any) -> Path:
    """Write one JSON document, indented."""
    return write_text(path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: str | os.PathLike[str], records: Iterable[Any]) -> Path:
    """Write one JSON object per line."""
    return write_text(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)  # sends nothing
    except (ProcessLookupError, OverflowError):  # gone, or never the number of a process
        return False
    except PermissionError:  # somebody else's
        return True
    return True
