"""Exports that are refused or fail, and what they leave: nothing."""

from __future__ import annotations

import errno
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors import SafetensorError
from tiny_whisper import make_adapter
from typer.testing import CliRunner

from lora_kernels.errors import LoraKernelsError
from lora_speech.cli.app import app
from lora_speech.errors import ModelError, SpeechError
from lora_speech.export import run as run_module
from lora_speech.export import target as target_module
from lora_speech.export.folder import banks
from lora_speech.export.run import ExportReport, export_model


def _nothing_left(folder: Path) -> bool:
    return not list(folder.iterdir())


@pytest.mark.parametrize(
    ("to", "more", "text"),
    [
        ("nothing", {}, "to: expected one of peft, ctranslate2, onnx"),
        ("peft", {"int8": True}, "expected a target that takes INT8, got peft"),
        ("peft", {"merge": True}, "expected an adapter to merge, got none"),
        ("onnx", {"options": {"opset": "9"}}, "--option: expected one that onnx takes, chunk"),
        ("onnx", {"options": {"chunk": "0"}}, "--option chunk: expected a whole number from 1 on"),
        ("tensorrt", {"options": {"arch": "sm10"}}, "--option arch: expected one of sm75"),
        ("tensorrt", {"options": {"max_rank": "-1"}}, "expected a whole number from 1 on"),
    ],
)
def test_refused_before_anything_is_written(
    export: Callable[..., ExportReport],
    tmp_path: Path,
    to: str,
    more: dict[str, Any],
    text: str,
) -> None:
    with pytest.raises(SpeechError, match=text):
        export(to, **more)
    assert _nothing_left(tmp_path)


@pytest.mark.parametrize("name", ["a/b", "../x", "v1.2", ""])
def test_names_of_adapters_are_names_of_files(
    export: Callable[..., ExportReport], adapters: dict[str, Path], tmp_path: Path, name: str
) -> None:
    with pytest.raises(SpeechError, match="expected names of letters, digits, - and _, got"):
        export("peft", adapters={name: adapters["all"]})
    assert _nothing_left(tmp_path)


def test_a_layer_that_no_graph_adapts_is_not_dropped(
    export: Callable[..., ExportReport], tiny_whisper_folder: Path, tmp_path: Path
) -> None:
    odd = make_adapter(
        tiny_whisper_folder, tmp_path / "odd", rank=2, seed=5, targets=["q_proj", "proj_out"]
    )
    with pytest.raises(ModelError, match="take adapters for, got proj_out; merge"):
        export("onnx", adapters={"odd": odd})
    # Whisper's output layer is its embedding: merged, the adapter would change both.
    with pytest.raises(ModelError, match=r"adapter 'odd': proj_out: .* share .*export it to peft"):
        export("onnx", adapters={"odd": odd}, merge=True)
    assert [path.name for path in tmp_path.iterdir()] == ["odd"]
    assert export("peft", adapters={"odd": odd}, max_wer=9.0).plan.live == ("odd",)


def test_an_adapter_of_another_shape_is_named() -> None:
    a = {"x.lora_a": np.ones((2, 3), np.float32), "x.lora_b": np.ones((2, 4), np.float32)}
    with pytest.raises(
        ModelError, match=r"adapter 'a': x.lora_a: expected \[rank, 5\], got \[2, 3"
    ):
        banks({"a": a}, {"x": (5, 4)})
    with pytest.raises(ModelError, match="expected a linear that the graphs take"):
        banks({"a": a}, {"y": (3, 4)})


def test_language(export: Callable[..., ExportReport]) -> None:
    with pytest.raises(ModelError, match=r"language: expected one that the model knows \(en, es"):
        export("peft", language="de")
    report = export("peft", language="es", max_wer=9.0)
    assert report.plan.language == "es"


