"""Beam search gives the hypotheses of transformers; INT8, adapters, batches; what it refuses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_whisper import make_adapter, tone

import lora_kernels as lk
from lora_speech.data.features import extract_features
from lora_speech.decoding import whisper_decoder
from lora_speech.decoding.adapter_rows import AdapterRows
from lora_speech.decoding.beam import beam_decode
from lora_speech.decoding.greedy import greedy_decode
from lora_speech.decoding.prompts import prompt_tokens, special_tokens
from lora_speech.decoding.stepping import FlatSteps, RecordedSteps, likeliest
from lora_speech.decoding.whisper_decoder import DecoderState, WhisperDecoder
from lora_speech.errors import ModelError
from lora_speech.models.loading import SpeechModel, load_base, load_for_serving


@pytest.fixture
def speech(tiny_whisper_folder: Path) -> SpeechModel:
    """A fresh model: swapping and quantizing change it."""
    return load_base(tiny_whisper_folder)


@pytest.fixture
def features(speech: SpeechModel) -> torch.Tensor:
    return make_features(speech)


def make_features(speech: SpeechModel) -> torch.Tensor:
    tones = [tone(0.5 + 0.3 * i, frequency=200.0 * (i + 1)) for i in range(5)]
    return extract_features(speech, tones)["input_features"]


@pytest.fixture
def ending(speech: SpeechModel) -> SpeechModel:
    """A model that writes no timestamps: its hypotheses end at many lengths, most of them soon."""
    tokens = special_tokens(speech.model)
    stamps = list(range(tokens.first_timestamp, speech.model.config.vocab_size))
    speech.model.generation_config.suppress_tokens = [*tokens.suppressed, *stamps]
    return speech


@torch.inference_mode()
def generate(
    speech: SpeechModel,
    features: torch.Tensor,
    language: str = "en",
    timestamps: bool = False,
    **settings: Any,
) -> tuple[list[list[int]], list[float]]:
    """Tokens and scores of transformers' own beam search.

    The general `generate()`, not Whisper's: that one also cuts what it returns at timestamps.
    """
    from transformers.generation import GenerationMixin
    from transformers.generation.logits_process import WhisperTimeStampLogitsProcessor

    model, tokens = speech.model, special_tokens(speech.model)
    prompt = prompt_tokens(tokens, language, timestamps=timestamps)
    rules = []
    if timestamps:
        generation = model.generation_config
        rules.append(WhisperTimeStampLogitsProcessor(generation, begin_index=len(prompt)))
    settings.setdefault("max_new_tokens", tokens.max_positions - len(prompt))
    out = GenerationMixin.generate(
        model,
        input_features=features,
        decoder_input_ids=torch.tensor([prompt] * len(features)),
        do_sample=False,
        logits_processor=rules,
        return_dict_in_generate=True,
        output_scores=True,
        **settings,
    )
    rows = [
        [token for token in row[len(prompt) :] if token != tokens.end]
        for row in out.sequences.tolist()
    ]
    return rows, out.sequences_scores.tolist()


def assert_same(ours: Any, theirs: tuple[list[list[int]], list[float]]) -> None:
    assert ours.tokens == theirs[0]
    assert ours.scores == pytest.approx(theirs[1], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("beams", [2, 5])
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0, 1.7])
def test_same_hypotheses_as_generate(
    ending: SpeechModel, features: torch.Tensor, beams: int, length_penalty: float
) -> None:
    lengths = set()
    for language in ("en", "es"):
        ours = beam_decode(
            ending.model, features, language=language, beams=beams, length_penalty=length_penalty
        )
        theirs = generate(
            ending, features, language, num_beams=beams, length_penalty=length_penalty
        )
        assert_same(ours, theirs)
        lengths |= {len(row) for row in ours.tokens}
    assert len(lengths) > 1
    lk.swap(ending.model)
    two = beam_decode(
        ending.model, features[3:], language="es", beams=beams, length_penalty=length_penalty
    )
    assert two.tokens == ours.tokens[3:]


def test_same_hypotheses_where_most_reach_the_limit(
    speech: SpeechModel, features: torch.Tensor
) -> None:
    for language in ("en", "es"):
        ours = beam_decode(speech.model, features, beams=5, language=language)
        assert_same(ours, generate(speech, features, language, num_beams=5))
    assert max(len(row) for row in ours.tokens) > 10


@pytest.mark.parametrize("language", ["en", "es"])
def test_same_tokens_as_whispers_own_generate(
    ending: SpeechModel, features: torch.Tensor, language: str
) -> None:
    end = special_tokens(ending.model).end
    for task in ("transcribe", "translate"):
        ours = beam_decode(ending.model, features, beams=3, language=language, task=task)
        theirs = ending.model.generate(features, language=language, task=task, num_beams=3)
        assert ours.tokens == [[t for t in row.tolist() if t != end] for row in theirs]


def test_lengths_are_those_of_generate(ending: SpeechModel, features: torch.Tensor) -> None:
    free = beam_decode(ending.model, features, beams=4, language="en")
    assert all(len(row) < 7 for row in free.tokens)  # so that the least ones below bind
    for most, least in ((1, 0), (7, 7), (30, 9)):
        ours = beam_decode(
            ending.model, features, beams=4, language="en", max_new_tokens=most,
            min_new_tokens=least,
        )  # fmt: skip
        theirs = generate(ending, features, num_beams=4, max_new_tokens=most, min_new_tokens=least)
        assert_same(ours, theirs)
        assert all(least <= len(row) <= most for row in ours.tokens)


def test_timestamps_are_those_of_generate(speech: SpeechModel, features: torch.Tensor) -> None:
    ours = beam_decode(speech.model, features, beams=3, language="en", timestamps=True)
    assert_same(ours, generate(speech, features, timestamps=True, num_beams=3))
    first = special_tokens(speech.model).first_timestamp
    assert all(row[0] >= first for row in ours.tokens)


def test_utterances_leave_the_batch(ending: SpeechModel, features: torch.Tensor) -> None:
    together = beam_decode(ending.model, features, beams=4, language="es")
    alone = [
        beam_decode(ending.model, features[row : row + 1], beams=4, language="es")
        for row in range(5)
    ]
    assert together.tokens == [one.tokens[0] for one in alone]
    assert len({one.steps for one in alone}) > 1


@pytest.mark.parametrize("int8", [False, True])
def test_one_beam_is_greedy(tiny_whisper_folder: Path, int8: bool) -> None:
    speech = load_for_serving(tiny_whisper_folder, {}, int8=int8)
    features = make_features(speech)
    for language in ("en", "es", None):
        greedy = greedy_decode(speech.model, features, language=language)
        beam = beam_decode(speech.model, features, beams=1, language=language)
        assert (beam.tokens, beam.languages) == (greedy.tokens, greedy.languages)
    stamped = greedy_decode(speech.model, features, language="en", timestamps=True)
    one = beam_decode(speech.model, features, beams=1, language="en", timestamps=True)
    assert one.tokens == stamped.tokens


@pytest.fixture
def adapters(tiny_whisper_folder: Path, tmp_path: Path) -> dict[str, Path]:
    return {
        "low": make_adapter(tiny_whisper_folder, tmp_path / "low", rank=3, seed=1),
        "high": make_adapter(
            tiny_whisper_folder, tmp_path / "high", rank=8, seed=2, targets=["q_proj", "fc1"]
        ),
    }


@pytest.mark.parametrize("int8", [False, True])
def test_a_batch_mixes_adapters_and_the_base(
    tiny_whisper_folder: Path, adapters: dict[str, Path], int8: bool
) -> None:
    speech = load_for_serving(tiny_whisper_folder, adapters, int8=int8)
    features = make_features(speech)
    names = ["low", None, "high", "low", "high"]
    mixed = beam_decode(speech.model, features, beams=3, adapters=names, language="en")
    for row, name in enumerate(names):
        alone = beam_decode(
            speech.model, features[row : row + 1], beams=3, adapters=[name], language="en"
        )
        assert alone.tokens == [mixed.tokens[row]]
    base = beam_decode(speech.model, features, beams=3, language="en")
    assert base.tokens[1] == mixed.tokens[1]
    assert base.tokens != mixed.tokens
    one = beam_decode(speech.model, features, beams=3, adapters="low", language="en")
    assert one.tokens[0] == mixed.tokens[0]


class CandidatesOfLogits(RecordedSteps):
    """INT8 steps whose candidates come from logits that were written."""

    def candidates(
        self, tokens: torch.Tensor, begin: int, count: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        suppressed = list(self.decoder.tokens.suppressed)

        def leave_out(logits: torch.Tensor) -> None:
            logits[:, suppressed] = -math.inf

        return likeliest(self.logits(tokens, begin, suppress=False), count, leave_out)


@pytest.mark.parametrize("suppress", [True, False])
def test_int8_candidates_are_those_of_the_logits(
    tiny_whisper_folder: Path,
    adapters: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    suppress: bool,
) -> None:
    speech = load_for_serving(tiny_whisper_folder, adapters, int8=True)
    if not suppress:
        speech.model.generation_config.suppress_tokens = None
    features = make_features(speech)
    names = ["low", None, "high", "low", None]
    settings: dict[str, Any] = {"beams": 4, "adapters": names, "language": "es"}
    recorded = beam_decode(speech.model, features, **settings)
    monkeypatch.setattr("lora_speech.decoding.greedy.RecordedSteps", CandidatesOfLogits)
    flat = beam_decode(speech.model, features, **settings)
    assert recorded.tokens == flat.tokens
    assert recorded.scores == pytest.approx(flat.scores, rel=1e-4, abs=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("int8", [False, True])
def test_a_score_is_that_of_the_tokens_in_one_pass(
    tiny_whisper_folder: Path, adapters: dict[str, Path], int8: bool
) -> None:
    # What followed its parents through the table is what one pass over the tokens computes.
    speech = load_for_serving(tiny_whisper_folder, adapters, int8=int8)
    features = make_features(speech)
    tokens = special_tokens(speech.model)
    found = beam_decode(speech.model, features, beams=5, adapters="low", language="es")
    prompt = prompt_tokens(tokens, "es")
    for row in range(5):
        sequence = [*found.tokens[row], tokens.end][: tokens.max_positions - len(prompt)]
        rows = AdapterRows.of(speech.model, "low", 1)
        decoder = WhisperDecoder(speech.model, rows)
        assert (decoder.parts is not None) == int8
        state = decoder.start(decoder.encode(features[row : row + 1]), 48)
        steps = RecordedSteps(decoder, state) if int8 else FlatSteps(decoder, state)
        total = 0.0
        for at, token in enumerate(sequence):
            known = torch.tensor([[*prompt, *sequence[:at]]])
            logits = steps.logits(known, 0, suppress=False)
            total += logits.float().log_softmax(-1)[0, token].item()
        assert found.scores is not None
        # INT8 rows of one new token and of many are rounded alike, but for sums' order.
        assert total / len(sequence) == pytest.approx(found.scores[row], abs=2e-3)


def test_the_cache_is_never_copied(
    speech: SpeechModel, features: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    follow = DecoderState.follow

    def watch(state: DecoderState, parents: list[int], length: int) -> None:
        follow(state, parents, length)
        assert state.self_cache[0][0].shape[0] == 10
        assert state.cross_cache[0][0].shape[0] == 2
        assert state.slots is not None
        seen.append((state.self_cache[0][0].data_ptr(), state.slots.data_ptr()))

    monkeypatch.setattr(DecoderState, "follow", watch)
    beam_decode(speech.model, features[:2], beams=5, language="en", min_new_tokens=20)
    assert len(seen) > 20
    assert len(set(seen[:20])) == 1


@pytest.mark.parametrize("int8", [False, True])
def test_the_table_follows_parents_on_a_device_as_on_the_host(
    tiny_whisper_folder: Path, monkeypatch: pytest.MonkeyPatch, int8: bool
) -> None:
    speech = load_for_serving(tiny_whisper_folder, {}, int8=int8)
    features = make_features(speech)
    host = beam_decode(speech.model, features, beams=4, language="es")
    calls: list[list[int]] = []
    on_device = whisper_decoder._follow_on_device

    def follow(behind: torch.Tensor, parents: list[int]) -> None:
        calls.append(parents)
        on_device(behind, parents)

    monkeypatch.setattr(whisper_decoder, "_follow_on_host", follow)
    device = beam_decode(speech.model, features, beams=4, language="es")
    assert (device.tokens, device.scores) == (host.tokens, host.scores)
    # Rows go on from others, and several from one, or nothing was shown.
    assert any(len(set(parents)) < len(parents) for parents in calls)
    state = DecoderState([], [], AdapterRows(None, None), torch.zeros(4, 9, device="meta").int())
    state.follow([0, 0, 1, 1], 5)  # where the table is not the host's, it is not read there


def test_encoded_instead_of_features(speech: SpeechModel, features: torch.Tensor) -> None:
    encoded = speech.model.get_encoder()(features).last_hidden_state.detach()
    ours = beam_decode(speech.model, encoded=encoded, beams=2, language="en")
    assert ours.tokens == beam_decode(speech.model, features, beams=2, language="en").tokens


def test_bad_requests(speech: SpeechModel, features: torch.Tensor) -> None:
    for beams in (0, 101, 2.0, True):
        with pytest.raises(ModelError, match=r"beams: expected 1 to 100, got "):
            beam_decode(speech.model, features, beams=beams)
    with pytest.raises(ModelError, match="length_penalty: expected -10 to 10, got nan"):
        beam_decode(speech.model, features, length_penalty=math.nan)
    with pytest.raises(ModelError, match=r"\(en, es\), got 'xx'"):
        beam_decode(speech.model, features, language="xx")
    with pytest.raises(ModelError, match="features: expected a tensor"):
        beam_decode(speech.model, features[0])
    with pytest.raises(ModelError, match="expected a WhisperForConditionalGeneration"):
        beam_decode(torch.nn.Linear(2, 2), features)
