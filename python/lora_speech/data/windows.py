"""Cut recordings into windows that a model takes, at the quietest points.

Levels are root-mean-square over 20 ms frames. A frame is speech when it lies above a threshold
between the recording's noise floor and its peaks; windows start and end with some margin around
speech, and where speech goes on for longer than a window it is cut where it is quietest.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FRAME_SECONDS = 0.02
"""Hop of the level measurement: a stop consonant's closure spans two or three such frames."""

MARGIN_SECONDS = 0.2
"""Kept around speech: weak onsets and releases lie below the threshold."""

SILENCE_DB = -60.0
"""Level, relative to full scale, below which nothing counts as speech."""

RANGE_DB = 35.0
"""A frame this far below the loudest ones counts as silence."""


@dataclass(frozen=True)
class Window:
    """Samples `begin` to `end` of a recording; `speech_begin`, `speech_end` without margins."""

    begin: int
    end: int
    speech_begin: int
    speech_end: int


def cut_windows(
    samples: np.ndarray,
    sampling_rate: int,
    longest_seconds: float,
) -> list[Window]:
    """Cut a recording into windows of speech.

    Parameters
    ----------
    samples : numpy.ndarray
        float32 [samples].
    sampling_rate : int
        Samples per second.
    longest_seconds : float
        No window is longer.

    Returns
    -------
    list of Window
        In order, without overlap, silence between them left out; empty for a silent recording.
    """
    hop = max(1, int(FRAME_SECONDS * sampling_rate))
    longest = int(longest_seconds * sampling_rate)
    levels = frame_levels(samples, hop)
    voiced = levels > speech_threshold(levels)
    if not voiced.any():
        return []
    if len(samples) <= longest:
        frames = np.flatnonzero(voiced)
        speech_end = min(len(samples), int(frames[-1] + 1) * hop)
        return [Window(0, len(samples), int(frames[0]) * hop, speech_end)]

    # Smoothing over a syllable lets the cut fall into a pause rather than into a closure.
    smooth = np.convolve(levels, np.ones(15) / 15, mode="same")
    margin = int(MARGIN_SECONDS * sampling_rate)
    windows: list[Window] = []
    position, total = 0, len(levels)
    while position < total:
        ahead = np.flatnonzero(voiced[position:])
        if not ahead.size:
            break
        first = position + int(ahead[0])
        begin = max(position * hop, first * hop - margin)
        limit = (begin + longest) // hop
        if limit >= total:
            cut = total
        else:
            # The later half of the window: cuts rarely fall early, and windows stay long.
            half = first + (limit - first) // 2
            cut = half + int(np.argmin(smooth[half:limit]))
            cut = max(cut, first + 1)
        last = first + int(np.flatnonzero(voiced[first:cut])[-1]) + 1
        end = min(len(samples), cut * hop, last * hop + margin, begin + longest)
        windows.append(Window(begin, end, first * hop, min(last * hop, end)))
        position = cut
    return windows


def frame_levels(samples: np.ndarray, hop: int) -> np.ndarray:
    """Return the level of each frame of `hop` samples in dB relative to full scale."""
    count = -(-len(samples) // hop)
    padded = np.zeros(count * hop, dtype=np.float64)
    padded[: len(samples)] = samples
    power = np.square(padded).reshape(count, hop).mean(axis=1)
    return 10.0 * np.log10(power + 1e-12)


def speech_threshold(levels: np.ndarray) -> float:
    """Return the level, in dB, above which a frame counts as speech.

    A third of the way from the noise floor (10th percentile) to the peaks (99th), but never more
    than `RANGE_DB` below the peaks, nor below `SILENCE_DB`. In steady noise of little range
    everything counts.
    """
    floor, peak = np.percentile(levels, 10), np.percentile(levels, 99)
    if peak - floor < 6.0:  # as loud throughout: all speech, or all noise; let the model decide
        return max(SILENCE_DB, float(levels.min()) - 1.0)
    return max(SILENCE_DB, peak - RANGE_DB, floor + (peak - floor) / 3.0 - 3.0)
