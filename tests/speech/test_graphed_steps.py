"""Greedy steps of a fixed batch, which a CUDA graph replays: on a CPU they run without one."""

from __future__ import annotations

import copy
import threading
from pathlib import Path

import pytest
import torch
from tiny_whisper import make_adapter, tone

import lora_kernels as lk
from lora_speech.data.features import extract_features
from lora_speech.decoding import graphed_steps
from lora_speech.decoding.decoder_step import RecordedStep
from lora_speech.decoding.greedy import greedy_decode
from lora_speech.models.loading import SpeechModel, load_for_serving


@pytest.fixture
def speech(tiny_whisper_folder: Path, tmp_path: Path) -> SpeechModel:
    folders = {}
    for seed, name in enumerate("ab"):
        folders[name] = make_adapter(tiny_whisper_folder, tmp_path / name, rank=4, seed=seed)
    return load_for_serving(tiny_whisper_folder, folders, int8=True)


@pytest.fixture
def features(speech: SpeechModel) -> torch.Tensor:
    tones = [tone(0.5 + 0.3 * i, frequency=200.0 * (i + 1)) for i in range(5)]
    return extract_features(speech, tones)["input_features"]


@pytest.fixture
def graphed(monkeypatch: pytest.MonkeyPatch) -> list[RecordedStep]:
    """Turns the fixed batch on; the steps that would have been captured."""
    captured: list[RecordedStep] = []
    original = graphed_steps._graph

    def graph(step: RecordedStep, tokens: torch.Tensor, position: torch.Tensor):
        captured.append(step)
        return original(step, tokens, position)

    monkeypatch.setattr(graphed_steps, "_graph", graph)
    monkeypatch.setattr(graphed_steps, "pay_on", lambda device: True)
    return captured


CALLS = [
    {"adapters": "a", "language": "en"},
    {"adapters": ["a", None, "b", "b", None], "language": "en"},
    {"language": "en"},
    {"adapters": ["b", "a", "b", "a", None], "language": None},
    {"adapters": "b", "language": "en", "timestamps": True},
    {"language": "en", "min_new_tokens": 9, "max_new_tokens": 12},
]


def _expected(speech: SpeechModel, features: torch.Tensor, **call: object) -> list[list[int]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphed_steps, "pay_on", lambda device: False)
        return greedy_decode(speech.model, features, **call).tokens


def test_the_tokens_are_those_of_a_batch_that_rows_leave(
    speech: SpeechModel, features: torch.Tensor, graphed: list[RecordedStep]
) -> None:
    for call in CALLS:
        expected = _expected(speech, features, **call)
        assert greedy_decode(speech.model, features, **call).tokens == expected, call
    lengths = [len(row) for row in _expected(speech, features, language="en")]
    assert len(set(lengths)) > 1  # rows end at different steps, or nothing was shown


def test_adapters_and_utterances_change_without_another_graph(
    speech: SpeechModel, features: torch.Tensor, graphed: list[RecordedStep]
) -> None:
    for adapters in ("a", ["b", "a", None, None, "b"], None, "b"):
        for utterances in (features, features.flip(0)):
            call = {"adapters": adapters, "language": "en"}
            expected = _expected(speech, utterances, **call)
            assert greedy_decode(speech.model, utterances, **call).tokens == expected
    assert len(graphed) == 1  # one token, chosen: the first comes with the prompt
    greedy_decode(speech.model, features[:2], language="en")
    assert len(graphed) == 2  # another batch size


def test_a_loaded_adapter_is_seen(
    speech: SpeechModel,
    features: torch.Tensor,
    graphed: list[RecordedStep],
    tiny_whisper_folder: Path,
    tmp_path: Path,
) -> None:
    before = greedy_decode(speech.model, features, adapters="a", language="en").tokens
    folder = make_adapter(tiny_whisper_folder, tmp_path / "other", rank=4, seed=7)
    lk.load_adapter(speech.model, folder, name="a")
    after = greedy_decode(speech.model, features, adapters="a", language="en").tokens
    assert after == _expected(speech, features, adapters="a", language="en")
    assert after != before


def test_calls_at_the_same_time_and_copies_do_not_share(
    speech: SpeechModel, features: torch.Tensor, graphed: list[RecordedStep]
) -> None:
    calls = [{"adapters": name, "language": "en"} for name in ("a", "b", None)]
    expected = [_expected(speech, features, **call) for call in calls]
    results: dict[int, list[list[list[int]]]] = {}

    def work(index: int) -> None:
        results[index] = [
            greedy_decode(speech.model, features, **calls[index]).tokens for _ in range(4)
        ]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(results[index] == [expected[index]] * 4 for index in range(3))
    pool = speech.model.__dict__[graphed_steps._POOL]
    assert 1 <= len(pool.idle) <= 4
    assert not copy.deepcopy(speech.model).__dict__[graphed_steps._POOL].idle


def test_a_failed_call_gives_its_steps_back(
    speech: SpeechModel, features: torch.Tensor, graphed: list[RecordedStep], monkeypatch
) -> None:
    expected = greedy_decode(speech.model, features, language="en").tokens
    with monkeypatch.context() as patch:
        patch.setattr(RecordedStep, "run_at", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            greedy_decode(speech.model, features, language="en")
    assert len(speech.model.__dict__[graphed_steps._POOL].idle) == 1
    assert greedy_decode(speech.model, features, language="en").tokens == expected
