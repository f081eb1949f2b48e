"""Normalisation before scoring."""

from __future__ import annotations

import pytest

from lora_speech.data.text import normalizer
from lora_speech.errors import SpeechError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello, World!", "hello world"),
        ("seven three oh five", "7 3 0 5"),
        ("twenty-five dollars", "$25"),
        ("I can't", "i can not"),
        ("mr. smith", "mister smith"),
    ],
)
def test_english(text: str, expected: str) -> None:
    assert normalizer("auto", "en")(text) == expected


def test_digit_strings_count_digit_by_digit() -> None:
    auto, whisper = normalizer("auto"), normalizer("whisper")
    assert len(auto("seven three five nine").split()) == 4
    assert whisper("seven three five nine") == "7359"
    assert auto("seven three five") == auto("7 3 5")


def test_whisper_is_exactly_whispers_own() -> None:
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    text = "Colour: twenty one, one two three; isn't it?"
    spelling = {"colour": "color"}
    assert normalizer("whisper", "en", spelling)(text) == EnglishTextNormalizer(spelling)(text)
    assert "color" in normalizer("auto", "en", spelling)(text)


def test_other_languages_keep_words_and_accents() -> None:
    assert normalizer("auto", "es")("¿Qué número, uno?") == "qué número uno"


def test_basic_and_none() -> None:
    assert normalizer("basic")("One, Two!") == "one two"
    assert normalizer("none")(" One, Two! ") == "One, Two!"


def test_unknown_name() -> None:
    with pytest.raises(SpeechError, match="expected one of auto, whisper, basic, none, got 'x'"):
        normalizer("x")
