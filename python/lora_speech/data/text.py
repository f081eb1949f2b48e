"""Text normalisation before words and characters are counted.

The normalisers are Whisper's own, as `transformers` carries them: the English one (spelling,
contractions, numbers) and the basic one (case, punctuation) for every other language.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache

from lora_speech.errors import SpeechError

NORMALIZERS = ("auto", "whisper", "basic", "none")
"""Names that `normalizer` accepts."""

# Whisper's English normaliser joins spoken digits: "one two three" becomes "123", one word, so a
# digit string would be all right or all wrong. A word between keeps them apart and goes away again.
_DIGIT = r"(?:zero|oh|one|two|three|four|five|six|seven|eight|nine)"
_DIGIT_PAIR = re.compile(rf"\b({_DIGIT})[\s,;-]+(?={_DIGIT}\b)", re.IGNORECASE)
_APART = "digitapart"


def normalizer(
    name: str = "auto",
    language: str = "en",
    spelling: Mapping[str, str] | None = None,
) -> Callable[[str], str]:
    """Make the function that prepares text for scoring.

    Parameters
    ----------
    name : str
        `"auto"`: Whisper's English normaliser with digit strings counted digit by digit
        ("one two three" and "1 2 3" both become three words) for English, Whisper's basic one for
        other languages. `"whisper"`: exactly what Whisper's published figures use, which joins a
        digit string into one word. `"basic"`: case and punctuation only. `"none"`: the text as is.
    language : str
        Language code of the text, e.g. `"en"`.
    spelling : mapping, optional
        British to American spellings, as the model's tokenizer carries them.

    Returns
    -------
    callable
        str to str.
    """
    if name not in NORMALIZERS:
        raise SpeechError(
            f"normalizer: expected one of {', '.join(NORMALIZERS)}, got {name!r}; choose one"
        )
    if name == "none":
        return str.strip
    if name == "basic" or not is_english(language):
        return _basic()
    english = _english(tuple(sorted((spelling or {}).items())))
    if name == "whisper":
        return lambda text: english(text).strip()

    def keep_digits_apart(text: str) -> str:
        words = english(_DIGIT_PAIR.sub(rf"\1 {_APART} ", text))
        return " ".join(word for word in words.split() if word != _APART)

    return keep_digits_apart


def is_english(language: str | None) -> bool:
    """Tell whether a language code or name means English (the default when None)."""
    return (language or "en").strip("<|>").lower() in ("en", "english")


@lru_cache(maxsize=8)
def _english(spelling: tuple[tuple[str, str], ...]) -> Callable[[str], str]:
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    return EnglishTextNormalizer(dict(spelling))


@lru_cache(maxsize=1)
def _basic() -> Callable[[str], str]:
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer

    basic = BasicTextNormalizer()
    return lambda text: " ".join(basic(text).split())
