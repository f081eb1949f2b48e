"""Fixtures of the speech tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import make_adapters, write_tones
from tiny_parakeet import make_parakeet, make_parakeet_adapter, write_tune
from tiny_whisper import make_tiny_whisper

from lora_speech.export.run import ExportReport, export_model

REPOSITORY = Path(__file__).resolve().parents[2]
SPEECH = REPOSITORY.parent / "shared" / "speech"


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models gain nothing from threads and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def real_speech() -> Path:
    """Folder of real recordings; they lie beside the repository, never in it."""
    if not SPEECH.is_dir():
        pytest.skip(f"real recordings are not at {SPEECH}")
    return SPEECH


@pytest.fixture(scope="session")
def tiny_whisper_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Whisper in the Hugging Face layout: 32 wide, 2+2 layers, windows of 2 s, random weights."""
    return make_tiny_whisper(tmp_path_factory.mktemp("tiny_whisper"))


@pytest.fixture(scope="session")
def adapters(
    tiny_whisper_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Adapters of that Whisper."""
    return make_adapters(tiny_whisper_folder, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="session")
def tones(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Recordings of tones, in which that Whisper hears something."""
    return write_tones(tmp_path_factory.mktemp("tones"))


@pytest.fixture(scope="session")
def tune(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tones one after another, in which a tiny Parakeet hears letters."""
    return write_tune(tmp_path_factory.mktemp("tune") / "tune.wav")


@pytest.fixture(scope="session")
def tiny_parakeet_folder(tmp_path_factory: pytest.TempPathFactory, tune: Path) -> Path:
    """A Parakeet in the Hugging Face layout: 32 wide, 2 layers, random weights."""
    return make_parakeet(tmp_path_factory.mktemp("tiny_parakeet"), tune)


@pytest.fixture(scope="session")
def parakeet_adapter(tiny_parakeet_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of that Parakeet."""
    path = tmp_path_factory.mktemp("parakeet_adapter") / "accent"
    return make_parakeet_adapter(tiny_parakeet_folder, path)


@pytest.fixture
def export(
    tiny_whisper_folder: Path, tones: list[Path], tmp_path: Path
) -> Callable[..., ExportReport]:
    """Export that Whisper to ``tmp_path / "out"``, checked by those tones."""

    def call(to: str, **more: Any) -> ExportReport:
        return export_model(tiny_whisper_folder, to, tmp_path / "out", check=tones, **more)

    return call
