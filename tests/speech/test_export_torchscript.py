"""Models for LibTorch, and the C++ program that runs them without Python."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from tiny_whisper import make_adapter, tone

from lora_speech.data.audio import load_audio
from lora_speech.errors import SpeechError
from lora_speech.export.run import export_model
from lora_speech.export.torch_graphs import TOKENS
from lora_speech.models.loading import load_for_serving
from lora_speech.transcription import transcribe

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "cpp"

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`transcribe`, built here unless LORA_KERNELS_TRANSCRIBE names it."""
    named = os.environ.get("LORA_KERNELS_TRANSCRIBE")
    if named:
        return Path(named)
    if shutil.which("cmake") is None or shutil.which("g++") is None:
        pytest.skip("cmake or g++ is not installed")
    folder = tmp_path_factory.mktemp("transcribe")
    configure = ["cmake", "-S", EXAMPLE, "-B", folder, "-DCMAKE_BUILD_TYPE=Release"]
    configure += [
        f"-DLORA_KERNELS_TORCH={torch.__path__[0]}",
        f"-DPython_EXECUTABLE={sys.executable}",
    ]
    configure += ["-G", "Ninja"] if shutil.which("ninja") else []
    configure += ["-DCMAKE_CXX_FLAGS_RELEASE=-O1"]  # its own work is small: compiled sooner
    subprocess.run(configure, check=True, capture_output=True)
    subprocess.run(["cmake", "--build", folder], check=True, capture_output=True)
    return folder / "transcribe"


@pytest.fixture(scope="session")
def run(program: Path) -> Run:
    """Runs the program in an environment without Python."""

    def call(*arguments: object) -> subprocess.CompletedProcess[str]:
        from lora_kernels.ops._library import library_path

        environment = {"PATH": "/nowhere", "LORA_KERNELS_LIBRARY": str(library_path())}
        command = [str(program), *map(str, arguments)]
        found = subprocess.run(command, capture_output=True, env=environment)
        # Not text=True, which makes line ends of carriage returns: random weights write them.
        return subprocess.CompletedProcess(
            command, found.returncode, found.stdout.decode(), found.stderr.decode()
        )

    return call


@pytest.fixture(scope="session")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five seconds of changing tones with a pause: three windows of a tiny Whisper."""
    parts = [
        tone(1.5),
        tone(1.2, frequency=700.0),
        np.zeros(8000, np.float32),
        tone(1.8, frequency=300.0),
    ]
    path = tmp_path_factory.mktemp("recording") / "tones.wav"
    soundfile.write(path, np.concatenate(parts), 16_000, subtype="PCM_16")
    return path


@pytest.fixture(scope="session")
def adapters(
    tiny_whisper_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Two adapters of different ranks; the second, of rank 1, leaves most layers alone."""
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "a": make_adapter(tiny_whisper_folder, folder / "a", rank=4, seed=1),
        "b": make_adapter(tiny_whisper_folder, folder / "b", rank=1, seed=2, targets=["v_proj"]),
    }


