"""What one bad row does to its neighbours: nothing, in the recorded encoder and decoder step."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_whisper import make_adapter, tone

from lora_speech.data.features import extract_features
from lora_speech.decoding.adapter_rows import AdapterRows
from lora_speech.decoding.beam import beam_decode
from lora_speech.decoding.greedy import greedy_decode
from lora_speech.decoding.whisper_encoder import FlatEncoder
from lora_speech.models.loading import SpeechModel, load_for_serving

NAMES = ["me", None, "me", "you"]
BAD = 2


@pytest.fixture
def speech(tiny_whisper_folder: Path, tmp_path: Path) -> SpeechModel:
    folders = {
        name: make_adapter(tiny_whisper_folder, tmp_path / name, rank=rank, seed=rank)
        for name, rank in (("me", 4), ("you", 3))
    }
    return load_for_serving(tiny_whisper_folder, folders, int8=True)


@pytest.fixture
def features(speech: SpeechModel) -> torch.Tensor:
    recordings = [tone(1.0, frequency=200.0 * (1 + i)) for i in range(len(NAMES))]
    return extract_features(speech, recordings)["input_features"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["one frame", "every frame"])
def test_a_bad_utterance_in_the_recorded_encoder(
    speech: SpeechModel, features: torch.Tensor, value: float, where: str
) -> None:
    rows = AdapterRows.of(speech.model, NAMES, len(NAMES))
    encoder = FlatEncoder(speech.model.model.encoder, rows)
    assert encoder.parts is not None
    with torch.inference_mode():
        expected = encoder(features).clone()
        bad = features.clone()
        bad[BAD, :, 3 if where == "one frame" else slice(None)] = value
        got = encoder(bad)
        after = encoder(features)  # nothing stays behind in the buffers
    assert not torch.isfinite(got[BAD]).all()
    others = [row for row in range(len(NAMES)) if row != BAD]
    assert torch.equal(got[others], expected[others])
    assert torch.equal(after, expected)


@pytest.mark.parametrize("decode", [greedy_decode, beam_decode])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["one position", "every position"])
def test_a_bad_utterance_in_the_recorded_decoder_step(
    speech: SpeechModel,
    features: torch.Tensor,
    decode: Callable[..., Any],
    value: float,
    where: str,
) -> None:
    rows = AdapterRows.of(speech.model, NAMES, len(NAMES))
    with torch.inference_mode():
        encoded = FlatEncoder(speech.model.model.encoder, rows)(features)

    def decoded(states: torch.Tensor) -> list[list[int]]:
        return decode(
            speech.model, encoded=states, adapters=NAMES, language="en", max_new_tokens=12
        ).tokens

    expected = decoded(encoded)
    bad = encoded.clone()
    bad[BAD, 5 if where == "one position" else slice(None)] = value
    got = decoded(bad)
    others = [row for row in range(len(NAMES)) if row != BAD]
    assert got[BAD] != expected[BAD]
    assert [got[row] for row in others] == [expected[row] for row in others]
    assert decoded(encoded) == expected


def test_silence_of_zeros_and_of_the_smallest_numbers(
    speech: SpeechModel, features: torch.Tensor
) -> None:
    rows = AdapterRows.of(speech.model, NAMES, len(NAMES))
    encoder = FlatEncoder(speech.model.model.encoder, rows)
    with torch.inference_mode():
        expected = encoder(features).clone()
        quiet = features.clone()
        quiet[0], quiet[BAD] = 0.0, 1e-40
        got = encoder(quiet)
    assert torch.isfinite(got).all()
    assert torch.equal(got[[1, 3]], expected[[1, 3]])
