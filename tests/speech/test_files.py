"""Files and folders that appear whole or not at all, and what killed writers leave."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from lora_speech.errors import SpeechError
from lora_speech.files import publish, staging, sweep, write_text


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    final = tmp_path / "new" / "result"
    with staging(final) as partial:
        partial.mkdir()
        (partial / "file").write_text("x")
        assert not final.exists()
        publish(partial, final)
    assert (final / "file").read_text() == "x"
    assert names(final.parent) == {"result"}


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    path = write_text(tmp_path / "file", "before")

    def fail() -> None:
        with staging(path) as partial:
            partial.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "before"
    assert names(tmp_path) == {"file"}


def test_a_failure_takes_the_folders_that_it_made(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(KeyError), staging(tmp_path / "there" / "new" / "newer" / "result"):
        raise KeyError
    assert names(tmp_path) == {"there"}
    assert names(tmp_path / "there") == set()
    with pytest.raises(OSError), staging(tmp_path / "new" / ("x" * 300) / "result"):
        pass
    assert names(tmp_path) == {"there"}
    with staging(tmp_path / "new" / "newer" / "result"):  # and nothing is published
        (tmp_path / "new" / "other").touch()
    assert names(tmp_path / "new") == {"other"}, "what others put there stays"


def test_a_folder_is_never_replaced_by_a_file(tmp_path: Path) -> None:
    (tmp_path / "folder" / "precious").mkdir(parents=True)
    with pytest.raises(SpeechError, match="expected a file that can be written"):
        write_text(tmp_path / "folder", "x")
    assert names(tmp_path) == {"folder"}
    assert names(tmp_path / "folder") == {"precious"}


def test_sweep_takes_what_dead_processes_left(tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    stale = {f".file.{ended.pid}.partial", f".folder.{os.getpid()}.partial"}
    kept = {f".file.{os.getppid()}.partial", ".file.partial", "file.partial", "file"}
    for name in stale | kept:
        if "folder" in name:
            (tmp_path / name / "below").mkdir(parents=True)
        else:
            (tmp_path / name).touch()
    sweep(tmp_path)
    assert names(tmp_path) == kept
    sweep(tmp_path / "absent")
