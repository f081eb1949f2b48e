"""Lists of utterances: JSONL manifests and Hugging Face data sets.

A manifest is a text file with one JSON object per line::

    {"audio": "clips/0001.wav", "text": "turn left", "adapter": "drivers", "language": "en"}

`audio` is a path, relative to the manifest's own folder or absolute. `text` is the transcript.
`adapter` (whose voice it is: which loaded adapter to use) and `language` are optional.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_speech.data.audio import SAMPLING_RATE, load_audio, prepare_samples
from lora_speech.errors import ManifestError, MissingExtraError
from lora_speech.files import write_jsonl

_TEXT_COLUMNS = ("text", "sentence", "transcription", "transcript", "normalized_text")
"""Names that data sets give the transcript, in the order they are looked for."""


@dataclass(frozen=True)
class Utterance:
    """One recording with its transcript.

    Attributes
    ----------
    audio : path, bytes or numpy.ndarray
        An audio file, the bytes of one, or decoded samples (`sampling_rate` then holds their rate).
    text : str
        What is said.
    adapter : str, optional
        Name of the adapter to transcribe with.
    language : str, optional
        Language code, e.g. `"en"`.
    sampling_rate : int, optional
        Samples per second of `audio` where it is an array.
    name : str
        How reports and error messages call the utterance.
    """

    audio: str | os.PathLike[str] | bytes | np.ndarray
    text: str
    adapter: str | None = None
    language: str | None = None
    sampling_rate: int | None = None
    name: str = ""

    def samples(self, sampling_rate: int = SAMPLING_RATE) -> np.ndarray:
        """Return the recording as float32 [samples] at `sampling_rate`."""
        if isinstance(self.audio, np.ndarray):
            rate = self.sampling_rate or sampling_rate
            return prepare_samples(self.audio, rate, sampling_rate, name=self.name or "audio")
        return load_audio(self.audio, sampling_rate, name=self.name or None)


def read_manifest(path: str | os.PathLike[str]) -> list[Utterance]:
    """Read a JSONL manifest and check every line of it.

    Parameters
    ----------
    path : path
        The manifest. Audio paths in it are taken relative to its folder.

    Returns
    -------
    list of Utterance
        In the manifest's order, at least one.

    Raises
    ------
    ManifestError
        The file is missing or empty, or a line is not a JSON object, lacks a key, holds a value of
        the wrong type, or names an audio file that is not there. Up to five lines are listed.
    """
    path = Path(path)
    if not path.is_file():
        raise ManifestError(
            f"manifest {path}: no such file; expected a JSONL file with one object "
            '{"audio": ..., "text": ...} per line: check the path'
        )
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ManifestError(
            f"manifest {path}: expected UTF-8 text, got other bytes ({error.reason}); "
            "a manifest is a JSONL text file: save it as UTF-8"
        ) from error
    utterances: list[Utterance] = []
    problems: list[str] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            utterances.append(_parse_line(line, path.parent))
        except ManifestError as error:
            problems.append(f"manifest {path}, line {number}: {error}")
    if problems:
        more = len(problems) - 5
        shown = problems[:5] + ([f"... and {more} more lines"] if more > 0 else [])
        raise ManifestError("\n".join(shown))
    if not utterances:
        raise ManifestError(
            f"manifest {path}: expected at least one line, got none; write one JSON object "
            '{"audio": ..., "text": ...} per line'
        )
    return utterances


def write_manifest(path: str | os.PathLike[str], utterances: Iterable[Utterance]) -> Path:
    """Write utterances whose audio are files as a JSONL manifest.

    Audio below the manifest's folder is written relative to it, everything else absolute. The file
    appears whole or not at all.
    """
    path = Path(path)
    folder = path.parent.resolve()
    records = []
    for utterance in utterances:
        if isinstance(utterance.audio, (bytes, np.ndarray)):
            raise ManifestError(
                f"{utterance.name or 'utterance'}: expected audio in a file, got samples in "
                "memory; write them with soundfile first and name the file"
            )
        audio = Path(utterance.audio).resolve()
        record: dict[str, Any] = {
            "audio": str(audio.relative_to(folder) if audio.is_relative_to(folder) else audio),
            "text": utterance.text,
        }
        if utterance.adapter is not None:
            record["adapter"] = utterance.adapter
        if utterance.language is not None:
            record["language"] = utterance.language
        records.append(record)
    return write_jsonl(path, records)


def load_utterances(source: Any, *, split: str | None = None) -> list[Utterance]:
    """Read utterances from whatever holds them.

    Parameters
    ----------
    source : path, str, Dataset, DatasetDict or sequence of Utterance
        A JSONL manifest; a folder written by `Dataset.save_to_disk`; a data set's name on the
        Hugging Face hub, with the split after a colon (`"owner/name:test"`); a loaded
        `datasets.Dataset`; or utterances, which are returned as they are.
    split : str, optional
        Which split of a DatasetDict or hub data set to take.

    Returns
    -------
    list of Utterance

    Raises
    ------
    ManifestError
        Nothing of these kinds, or a row of it, can be read.
    """
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if path.is_dir():
            return _from_dataset(_load_from_disk(path), split, name=str(path))
        looks_like_hub = (
            isinstance(source, str)
            and not path.exists()
            and "." not in path.name.rsplit(":", 1)[0]
            and source.split(":", 1)[0].count("/") <= 1
            and not source.startswith(("/", "."))
        )
        if looks_like_hub and isinstance(source, str):
            return _from_hub(source, split)
        return read_manifest(path)
    if _is_dataset(source):
        return _from_dataset(source, split, name="data set")
    if isinstance(source, Sequence) and all(isinstance(item, Utterance) for item in source):
        return list(source)
    raise ManifestError(
        "data: expected a JSONL manifest, a folder saved by datasets, a hub name, a "
        f"datasets.Dataset or a list of Utterance, got {type(source).__name__}"
    )


def _parse_line(line: str, folder: Path) -> Utterance:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ManifestError(
            f"expected a JSON object, got text that is not JSON ({error.msg} at column "
            f'{error.colno}); write e.g. {{"audio": "a.wav", "text": "hello"}}'
        ) from error
    if not isinstance(record, dict):
        raise ManifestError(
            f"expected a JSON object with audio and text, got a {type(record).__name__}"
        )
    for key in ("audio", "text"):
        if key not in record:
            got = ", ".join(map(repr, record)) or "no keys"
            raise ManifestError(f"expected the key {key!r}, got {got}; add it to the line")
    for key in ("audio", "text", "adapter", "language"):
        value = record.get(key)
        optional = key in ("adapter", "language")
        if not isinstance(value, str) and not (optional and value is None):
            raise ManifestError(f"{key}: expected a string, got {value!r}; put it in quotes")
    audio = Path(record["audio"]).expanduser()
    audio = audio if audio.is_absolute() else folder / audio
    if not record["audio"] or not audio.is_file():
        raise ManifestError(
            f"audio: no such file {str(audio)!r}; correct the path (relative paths start at the "
            "manifest's folder) or remove the line"
        )
    return Utterance(
        audio=audio,
        text=record["text"],
        adapter=record.get("adapter"),
        language=record.get("language"),
        name=record["audio"],
    )


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError(
            "reading Hugging Face data sets needs the datasets package; "
            "install the speech extra: pip install 'lora-kernels[speech]'"
        ) from error
    return datasets


def _is_dataset(source: Any) -> bool:
    return type(source).__module__.split(".")[0] == "datasets"


def _load_from_disk(path: Path) -> Any:
    try:
        return _datasets().load_from_disk(str(path))
    except FileNotFoundError as error:
        raise ManifestError(
            f"data {path}: expected a folder written by Dataset.save_to_disk, got one without its "
            "files; name the JSONL manifest inside it, or save the data set again"
        ) from error


def _from_hub(source: str, split: str | None) -> list[Utterance]:
    name, _, named_split = source.partition(":")
    split = named_split or split
    try:
        dataset = _datasets().load_dataset(name, split=split)
    except Exception as error:  # the hub client raises many unrelated types when it cannot connect
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ManifestError(
            f"data {source!r}: neither a file nor a folder here, and as a Hugging Face data set it "
            f"cannot be loaded ({reason}); check the path, the name and the connection"
        ) from error
    return _from_dataset(dataset, split, name=source)


def _from_dataset(dataset: Any, split: str | None, *, name: str) -> list[Utterance]:
    datasets = _datasets()
    if isinstance(dataset, dict):  # DatasetDict
        splits = list(dataset)
        if split is None and len(splits) == 1:
            split = splits[0]
        if split not in dataset:
            raise ManifestError(
                f"{name}: expected one of the splits {', '.join(map(repr, splits))}, got "
                f"{split!r}; name one, e.g. {name}:{splits[0] if splits else 'train'}"
            )
        dataset = dataset[split]
    columns = list(dataset.column_names)
    text_column = next((column for column in _TEXT_COLUMNS if column in columns), None)
    if "audio" not in columns or text_column is None:
        raise ManifestError(
            f"{name}: expected the columns 'audio' and one of {', '.join(_TEXT_COLUMNS)}, got "
            f"{', '.join(columns)}; rename them with Dataset.rename_column"
        )
    # Decoding stays ours: datasets would want torchcodec, soundfile reads the same files.
    if isinstance(dataset.features["audio"], datasets.Audio):
        dataset = dataset.cast_column("audio", datasets.Audio(decode=False))
    utterances = [
        _from_row(row, text_column, f"{name}, row {index}") for index, row in enumerate(dataset)
    ]
    if not utterances:
        raise ManifestError(f"{name}: expected at least one row, got none; choose another split")
    return utterances


def _from_row(row: dict[str, Any], text_column: str, name: str) -> Utterance:
    audio, rate = row["audio"], None
    if isinstance(audio, dict):
        if audio.get("bytes"):
            audio = audio["bytes"]
        elif audio.get("array") is not None:
            rate = audio.get("sampling_rate")
            audio = np.asarray(audio["array"], dtype=np.float32)
        else:
            audio = audio.get("path")
    if isinstance(audio, list):
        audio = np.asarray(audio, dtype=np.float32)
    if audio is None or (isinstance(audio, str) and not Path(audio).is_file()):
        raise ManifestError(
            f"{name}: audio: no such file {audio!r} and no bytes; save the data set with its audio "
            "embedded, or correct the path"
        )
    if not isinstance(row[text_column], str):
        raise ManifestError(
            f"{name}: {text_column}: expected a string, got {row[text_column]!r}; fill it in"
        )
    return Utterance(
        audio=audio,
        text=row[text_column],
        adapter=row.get("adapter") or None,
        language=row.get("language") or None,
        sampling_rate=rate,
        name=name,
    )