def test_several_adapters_are_not_merged(
    export: Callable[..., ExportReport], adapters: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(SpeechError, match=r"expected one, .* got 2 \(all, some\)"):
        export("peft", adapters=adapters, merge=True)
    assert _nothing_left(tmp_path)


def test_tensorrt_that_is_not_there_is_named(export: Callable[..., ExportReport]) -> None:
    if importlib.util.find_spec("tensorrt"):
        pytest.skip("TensorRT is installed here")
    with pytest.raises(LoraKernelsError, match="pip install tensorrt"):
        export("tensorrt")


def test_what_torch_does_not_say_is_not_published(
    export: Callable[..., ExportReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = SimpleNamespace(decode=lambda features, prompt, limit, adapter: [70, 71, 72])
    peft = target_module.target("peft")
    changed = target_module.Target(**{**vars(peft), "open": lambda folder: wrong})
    monkeypatch.setattr(run_module, "target", lambda name: changed)
    with pytest.raises(ModelError, match="expected texts within 5% WER of the torch model's"):
        export("peft")
    assert _nothing_left(tmp_path)


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("No space left on device")],
)
def test_a_full_disk_leaves_nothing(
    export: Callable[..., ExportReport],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    def full(plan: Any, folder: Path, say: Any) -> None:
        (folder / "half").write_bytes(b"0" * 1000)
        raise error

    changed = target_module.Target(**{**vars(target_module.target("peft")), "write": full})
    monkeypatch.setattr(run_module, "target", lambda name: changed)
    with pytest.raises(SpeechError, match="No space left on device; choose another place or make"):
        export("peft")
    assert _nothing_left(tmp_path)


def test_a_failed_replacement_keeps_what_was_there(
    export: Callable[..., ExportReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = export("peft", max_wer=9.0)
    before = (report.output / "check.json").read_text()

    def broken(partial: Path, path: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(run_module, "publish", broken)
    with pytest.raises(SpeechError, match="Input/output error"):
        export("peft", max_wer=9.0, overwrite=True)
    assert (report.output / "check.json").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_place_that_cannot_be_is_refused_at_once(
    tiny_whisper_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "load_base", lambda base: pytest.fail("was loaded"))
    (tmp_path / "file").write_text("")
    with pytest.raises(SpeechError, match="is a file; choose another place"):
        export_model(tiny_whisper_folder, "peft", tmp_path / "file" / "below" / "out")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SpeechError, match="a link; name its target"):
        export_model(tiny_whisper_folder, "peft", tmp_path / "link")


def test_an_export_replaces_only_an_export(
    tiny_whisper_folder: Path, tones: list[Path], tmp_path: Path
) -> None:
    runner, output = CliRunner(), tmp_path / "out"
    arguments = [
        "export",
        "--to",
        "peft",
        "--base",
        str(tiny_whisper_folder),
        "--output",
        str(output),
    ]
    arguments += ["--check", str(tones[0]), "--max-wer", "9"]
    output.mkdir()
    (output / "mine.txt").write_text("keep")
    for more in ([], ["--overwrite"]):
        result = runner.invoke(app, [*arguments, *more])
        assert isinstance(result.exception, SpeechError)
    assert "has no check.json" in str(result.exception)
    assert [path.name for path in output.iterdir()] == ["mine.txt"]
    (output / "mine.txt").unlink()
    output.rmdir()
    assert runner.invoke(app, arguments).exit_code == 0
    before = (output / "check.json").stat().st_mtime_ns
    result = runner.invoke(app, [*arguments, "--overwrite"])
    assert result.exit_code == 0 and (output / "check.json").stat().st_mtime_ns > before
    assert "adapters merged: none" in result.output and "model.safetensors" in result.output
    assert " 0.0 MB" not in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_options_and_recordings_are_read_first(tiny_whisper_folder: Path, tmp_path: Path) -> None:
    arguments = [
        "export",
        "--to",
        "peft",
        "--base",
        str(tiny_whisper_folder),
        "--output",
        str(tmp_path / "out"),
    ]
    result = CliRunner().invoke(app, [*arguments, "--option", "quick"])
    assert "--option: expected NAME=VALUE, got 'quick'" in str(result.exception)
    result = CliRunner().invoke(app, [*arguments, "--check", str(tmp_path / "gone.wav")])
    assert "gone.wav" in str(result.exception)
    assert _nothing_left(tmp_path)
