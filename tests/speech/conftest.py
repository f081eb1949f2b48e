"""Fixtures of the speech tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_whisper import make_tiny_whisper

REPOSITORY = Path(__file__).resolve().parents[2]
SPEECH = REPOSITORY.parent / "shared" / "speech"


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
