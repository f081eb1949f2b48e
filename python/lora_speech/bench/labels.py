"""What people read instead of the record's keys, in tables and plots alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lora_speech.bench.settings import MIXED_RANKS

NAMES = {
    "ours": "ours",
    "ours_one_adapter": "ours, one adapter",
    "ours_rank16": "ours, one rank 16",
    "ctranslate2": "CTranslate2",
    "openvino_bf16": "OpenVINO bf16",
    "openvino_f32": "OpenVINO fp32",
    "transformers_peft": "transformers + PEFT",
    "peft": "transformers + PEFT",
}


@dataclass(frozen=True)
class Section:
    """How one section of whole models is shown.

    Attributes
    ----------
    key, title, explanation, unit : str
        Of the record, and for people.
    more_is_better : bool
        Tokens per second rather than milliseconds.
    """

    key: str
    title: str
    explanation: str
    unit: str
    more_is_better: bool = True


_DECODING = (
    "From the encoder's output, cross-attention's keys and values included; the same prompt and "
    "the same number of new tokens for all. "
)
SECTIONS = (
    Section("decode", "Decoding, one utterance", _DECODING + "Greedy.", "tokens/s"),
    Section("decode_batch8", "Decoding, 8 utterances", _DECODING + "Greedy.", "tokens/s"),
    Section(
        "decode_batch8_adapters",
        "Decoding, 8 utterances, 8 adapters",
        _DECODING + "Greedy. Ranks "
        f"{', '.join(map(str, MIXED_RANKS))}; beside it the same batch and model with one adapter, "
        "of the mean of these ranks and of rank 16; PEFT by adapter_names.",
        "tokens/s",
    ),
    Section("decode_beam5", "Decoding with 5 beams", _DECODING, "tokens/s"),
    Section("encoder", "Encoding one window", "Features to encoder output.", "ms", False),
)


def comparisons(data: dict[str, Any], key: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Model, threads and figures of every comparison of a section."""
    for model, by_threads in data.get(key, {}).items():
        for threads, figures in by_threads.items():
            yield model, threads, figures


def advantage(section: Section, figures: dict[str, float]) -> tuple[float, str] | None:
    """How many times as fast ours is as the best of the others, and its name."""
    others = {
        name: value
        for name, value in figures.items()
        if name in NAMES and not name.startswith("ours")
    }
    if not others:
        return None
    best = (max if section.more_is_better else min)(others, key=others.__getitem__)
    ratio = figures["ours"] / others[best]
    return (ratio if section.more_is_better else 1.0 / ratio), NAMES[best]


def rules(data: dict[str, Any]) -> str:
    """What the contestants are, and with what they were measured."""
    facts = data["environment"]
    versions = ", ".join(f"{name} {text}" for name, text in facts["versions"].items())
    return (
        "Ours: INT8 base with a live, unmerged adapter of rank 16 on every projection; CTranslate2 "
        "(its fastest compute type) and OpenVINO: the adapter merged; transformers + PEFT: fp32, "
        "unmerged. Contestants take turns in random order; medians. "
        f"{facts['cpu']}, {versions}."
    )
