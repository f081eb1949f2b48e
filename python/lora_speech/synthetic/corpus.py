"""Texts that the synthesiser speaks: small grammars of numbers, times, commands and names.

A grammar maps a slot to alternatives; an alternative is plain words and ``{slot}`` references.
Everything is lower case without punctuation, so that word error rates need no normalisation.
The same seed gives the same texts on every machine.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Callable, Iterator

from lora_speech.synthetic.grammars import ENGLISH, SPANISH, Grammar

GRAMMARS: dict[str, Grammar] = {"en": ENGLISH, "es": SPANISH}
LANGUAGES: tuple[str, ...] = tuple(GRAMMARS)
SPLITS: tuple[str, ...] = ("train", "held_out")

DIGITS: dict[str, tuple[str, ...]] = {
    "en": ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    "es": ("cero", "uno", "dos", "tres", "cuatro", "cinco", "seis", "siete", "ocho", "nueve"),
}

# One sentence in ten is held out, by its checksum: the split needs no list and never drifts.
_HELD_OUT_ONE_IN = 10
# Shorter sentences are too few to hold any out: a word that is never trained is not a fair test.
_MIN_HELD_OUT_WORDS = 3
_MAX_DRAWS_PER_TEXT = 1000
_SLOT = re.compile(r"\{(\w+)\}")


def _vocabulary(grammar: Grammar) -> frozenset[str]:
    alternatives = (text for choices in grammar.values() for text in choices)
    return frozenset(word for text in alternatives for word in _SLOT.sub(" ", text).split())


VOCABULARY: dict[str, frozenset[str]] = {
    language: _vocabulary(grammar) | frozenset(DIGITS[language])
    for language, grammar in GRAMMARS.items()
}


def _check(language: str, split: str = "train") -> None:
    if language not in GRAMMARS:
        raise ValueError(f"language: expected one of {LANGUAGES}, got {language!r}")
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {SPLITS}, got {split!r}")


def expand(grammar: Grammar, slot: str, rng: random.Random) -> str:
    """Speak one random alternative of a slot, with the slots inside it filled in turn."""
    text = rng.choice(grammar[slot])
    return _SLOT.sub(lambda match: expand(grammar, match.group(1), rng), text)


def split_of(sentence: str) -> str:
    """Say which split a sentence belongs to: ``"train"`` or ``"held_out"``."""
    if len(sentence.split()) < _MIN_HELD_OUT_WORDS:
        return "train"
    return "train" if zlib.crc32(sentence.encode()) % _HELD_OUT_ONE_IN else "held_out"


def sentence_stream(
    rng: random.Random, *, language: str = "en", split: str = "train"
) -> Iterator[str]:
    """Yield sentences of one split for ever; a sentence may come again.

    Parameters
    ----------
    rng : random.Random
        The only source of chance.
    language : str
        ``"en"`` or ``"es"``.
    split : str
        ``"train"`` or ``"held_out"``.
    """
    _check(language, split)
    while True:
        sentence = expand(GRAMMARS[language], "sentence", rng)
        if split_of(sentence) == split:
            yield sentence


def sentences(
    count: int, *, language: str = "en", seed: int = 0, split: str = "train"
) -> list[str]:
    """Draw distinct sentences.

    Parameters
    ----------
    count : int
        How many.
    language : str
        ``"en"`` or ``"es"``.
    seed : int
        The same seed gives the same sentences.
    split : str
        ``"train"``: what the base model may be trained on. ``"held_out"``: what it never heard.

    Returns
    -------
    list of str
        ``count`` distinct sentences.

    Raises
    ------
    ValueError
        An unknown language or split, or more sentences than the grammar yields.
    """
    _check(language, split)
    rng = random.Random(f"{seed}/{language}")
    return _distinct(lambda: expand(GRAMMARS[language], "sentence", rng), count, split)


def digit_strings(
    count: int,
    *,
    language: str = "en",
    seed: int = 0,
    split: str = "train",
    min_digits: int = 3,
    max_digits: int = 7,
) -> list[str]:
    """Draw distinct strings of spoken digits, for example ``"four seven one nine"``.

    Parameters
    ----------
    count, language, seed, split
        As in :func:`sentences`.
    min_digits, max_digits : int
        Bounds of the length of a string, both included.

    Returns
    -------
    list of str
        ``count`` distinct strings.

    Raises
    ------
    ValueError
        An unknown language or split, impossible bounds, or more strings than there are.
    """
    _check(language, split)
    if not 1 <= min_digits <= max_digits:
        raise ValueError(
            "min_digits, max_digits: expected 1 <= min_digits <= max_digits, "
            f"got {min_digits} and {max_digits}"
        )
    rng = random.Random(f"{seed}/{language}/digits")

    def draw() -> str:
        length = rng.randint(min_digits, max_digits)
        return " ".join(rng.choice(DIGITS[language]) for _ in range(length))

    return _distinct(draw, count, split)


def _distinct(draw: Callable[[], str], count: int, split: str) -> list[str]:
    """Collect ``count`` distinct texts of a split in the order of their first appearance."""
    found: dict[str, None] = {}
    # Bounded, because a split may hold fewer texts than asked for, or none.
    for _ in range((count + 1) * _MAX_DRAWS_PER_TEXT):
        if len(found) == count:
            return list(found)
        text = draw()
        if split_of(text) == split:
            found[text] = None
    raise ValueError(
        f"count: expected at most {len(found)}, which is all that was found in the split "
        f"{split!r}, got {count}; draw fewer"
    )
