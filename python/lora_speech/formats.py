"""Transcripts as plain text, JSON, SubRip (srt) and WebVTT (vtt)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lora_speech.errors import SpeechError

if TYPE_CHECKING:
    from lora_speech.transcription import Segment, TranscriptionInfo


def to_text(segments: Sequence[Segment], info: TranscriptionInfo | None = None) -> str:
    """One line of text per recording, ending in a newline."""
    return " ".join(segment.text for segment in segments if segment.text) + "\n"


def to_json(segments: Sequence[Segment], info: TranscriptionInfo | None = None) -> str:
    """A JSON object: `text`, `segments` (`start`, `end` in seconds, `text`) and the recording."""
    record: dict[str, object] = {"text": to_text(segments).strip()}
    if info is not None:
        record |= {
            "audio": info.name,
            "duration": round(info.duration, 3),
            "language": info.language,
            "adapter": info.adapter,
        }
    record["segments"] = [
        {
            "id": segment.id,
            "start": round(segment.start, 3),
            "end": round(segment.end, 3),
            "text": segment.text,
        }
        for segment in segments
    ]
    return json.dumps(record, ensure_ascii=False, indent=2) + "\n"


def to_srt(segments: Sequence[Segment], info: TranscriptionInfo | None = None) -> str:
    """SubRip subtitles: numbered cues, times as `HH:MM:SS,mmm`."""
    cues = (
        f"{number}\n{clock(s.start, ',')} --> {clock(s.end, ',')}\n{s.text}\n"
        for number, s in enumerate((s for s in segments if s.text), start=1)
    )
    return "\n".join(cues)


def to_vtt(segments: Sequence[Segment], info: TranscriptionInfo | None = None) -> str:
    """WebVTT subtitles: times as `HH:MM:SS.mmm`."""
    cues = (
        f"\n{clock(s.start, '.')} --> {clock(s.end, '.')}\n{_escape_vtt(s.text)}\n"
        for s in segments
        if s.text
    )
    return "WEBVTT\n" + "".join(cues)


def clock(seconds: float, decimal: str) -> str:
    """Write seconds as hours, minutes, seconds and milliseconds."""
    milliseconds = max(0, round(seconds * 1000))
    hours, rest = divmod(milliseconds, 3_600_000)
    minutes, rest = divmod(rest, 60_000)
    whole, rest = divmod(rest, 1000)
    return f"{hours:02d}:{minutes:02d}:{whole:02d}{decimal}{rest:03d}"


def _escape_vtt(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


FORMATS: dict[str, Callable[..., str]] = {
    "text": to_text,
    "json": to_json,
    "srt": to_srt,
    "vtt": to_vtt,
}
"""Writers by the name that `--format` takes."""


def render(
    segments: Sequence[Segment], info: TranscriptionInfo | None = None, format: str = "text"
) -> str:
    """Write a transcript in one of `FORMATS`."""
    if format not in FORMATS:
        raise SpeechError(
            f"format: expected one of {', '.join(FORMATS)}, got {format!r}; choose one of them"
        )
    return FORMATS[format](segments, info)