@pytest.fixture(scope="session")
def live(
    tiny_whisper_folder: Path,
    adapters: dict[str, Path],
    recording: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A folder with live adapters."""
    output = tmp_path_factory.mktemp("live") / "model"
    report = export_model(
        tiny_whisper_folder, "torchscript", output, adapters=adapters, check=[recording]
    )
    assert [c.adapter for c in report.check.comparisons] == [None, "a", "b"]
    assert report.check.identical
    assert len({c.got for c in report.check.comparisons}) == 3
    return output


def said(model: object, recording: Path, adapter: str | None = None) -> tuple[str, str]:
    """What Python hears: text and tokens as the program prints them."""
    segments, _ = transcribe(model, recording, adapter=adapter, language="en")  # type: ignore[arg-type]
    tokens = "".join(" ".join(map(str, segment.tokens)) + "\n" for segment in segments)
    return " ".join(segment.text for segment in segments) + "\n", tokens


@pytest.mark.parametrize("adapter", [None, "a", "b"])
def test_the_program_says_what_python_says(
    run: Run,
    live: Path,
    tiny_whisper_folder: Path,
    adapters: dict[str, Path],
    recording: Path,
    adapter: str | None,
) -> None:
    model = load_for_serving(tiny_whisper_folder, adapters)
    text, tokens = said(model, recording, adapter)
    chosen = [] if adapter is None else ["--adapter", adapter]
    assert tokens.count("\n") >= 3
    found = run("--tokens", *chosen, live, recording)
    assert (found.returncode, found.stdout) == (0, tokens), found.stderr
    assert run(*chosen, live, recording).stdout == text


def test_merged_and_int8_with_the_program(
    run: Run, tiny_whisper_folder: Path, adapters: dict[str, Path], recording: Path, tmp_path: Path
) -> None:
    report = export_model(
        tiny_whisper_folder,
        "torchscript",
        tmp_path / "merged",
        adapters={"a": adapters["a"]},
        merge=True,
        check=[recording],
    )
    assert report.check.identical
    assert not (tmp_path / "merged" / "adapters").exists()
    plain = report.bytes["model.ts"]
    report = export_model(
        tiny_whisper_folder,
        "torchscript",
        tmp_path / "int8",
        adapters=adapters,
        int8=True,
        check=[recording],
    )
    assert report.check.identical
    assert report.bytes["model.ts"] < 0.7 * plain
    script = torch.jit.load(str(tmp_path / "int8" / "model.ts"))
    code = str(script.graphs.encode.code) + str(script.graphs.decode.code)
    assert "ops.lora_kernels.int8_lora_linear" in code
    assert "ops.lora_kernels.lora_linear" not in code
    assert "aten::conv" not in code
    model = load_for_serving(tiny_whisper_folder, adapters, int8=True)
    for adapter in (None, "a", "b"):
        chosen = [] if adapter is None else ["--adapter", adapter]
        found = run("--tokens", *chosen, tmp_path / "int8", recording)
        assert (found.returncode, found.stdout) == (0, said(model, recording, adapter)[1])


def test_the_program_says_what_python_says_about_real_speech(
    run: Run, real_speech: Path, tmp_path: Path
) -> None:
    """11 s of a speech, which is cut into windows, and digits, by the shipped model."""
    model = load_for_serving(int8=True)
    files = [real_speech / "jfk.flac", *sorted((real_speech / "fsdd").glob("*_0.wav"))[:3]]
    paths = []
    for file in files:
        path = tmp_path / f"{file.stem}.wav"
        soundfile.write(path, load_audio(file), 16_000, subtype="FLOAT")
        paths.append(path)
    report = export_model("shipped", "torchscript", tmp_path / "model", int8=True, check=paths[:1])
    assert report.check.identical
    found = run(tmp_path / "model", *paths)
    expected = "".join(f"{path}: {said(model, path)[0]}" for path in paths)
    assert found.stdout == expected, found.stderr
    assert len(said(model, paths[0])[0].split()) > 10


def test_the_program_names_what_cannot_be_used(run: Run, live: Path, tmp_path: Path) -> None:
    good, other = tmp_path / "good.wav", tmp_path / "other.wav"
    soundfile.write(good, tone(0.5), 16_000, subtype="PCM_16")
    soundfile.write(other, tone(0.5, 8000), 8000, subtype="PCM_16")
    cut = tmp_path / "cut.wav"
    cut.write_bytes(good.read_bytes()[:-100])
    damaged = tmp_path / "damaged"
    shutil.copytree(live, damaged)
    (damaged / "model.ts").write_bytes(b"nothing")
    missing = tmp_path / "missing"
    shutil.copytree(live, missing, ignore=shutil.ignore_patterns(TOKENS))
    cases: list[tuple[int, str, list[object]]] = [
        (2, "usage: transcribe", []),
        (2, "expected a folder and a recording, got 1", [live]),
        (2, "expected a known option, got '--adaptor'", ["--adaptor", "a", live, good]),
        (2, "--adapter: expected a value after it", [live, good, "--adapter"]),
        (2, "--threads: expected a number from 1 on, got 'x'", ["--threads", "x", live, good]),
        (1, "nowhere.wav: expected a WAV file, got nothing", [live, tmp_path / "nowhere.wav"]),
        (
            1,
            "samples per second, as the model takes them, got 8000; convert it: ffmpeg",
            [live, other],
        ),
        (1, "the file was cut short", [live, cut]),
        (1, "another format", [live, live / "decoding.json"]),
        (1, "--adapter: expected one of a, b, got 'c'", ["--adapter", "c", live, good]),
        (1, "expected an exported folder, got none", [tmp_path / "nowhere", good]),
        (1, "expected an exported model with graphs.json, got none", [tmp_path, good]),
        (1, "model.ts: expected", [damaged, good]),
        (1, f"{TOKENS}: expected a file that can be read", [missing, good]),
        (1, "--library: expected the operators", ["--library", good, live, good]),
    ]
    for status, text, arguments in cases:
        found = run(*arguments)
        assert (found.returncode, text in found.stderr) == (status, True), (text, found.stderr)
        assert not found.stdout
        assert len(found.stderr) < 2500, found.stderr
    assert run("--help").stdout.startswith("usage: transcribe")
    assert run(live, good).returncode == 0


def test_the_program_holds_no_python(program: Path) -> None:
    libraries = subprocess.run(["ldd", program], capture_output=True, text=True).stdout
    assert "libtorch_cpu" in libraries
    assert "libpython" not in libraries
    assert "libtorch_python" not in libraries


def test_silence_is_no_text(run: Run, live: Path, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "silence.wav", np.zeros(16_000), 16_000, subtype="PCM_16")
    found = run(live, tmp_path / "silence.wav")
    assert (found.returncode, found.stdout) == (0, "\n")


@pytest.mark.slow
def test_aoti(
    run: Run,
    tiny_whisper_folder: Path,
    adapters: dict[str, Path],
    recording: Path,
    tmp_path: Path,
) -> None:
    """Compiled ahead of time: the same tokens, with live adapters, here and in the program."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    report = export_model(
        tiny_whisper_folder, "aoti", tmp_path / "model", adapters=adapters, check=[recording]
    )
    assert report.check.identical
    model = load_for_serving(tiny_whisper_folder, adapters)
    for adapter in (None, "a", "b"):
        chosen = [] if adapter is None else ["--adapter", adapter]
        found = run("--tokens", *chosen, tmp_path / "model", recording)
        assert (found.returncode, found.stdout) == (0, said(model, recording, adapter)[1])


def test_a_missing_compiler_is_named(
    tiny_whisper_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recording: Path
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(SpeechError, match=r"--to aoti: expected a C\+\+ compiler"):
        export_model(tiny_whisper_folder, "aoti", tmp_path / "model", check=[recording])
    assert not list(tmp_path.iterdir())
