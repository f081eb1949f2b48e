"""The texts: their vocabulary, their splits, and that a seed decides them."""

import random

import pytest

from lora_speech.synthetic import corpus


def test_the_vocabularies_are_large_enough() -> None:
    assert len(corpus.VOCABULARY["en"]) >= 300
    assert len(corpus.VOCABULARY["es"]) >= 100
    assert set(corpus.DIGITS["en"]) < corpus.VOCABULARY["en"]


@pytest.mark.parametrize("language", corpus.LANGUAGES)
def test_sentences_use_the_vocabulary_only(language: str) -> None:
    texts = corpus.sentences(2000, language=language, seed=3)
    words = {word for text in texts for word in text.split()}
    assert words <= corpus.VOCABULARY[language]
    assert len(words) > 0.9 * len(corpus.VOCABULARY[language])
    assert all(text == text.lower() == " ".join(text.split()) for text in texts)


@pytest.mark.parametrize("language", corpus.LANGUAGES)
def test_the_splits_share_no_sentence(language: str) -> None:
    train = corpus.sentences(1500, language=language, seed=1, split="train")
    held_out = corpus.sentences(300, language=language, seed=2, split="held_out")
    assert len(set(train)) == 1500
    assert len(set(held_out)) == 300
    assert not set(train) & set(held_out)


def test_a_seed_decides_the_texts() -> None:
    assert corpus.sentences(50, seed=7) == corpus.sentences(50, seed=7)
    assert corpus.sentences(50, seed=7) != corpus.sentences(50, seed=8)
    assert corpus.digit_strings(50, seed=7) == corpus.digit_strings(50, seed=7)


def test_a_stream_stays_in_its_split() -> None:
    stream = corpus.sentence_stream(random.Random(0), language="es", split="held_out")
    assert all(corpus.split_of(next(stream)) == "held_out" for _ in range(100))


def test_digit_strings_have_the_lengths_asked_for() -> None:
    texts = corpus.digit_strings(200, min_digits=4, max_digits=5)
    assert {len(text.split()) for text in texts} == {4, 5}
    assert {word for text in texts for word in text.split()} <= set(corpus.DIGITS["en"])


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"language: expected one of .* got 'fr'"):
        corpus.sentences(1, language="fr")
    with pytest.raises(ValueError, match=r"split: expected one of .* got 'dev'"):
        corpus.sentences(1, split="dev")
    with pytest.raises(ValueError, match=r"min_digits .*got 5 and 3"):
        corpus.digit_strings(1, min_digits=5, max_digits=3)
    # Fewer than three words are never held out.
    with pytest.raises(ValueError, match=r"count: expected at most 0"):
        corpus.digit_strings(1, split="held_out", min_digits=1, max_digits=2)
