"""Manifests and data sets: what is read, and how a bad line is named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from tiny_whisper import tone

from lora_speech.data.manifest import Utterance, load_utterances, read_manifest, write_manifest
from lora_speech.errors import ManifestError


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    path = tmp_path / "clips" / "a.wav"
    path.parent.mkdir()
    soundfile.write(path, tone(0.2), 16_000)
    return path


def manifest(tmp_path: Path, *lines: object) -> Path:
    path = tmp_path / "m.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def test_paths_are_relative_to_the_manifest(
    tmp_path: Path, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")
    path = manifest(
        tmp_path,
        {"audio": "clips/a.wav", "text": "hé"},
        "",
        {"audio": str(clip), "text": "", "adapter": "me", "language": "es", "extra": 1},
    )
    first, second = read_manifest(path)
    assert first.text == "hé"
    assert first.adapter is None
    assert len(first.samples()) == 3200
    assert (second.adapter, second.language, second.text) == ("me", "es", "")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", "not JSON"),
        ("[1, 2]", "got a list"),
        ({"text": "x"}, "the key 'audio', got 'text'"),
        ({"audio": "clips/a.wav"}, "the key 'text'"),
        ({"audio": "clips/a.wav", "text": 3}, "text: expected a string, got 3"),
        ({"audio": "clips/a.wav", "text": "x", "adapter": 1}, "adapter: expected a string"),
        ({"audio": "clips/gone.wav", "text": "x"}, "no such file"),
        ({"audio": "clips", "text": "x"}, "no such file"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, clip: Path, line: object, message: str) -> None:
    path = manifest(tmp_path, {"audio": "clips/a.wav", "text": "good"}, line)
    with pytest.raises(ManifestError, match=r"m\.jsonl, line 2: ") as caught:
        read_manifest(path)
    assert message in str(caught.value)


def test_all_bad_lines_are_listed_up_to_five(tmp_path: Path) -> None:
    path = manifest(tmp_path, *["x"] * 7)
    with pytest.raises(ManifestError, match="and 2 more lines") as caught:
        read_manifest(path)
    assert str(caught.value).count("line ") == 5


def test_missing_empty_and_binary_manifests(tmp_path: Path, clip: Path) -> None:
    with pytest.raises(ManifestError, match="no such file"):
        read_manifest(tmp_path / "gone.jsonl")
    with pytest.raises(ManifestError, match="at least one line"):
        read_manifest(manifest(tmp_path, ""))
    binary = tmp_path / "b.jsonl"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ManifestError, match="UTF-8"):
        read_manifest(binary)


def test_writing_and_reading_back(tmp_path: Path, clip: Path) -> None:
    utterances = [Utterance(clip, "hello", adapter="me", language="en")]
    path = write_manifest(tmp_path / "out.jsonl", utterances)
    assert json.loads(path.read_text()) == {
        "audio": "clips/a.wav", "text": "hello", "adapter": "me", "language": "en",
    }  # fmt: skip
    assert read_manifest(path)[0].text == "hello"
    with pytest.raises(ManifestError, match="samples in memory"):
        write_manifest(path, [Utterance(np.zeros(3), "x")])
    assert [p.name for p in tmp_path.glob("*.partial")] == []


def test_load_utterances_refuses_other_things(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="got int"):
        load_utterances(3)
    with pytest.raises(ManifestError, match=r"gone\.jsonl: no such file"):
        load_utterances(str(tmp_path / "gone.jsonl"))
    with pytest.raises(ManifestError, match="save_to_disk"):
        load_utterances(tmp_path)


class TestDatasets:
    """Hugging Face data sets, decoded by us."""

    def make(self, clip: Path):
        datasets = pytest.importorskip("datasets")
        rows = {"audio": [str(clip)], "sentence": ["hello"], "language": ["en"]}
        return datasets.Dataset.from_dict(rows).cast_column("audio", datasets.Audio())

    def test_loaded(self, clip: Path) -> None:
        [utterance] = load_utterances(self.make(clip))
        assert (utterance.text, utterance.language) == ("hello", "en")
        assert len(utterance.samples()) == 3200

    def test_saved_to_disk(self, tmp_path: Path, clip: Path) -> None:
        folder = tmp_path / "saved"
        self.make(clip).save_to_disk(str(folder))
        clip.unlink()  # save_to_disk embeds the audio
        [utterance] = load_utterances(str(folder))
        assert len(utterance.samples()) == 3200

    def test_splits(self, clip: Path) -> None:
        datasets = pytest.importorskip("datasets")
        both = datasets.DatasetDict(train=self.make(clip), test=self.make(clip))
        assert len(load_utterances(both, split="test")) == 1
        with pytest.raises(ManifestError, match="'train', 'test'"):
            load_utterances(both)

    def test_arrays(self) -> None:
        datasets = pytest.importorskip("datasets")
        audio = {"array": tone(0.5, 8_000).tolist(), "sampling_rate": 8_000}
        dataset = datasets.Dataset.from_dict({"audio": [audio], "text": ["x"]})
        assert len(load_utterances(dataset)[0].samples()) == 8_000

    def test_wrong_columns_and_missing_files(self, clip: Path) -> None:
        with pytest.raises(ManifestError, match="expected the columns"):
            load_utterances(self.make(clip).remove_columns("sentence"))
        dataset = self.make(clip)
        clip.unlink()
        with pytest.raises(ManifestError, match="row 0"):
            load_utterances(dataset)

    def test_unknown_hub_name(self, monkeypatch: pytest.MonkeyPatch) -> None:
        datasets = pytest.importorskip("datasets")

        def offline(*args: object, **kwargs: object) -> None:
            raise ConnectionError("no connection")

        monkeypatch.setattr(datasets, "load_dataset", offline)
        with pytest.raises(ManifestError, match="check the path, the name and the connection"):
            load_utterances("someone/something:test")
