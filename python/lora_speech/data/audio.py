"""Audio in: any file that libsndfile reads, at any sampling rate, as mono float32 samples.

wav, flac, ogg (Vorbis and Opus) and mp3 are read by `soundfile`; sampling rates are converted by
`soxr` (the resampler of SoX). Samples are float32 in about [-1, 1], time in seconds.
"""

from __future__ import annotations

import io
import os
import re
from pathlib import Path

import numpy as np

from lora_speech.errors import AudioError, MissingExtraError

SAMPLING_RATE = 16_000
"""Samples per second that every model family of this package expects."""

_INSTALL = "install the speech extra: pip install 'lora-kernels[speech]'"


def load_audio(
    source: str | os.PathLike[str] | bytes,
    sampling_rate: int = SAMPLING_RATE,
    *,
    name: str | None = None,
) -> np.ndarray:
    """Read one recording as mono samples.

    Parameters
    ----------
    source : path or bytes
        An audio file, or the bytes of one (as Hugging Face data sets store them).
    sampling_rate : int
        Samples per second of the result.
    name : str, optional
        How error messages call the source; the path by default.

    Returns
    -------
    numpy.ndarray
        float32 [samples], contiguous, channels averaged.

    Raises
    ------
    AudioError
        The file is missing, empty, not audio, truncated to nothing, or holds NaN or infinity.
    """
    try:
        import soundfile
    except ImportError as error:
        raise MissingExtraError(f"reading audio needs soundfile; {_INSTALL}") from error

    if isinstance(source, (bytes, bytearray, memoryview)):
        name = name or "audio bytes"
        if not len(source):
            raise AudioError(f"{name}: expected an audio file, got 0 bytes; export it again")
        handle: object = io.BytesIO(bytes(source))
    else:
        path = Path(source)
        name = name or str(path)
        check_audio_file(path, name)
        handle = str(path)
    try:
        with soundfile.SoundFile(handle) as file:
            samples, rate = file.read(dtype="float32", always_2d=True), file.samplerate
            log = file.extra_info
    except (soundfile.LibsndfileError, RuntimeError, TypeError, ValueError) as error:
        reason = getattr(error, "error_string", None) or str(error)
        raise AudioError(
            f"{name}: expected wav, flac, ogg or mp3 audio, but it cannot be decoded "
            f"({reason.strip().rstrip('.')}); the file may be corrupt or of another format: "
            "convert it, e.g. ffmpeg -i INPUT -ar 16000 -ac 1 OUTPUT.wav"
        ) from error
    _refuse_cut_short(log, name)
    return prepare_samples(samples, rate, sampling_rate, name=name)


def _refuse_cut_short(log: str, name: str) -> None:
    """Refuse a WAV whose header promises more samples than came; libsndfile reads on silently."""
    cut = re.search(r"^data\s*: (\d+) \(should be (\d+)\)", log, re.MULTILINE)
    # A program that writes to a pipe cannot know the size and leaves the largest one there is.
    if cut and int(cut[2]) < int(cut[1]) < 2**31 - 1:
        raise AudioError(
            f"{name}: expected {int(cut[1]):,} bytes of samples, as its header says, got "
            f"{int(cut[2]):,}; the file was cut short: copy or export it again"
        )


def prepare_samples(
    samples: np.ndarray,
    from_rate: int,
    sampling_rate: int = SAMPLING_RATE,
    *,
    name: str = "audio",
) -> np.ndarray:
    """Turn decoded samples into mono float32 at the wanted rate.

    Parameters
    ----------
    samples : numpy.ndarray
        [samples] or [samples, channels]; floats in about [-1, 1] or signed integers (full scale).
    from_rate, sampling_rate : int
        Samples per second that came and that are wanted.
    name : str
        How error messages call the recording.

    Returns
    -------
    numpy.ndarray
        float32 [samples at the wanted rate], contiguous.

    Raises
    ------
    AudioError
        No samples, more than two dimensions, non-finite values or an impossible rate.
    """
    samples = np.asarray(samples)
    if samples.ndim not in (1, 2):
        raise AudioError(
            f"{name}: expected samples of shape [samples] or [samples, channels], got "
            f"{list(samples.shape)}; pass one recording at a time"
        )
    if samples.shape[0] == 0:
        raise AudioError(
            f"{name}: expected speech, got 0 samples; the recording is empty: record or export it "
            "again, or remove it from the list"
        )
    if from_rate <= 0 or sampling_rate <= 0:
        raise AudioError(
            f"{name}: expected a positive sampling rate, got {from_rate} (wanted {sampling_rate}); "
            "pass samples per second, e.g. 16000"
        )
    if np.issubdtype(samples.dtype, np.signedinteger):
        samples = samples.astype(np.float32) / float(np.iinfo(samples.dtype).max)
    samples = samples.astype(np.float32, copy=False)
    if samples.ndim == 2:
        samples = samples.mean(axis=1)
    if not np.isfinite(samples).all():
        bad = int((~np.isfinite(samples)).sum())
        raise AudioError(
            f"{name}: expected finite samples, got {bad} NaN or infinite ones; export it again "
            "as 16-bit PCM"
        )
    if from_rate != sampling_rate:
        samples = _resample(samples, from_rate, sampling_rate, name)
    return np.ascontiguousarray(samples, dtype=np.float32)


def _resample(samples: np.ndarray, from_rate: int, to_rate: int, name: str) -> np.ndarray:
    try:
        import soxr
    except ImportError as error:
        raise MissingExtraError(f"changing the sampling rate needs soxr; {_INSTALL}") from error
    resampled = soxr.resample(samples, from_rate, to_rate, quality="HQ")
    if resampled.shape[0] == 0:
        raise AudioError(
            f"{name}: {samples.shape[0]} samples at {from_rate} Hz are less than one sample at "
            f"{to_rate} Hz; the recording is too short to hold speech: remove it"
        )
    return resampled


def check_audio_file(path: Path, name: str | None = None) -> None:
    """Raise `AudioError` unless a readable, non-empty file is there; its content is not read."""
    name = name or str(path)
    if not path.exists():
        raise AudioError(
            f"{name}: no such audio file; check the path (relative paths are taken from the "
            f"current folder, {Path.cwd()}, or in a manifest from the manifest's folder)"
        )
    if path.is_dir():
        raise AudioError(f"{name}: expected an audio file, got a folder; name the files in it")
    if not os.access(path, os.R_OK):
        raise AudioError(f"{name}: the file cannot be read; change its permissions (chmod +r)")
    if path.stat().st_size == 0:
        raise AudioError(
            f"{name}: expected an audio file, got an empty file (0 bytes); copy or export it again"
        )
