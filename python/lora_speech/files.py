"""Files that appear whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from lora_speech.errors import SpeechError


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write a text file through a temporary one beside it, so that no reader sees half of it."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise SpeechError(
            f"{path}: expected a file that can be written, got: {error}; choose another path or "
            "make room"
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    return path


def write_json(path: str | os.PathLike[str], record: Any) -> Path:
    """Write one JSON document, indented."""
    return write_text(path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: str | os.PathLike[str], records: Iterable[Any]) -> Path:
    """Write one JSON object per line."""
    return write_text(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
