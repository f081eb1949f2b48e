"""Audio in: formats, rates, channels, and every way a file can be bad."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
from tiny_whisper import tone

from lora_speech.data.audio import load_audio, prepare_samples
from lora_speech.errors import AudioError


@pytest.mark.parametrize(
    ("suffix", "subtype", "tolerance"),
    [
        ("wav", "PCM_16", 1e-3),
        ("wav", "FLOAT", 1e-6),
        ("flac", "PCM_16", 1e-3),
        ("ogg", "VORBIS", 0.05),
        ("mp3", None, 0.05),
    ],
)
def test_formats(tmp_path: Path, suffix: str, subtype: str | None, tolerance: float) -> None:
    path = tmp_path / f"tone.{suffix}"
    samples = tone(1.0)
    soundfile.write(path, samples, 16_000, subtype=subtype)
    loaded = load_audio(path)
    assert loaded.dtype == np.float32
    assert abs(len(loaded) - len(samples)) < 2500  # mp3 pads with encoder delay
    level = np.sqrt(np.mean(loaded[4000:12000] ** 2))
    assert level == pytest.approx(0.3 / np.sqrt(2), abs=max(tolerance, 2e-3))


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000])
def test_any_rate_keeps_length_and_pitch(tmp_path: Path, rate: int) -> None:
    path = tmp_path / "tone.wav"
    soundfile.write(path, tone(0.5, rate), rate)
    loaded = load_audio(path)
    assert abs(len(loaded) - 8_000) <= 1
    spectrum = np.abs(np.fft.rfft(loaded[1000:7000] * np.hanning(6000)))
    assert np.argmax(spectrum) * 16_000 / 6000 == pytest.approx(440, abs=3)


def test_stereo_becomes_the_mean_of_its_channels(tmp_path: Path) -> None:
    path = tmp_path / "stereo.wav"
    left, right = tone(0.2), tone(0.2, frequency=880.0)
    soundfile.write(path, np.stack([left, right], axis=1), 16_000, subtype="FLOAT")
    np.testing.assert_allclose(load_audio(path), (left + right) / 2, atol=1e-6)


def test_bytes_and_integers() -> None:
    samples = prepare_samples(np.array([0, 32767, -32767], dtype=np.int16), 16_000)
    np.testing.assert_allclose(samples, [0.0, 1.0, -1.0])


def test_bytes_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "tone.flac"
    soundfile.write(path, tone(0.1), 16_000)
    np.testing.assert_array_equal(load_audio(path.read_bytes()), load_audio(path))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match=r"gone\.wav: no such audio file; check the path"):
        load_audio(tmp_path / "gone.wav")


def test_folder(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match="got a folder"):
        load_audio(tmp_path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"hello, I am a text file, not audio", "cannot be decoded"),
        (b"RIFF\x24\x00\x00\x00WAVEfmt ", "cannot be decoded"),
        (b"fLaC" + bytes(100), "cannot be decoded"),
    ],
)
def test_corrupt_files_name_file_reason_and_fix(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    path = tmp_path / "bad.wav"
    path.write_bytes(content)
    with pytest.raises(AudioError, match=reason) as caught:
        load_audio(path)
    assert "bad.wav" in str(caught.value)
    assert "again" in str(caught.value) or "convert" in str(caught.value)


def test_a_header_without_samples(tmp_path: Path) -> None:
    path = tmp_path / "nothing.wav"
    soundfile.write(path, np.zeros(0, dtype=np.float32), 16_000)
    with pytest.raises(AudioError, match="0 samples"):
        load_audio(path)


def test_a_file_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, np.zeros(1000), 16_000)
    whole = path.read_bytes()
    path.write_bytes(whole[:900])
    with pytest.raises(AudioError, match=r"a\.wav: expected 2,000 bytes.*got 856.*cut short"):
        load_audio(path)
    size = whole.index(b"data") + 4  # a stream's header: nobody knew the size
    path.write_bytes(whole[:size] + b"\xff" * 4 + whole[size + 4 :])
    assert len(load_audio(path)) == 1000


def test_non_finite_samples(tmp_path: Path) -> None:
    path = tmp_path / "nan.wav"
    samples = tone(0.1)
    samples[7] = np.nan
    soundfile.write(path, samples, 16_000, subtype="FLOAT")
    with pytest.raises(AudioError, match="1 NaN or infinite"):
        load_audio(path)


def test_bad_shapes_and_rates() -> None:
    with pytest.raises(AudioError, match=r"\[2, 2, 2\]"):
        prepare_samples(np.zeros((2, 2, 2)), 16_000)
    with pytest.raises(AudioError, match="positive sampling rate, got 0"):
        prepare_samples(np.zeros(4), 0)


def test_real_recordings(real_speech: Path) -> None:
    speech = load_audio(real_speech / "jfk.flac")  # 11 s, 44.1 kHz, stereo
    assert len(speech) == pytest.approx(11 * 16_000, rel=0.01)
    digit = load_audio(real_speech / "fsdd" / "7_jackson_0.wav")  # 8 kHz, mono
    assert 0.1 < len(digit) / 16_000 < 1.5
