"""The build: where it finds torch, which pip hides from it; a source archive that has it all."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

setuptools = pytest.importorskip("setuptools", minversion="77")

ROOT = Path(__file__).resolve().parent.parent
SETUP = ROOT / "setup.py"
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


# ---------- The source archive


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """Made in a copy of the sources alone: setuptools writes into the tree that it packs."""
    folder = tmp_path_factory.mktemp("sdist")
    built = ("build", "dist", "*.so", "*.egg-info", "__pycache__", ".*", "demo_output")
    shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(*built))
    code = f"from setuptools.build_meta import build_sdist; build_sdist({str(folder)!r})"
    subprocess.run(
        [sys.executable, "-c", code], cwd=folder / "source", check=True, capture_output=True
    )
    [path] = folder.glob("*.tar.gz")
    return path


def test_the_source_archive_is_whole(archive):
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    wanted = {"CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml", "setup.py"}
    for folder in ("csrc", "lora_kernels", "python/lora_speech"):
        wanted |= {
            str(path.relative_to(ROOT))
            for path in (ROOT / folder).rglob("*")
            if path.is_file() and path.suffix not in (".so", ".pyc")
        }
    assert len(wanted) > 150
    assert wanted <= names, sorted(wanted - names)
    assert not [name for name in names if name.startswith("tests/") or name.endswith(".so")]


@pytest.mark.slow
def test_the_source_archive_installs(archive, tmp_path):
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(tmp_path)]
    quickly = os.environ | {"CMAKE_ARGS": "-DLORA_KERNELS_OPTIMIZATION=-O0"}
    installed = subprocess.run([*pip, str(archive)], capture_output=True, text=True, env=quickly)
    if "No matching distribution found for" in installed.stderr:
        pytest.skip("no package index in reach, and the build needs cmake and ninja from it")
    assert installed.returncode == 0, installed.stderr
    code = (
        "import lora_kernels, torch; print(lora_kernels.__file__); "
        "print(lora_kernels.ops.lora_linear(torch.ones(1, 4), torch.ones(2, 4)).tolist())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert run.stdout.splitlines() == [
        str(tmp_path / "lora_kernels" / "__init__.py"),
        "[[4.0, 4.0]]",
    ]
