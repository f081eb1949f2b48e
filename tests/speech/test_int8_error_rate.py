"""What INT8 costs the shipped base in words, with and without a live adapter (slow)."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_speech.data.manifest import Utterance
from lora_speech.demo.run import DemoSettings, make_data
from lora_speech.errors import ModelError
from lora_speech.evaluation import evaluate
from lora_speech.models.loading import load_for_serving, shipped_model_path
from lora_speech.synthetic import corpus, synthesis
from lora_speech.training.finetune import TrainingConfig, finetune

ACCENT = synthesis.HELD_OUT_ACCENTS[1]


@pytest.mark.slow
@pytest.mark.skipif(
    not synthesis.is_available(), reason="espeak-ng (espeakng-loader) is not installed"
)
def test_int8_costs_at_most_three_words_in_a_thousand(tmp_path: Path) -> None:
    try:
        shipped_model_path()
    except ModelError as error:
        pytest.skip(str(error))
    accent = make_data(
        ACCENT, DemoSettings(train=320, validation=12, test=600), lambda done, total: None
    )
    config = TrainingConfig(steps=120, validate_every=60)
    finetune("shipped", accent.train, accent.validation, tmp_path / "adapter", config)
    speakers = synthesis.seen_speakers(seed=7, language="en")
    seen = [
        Utterance(
            synthesis.synthesize(text, speakers[index % len(speakers)]),
            text,
            language="en",
            sampling_rate=synthesis.SAMPLING_RATE,
        )
        for index, text in enumerate(corpus.sentences(600, seed=7, split="held_out"))
    ]
    errors, words = {}, 0
    for int8 in (False, True):
        model = load_for_serving("shipped", {"accent": tmp_path / "adapter"}, int8=int8)
        adapted = evaluate(model, accent.test, adapter="accent", normalization="basic").rates
        base = evaluate(model, seen, normalization="basic").rates
        assert adapted.wer < 0.25
        assert base.wer < 0.05
        errors[int8], words = adapted.errors + base.errors, adapted.words + base.words
    assert words > 7000
    assert errors[True] <= errors[False] + 0.003 * words
