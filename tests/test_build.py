"""Where the build finds torch: pip hides the environment's packages from it."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

setuptools = pytest.importorskip("setuptools", minversion="77")

SETUP = Path(__file__).resolve().parent.parent / "setup.py"
INSTALLED = Path(torch.__path__[0]).resolve()


@pytest.fixture
def torch_folder(monkeypatch):
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    monkeypatch.delenv("LORA_KERNELS_TORCH", raising=False)
    return runpy.run_path(str(SETUP))["torch_folder"]


@pytest.fixture
def hidden(torch_folder, monkeypatch):
    """The same, in an interpreter that cannot import torch itself."""
    monkeypatch.setitem(torch_folder.__globals__, "find_spec", lambda name: None)
    return torch_folder


def test_the_importable_torch(torch_folder):
    assert torch_folder() == INSTALLED


def test_the_torch_outside_an_isolated_build(hidden):
    assert hidden() == INSTALLED


def test_the_named_torch_comes_first(torch_folder, monkeypatch, tmp_path):
    monkeypatch.setenv("LORA_KERNELS_TORCH", str(tmp_path))
    with pytest.raises(SystemExit, match=rf"2\.10 or later in {tmp_path}, got no version\.py"):
        torch_folder()
    version = tmp_path / "version.py"
    version.write_text("__version__ = '2.9.1+cpu'")
    with pytest.raises(SystemExit, match=r"got 2\.9; run pip install 'torch>=2\.10' first"):
        torch_folder()
    version.write_text("__version__ = '2.10.0'")
    assert torch_folder() == tmp_path.resolve()


def test_no_torch_at_all(hidden, monkeypatch):
    monkeypatch.setitem(hidden.__globals__, "_outside_the_isolated_build", lambda: "")
    with pytest.raises(SystemExit, match=r"torch is not installed .* pip install 'torch>=2\.10'"):
        hidden()
