"""A whole transcription by every implementation that this CPU can run: the same words."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tiny_whisper import make_adapter

import lora_kernels as lk
from lora_kernels.implementations import describe
from lora_speech.data.manifest import Utterance
from lora_speech.errors import ModelError
from lora_speech.evaluation import Evaluation, evaluate
from lora_speech.models.loading import SpeechModel, load_for_serving, shipped_model_path
from lora_speech.synthetic import corpus, synthesis

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not synthesis.is_available(), reason="espeak-ng (espeakng-loader) is not installed"
    ),
]


@pytest.fixture(scope="module")
def utterances() -> list[Utterance]:
    speakers = synthesis.seen_speakers(seed=4, language="en")
    return [
        Utterance(
            synthesis.synthesize(text, speakers[index % len(speakers)]),
            text,
            language="en",
            sampling_rate=synthesis.SAMPLING_RATE,
        )
        for index, text in enumerate(corpus.sentences(150, seed=4, split="held_out"))
    ]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> SpeechModel:
    try:
        base = shipped_model_path()
    except ModelError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("adapters") / "slight"
    # Large enough to move every value, small enough to leave the words.
    make_adapter(base, folder, rank=12, seed=3, alpha=0.5)
    return load_for_serving("shipped", {"slight": folder}, int8=True)


def hear(served: SpeechModel, utterances: list[Utterance]) -> Evaluation:
    return evaluate(served, utterances, adapter="slight", normalization="basic")


@pytest.fixture(scope="module")
def usual(served: SpeechModel, utterances: list[Utterance]) -> Evaluation:
    """By the implementation that this CPU takes by itself."""
    result = hear(served, utterances)
    base = evaluate(served, utterances, normalization="basic")
    assert result.rates.wer < 0.05
    assert [u.hypothesis for u in result.utterances] != [u.hypothesis for u in base.utterances]
    return result


@pytest.fixture(params=["generic", "avx2", "avx2_vnni", "avx512", "amx"])
def forced(request: pytest.FixtureRequest) -> Iterator[str]:
    rows = [row for row in describe()[1] if row.name == request.param]
    missing = {row.reason for row in rows if not row.available}
    if missing or not rows:
        pytest.skip(f"{request.param}: {', '.join(sorted(missing)) or 'not built here'}")
    with lk.force_implementation(request.param):
        yield request.param
    ran = {row.op for row in describe()[1] if row.name == request.param and row.runs}
    assert ran >= {"int8_lora_linear", "kv_attention_step"}


def test_the_same_words(
    forced: str, usual: Evaluation, served: SpeechModel, utterances: list[Utterance]
) -> None:
    result = hear(served, utterances)
    assert abs(result.rates.wer - usual.rates.wer) <= 0.003
    pairs = zip(result.utterances, usual.utterances, strict=True)
    other = [(a.hypothesis, b.hypothesis) for a, b in pairs if a.hypothesis != b.hypothesis]
    assert len(other) <= 3, other
