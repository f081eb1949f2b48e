"""The command line as people type it: files written, messages, exit statuses."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import soundfile
from tiny_whisper import make_adapter, tone

from lora_speech.cli import app as cli
from lora_speech.training.config import TrainingConfig


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    words = ["go", "stop", "left", "up"]
    lines = []
    for index, word in enumerate(words):
        path = tmp_path / f"{word}.wav"
        soundfile.write(path, tone(0.8, frequency=200.0 * (index + 1)), 16_000)
        lines.append(json.dumps({"audio": path.name, "text": word}))
    path = tmp_path / "m.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def run(*arguments: object) -> int:
    """Run `lora-speech` in this process and return its exit status."""
    with pytest.raises(SystemExit) as caught:
        cli.main([str(argument) for argument in arguments])
    code = caught.value.code
    return int(code or 0)


def failure(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that must fail with status 2 and one message; return the message."""
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return captured.err


def test_finetune_evaluate_transcribe(
    manifest: Path,
    tiny_whisper_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    finetune = (
        "finetune", "--base", tiny_whisper_folder, "--train", manifest, "--validation", manifest,
        "--output", out, "--steps", 4, "--batch-size", 2, "--rank", 2, "--validate-every", 2,
    )  # fmt: skip
    assert run(*finetune) == 0
    assert f"adapter: {out}" in capsys.readouterr().out
    assert (out / "adapter_config.json").is_file()
    assert "--resume" in failure(capsys, *finetune)
    assert run(*finetune, "--resume") == 0
    capsys.readouterr()

    result = tmp_path / "result.json"
    assert (
        run(
            "evaluate", "--base", tiny_whisper_folder, "--adapter", out, "--data", manifest,
            "--json", result, "--utterances", tmp_path / "u.jsonl", "--int8", "--beam-size", 2,
            "--length-penalty", -0.5, "--device", "cpu",
        )
        == 0
    )  # fmt: skip
    written = json.loads(result.read_text())
    assert {"wer", "cer"} <= written.keys()
    settings = {
        "base": str(tiny_whisper_folder),
        "int8": True,
        "device": "cpu",
        "adapters": ["out"],
        "languages": ["en"],
        "beam_size": 2,
        "length_penalty": -0.5,
        "normalizer": "auto",
    }
    assert settings.items() <= written.items()
    assert len((tmp_path / "u.jsonl").read_text().splitlines()) == 4
    assert "WER" in capsys.readouterr().out

    files = [tmp_path / "go.wav", tmp_path / "up.wav"]
    for form in ("text", "json", "srt", "vtt"):
        assert (
            run(
                "transcribe", "--base", tiny_whisper_folder, "--adapter", f"me={out}", "--int8",
                *files, "--format", form, "--language", "en", "--beam-size", 2,
                "--length-penalty", 2,
            )
            == 0
        )  # fmt: skip
        text = capsys.readouterr().out
        if form == "json":
            assert [r["adapter"] for r in json.loads(text)] == ["me", "me"]
        else:
            assert str(files[0]) in text
            assert ("WEBVTT" in text) == (form == "vtt")


def test_transcribe_with_several_adapters(
    manifest: Path,
    tiny_whisper_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    one = make_adapter(tiny_whisper_folder, tmp_path / "one", rank=2, seed=1)
    two = make_adapter(tiny_whisper_folder, tmp_path / "two", rank=3, seed=2)
    files = [tmp_path / f"{word}.wav" for word in ("go", "stop", "up")]
    command = (
        "transcribe", "--base", tiny_whisper_folder, "--adapter", f"one={one}", "--adapter",
        f"two={two}", "--language", "en", "--format", "json",
    )  # fmt: skip
    assert "give --use NAME once, or once per file" in failure(capsys, *command, *files)
    assert "one, two, base, got 'three'" in failure(capsys, *command, "--use", "three", *files)
    assert "one per file (3), got 2" in failure(
        capsys, *command, "--use", "one", "--use", "two", *files
    )
    chosen = ("--use", "two", "--use", "base", "--use", "one")
    folder = tmp_path / "texts"
    assert run(*command, *chosen, *files, "--output-dir", folder) == 0
    texts = {p.stem: json.loads(p.read_text())["adapter"] for p in folder.iterdir()}
    assert texts == {"go": "two", "stop": None, "up": "one"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"audio": "gone.wav", "text": "x"}', "bad.jsonl, line 1: audio: no such file"),
        ("{", "line 1: expected a JSON object"),
        ("", "expected at least one line"),
    ],
)
def test_bad_manifests(
    tiny_whisper_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: str,
    message: str,
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(content)
    out = tmp_path / "out"
    text = failure(
        capsys, "finetune", "--base", tiny_whisper_folder, "--train", bad, "--output", out
    )
    assert message in text
    assert not out.exists()
    result = tmp_path / "r.json"
    assert message in failure(
        capsys, "evaluate", "--base", tiny_whisper_folder, "--data", bad, "--json", result
    )
    assert not result.exists()


def test_bad_audio(
    tiny_whisper_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corrupt = tmp_path / "corrupt.mp3"
    corrupt.write_bytes(b"not audio at all" * 10)
    empty = tmp_path / "empty.wav"
    empty.touch()
    command = ("transcribe", "--base", tiny_whisper_folder)
    assert "corrupt.mp3: expected wav, flac, ogg or mp3" in failure(capsys, *command, corrupt)
    assert "empty.wav: expected an audio file, got an empty file" in failure(
        capsys, *command, empty
    )
    assert "gone.wav: no such audio file" in failure(capsys, *command, tmp_path / "gone.wav")


def test_results_never_overwrite_each_other_or_a_folder(
    manifest: Path, tiny_whisper_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other").mkdir()
    twin = tmp_path / "other" / "go.wav"
    twin.write_bytes((tmp_path / "go.wav").read_bytes())
    command = ("transcribe", "--base", tiny_whisper_folder)
    text = failure(capsys, *command, tmp_path / "go.wav", twin, "--output-dir", tmp_path / "out")
    assert "--output-dir" in text
    assert "go" in text
    assert not (tmp_path / "out").exists()
    text = failure(capsys, *command, tmp_path / "go.wav", "--output-dir", manifest)
    assert "can be written" in text
    assert manifest.is_file()


def test_bad_adapters(
    manifest: Path, tiny_whisper_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("transcribe", "--base", tiny_whisper_folder, tmp_path / "go.wav")
    assert "got 'nowhere', which is not there" in failure(
        capsys, *command, "--adapter", "me=nowhere"
    )
    assert "expected NAME=FOLDER, got '=x'" in failure(capsys, *command, "--adapter", "=x")
    adapter = make_adapter(tiny_whisper_folder, tmp_path / "a", rank=2, seed=1)
    twice = ("--adapter", f"me={adapter}", "--adapter", f"me={adapter}")
    assert "got 'me' twice" in failure(capsys, *command, *twice)
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert "adapter_model.safetensors" in failure(capsys, *command, "--adapter", f"me={adapter}")


def test_bad_bases_and_options(
    manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "got nothing there" in failure(
        capsys, "evaluate", "--base", tmp_path / "none", "--data", manifest
    )
    assert "steps: expected a positive number, got 0" in failure(
        capsys, "finetune", "--train", manifest, "--output", tmp_path / "o", "--steps", 0
    )
    greedy = "length_penalty: expected none with beam_size 1"
    for command in (("evaluate", "--data", manifest), ("transcribe", tmp_path / "go.wav")):
        assert greedy in failure(capsys, *command, "--length-penalty", 1)
        far = ("--beam-size", 2, "--length-penalty", 11)
        assert "length_penalty: expected -10 to 10, got 11" in failure(capsys, *command, *far)
    for command in (("evaluate", "--data", manifest), ("transcribe", tmp_path / "go.wav")):
        elsewhere = failure(capsys, *command, "--base", tmp_path / "none", "--device", "gpu")
        assert elsewhere.startswith("lora-speech: device: expected auto, cpu, cuda or cuda:N")
        assert elsewhere.count("\n") == 1
    failure(capsys, "transcribe")
    failure(capsys, "transcribe", tmp_path / "go.wav", "--format", "doc")
    failure(capsys, "frobnicate")


@pytest.mark.parametrize("command", ["finetune", "evaluate", "transcribe", "demo", "doctor"])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, "--help") == 0
    text = capsys.readouterr().out
    assert "Usage" in text
    if command not in ("doctor",):
        assert "--base" in text


def test_help_is_quick_and_imports_no_torch() -> None:
    code = (
        "import sys; from lora_speech.cli import app as cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for command in ("finetune", "evaluate", "transcribe", "demo", "doctor"):
        assert command in done.stdout


def test_defaults_are_those_of_the_library() -> None:
    given = inspect.signature(cli.finetune).parameters
    library = {f.name: f.default for f in fields(TrainingConfig) if f.name in given}
    assert len(library) >= 12
    assert {name: given[name].default for name in library} == library


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("doctor") == 0
    text = capsys.readouterr().out
    assert "transformers" in text
    assert "base model" in text
    assert "what --device auto takes" in text
