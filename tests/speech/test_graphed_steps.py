"""Steps of a fixed batch, which a CUDA graph replays: on a CPU they run without one."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from choices import check_choices, check_scores, encode
from tiny_whisper import make_adapter, tone

import lora_kernels as lk
from lora_speech.data.features import extract_features
from lora_speech.decoding import graphed_steps
from lora_speech.decoding.beam import beam_decode
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
    tones = [tone(0.5 + 0.3 * i, frequency=200.0 * (i + 1)) for i in range(4)]
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


Decode = Callable[..., Any]


def beams(model: Any, *given: torch.Tensor, **call: Any) -> Any:
    """Two of each of four utterances: eight rows at most, which are rounded as fewer are."""
    return beam_decode(model, *given, beams=2, **call)


SEARCHES = pytest.mark.parametrize("decode", [greedy_decode, beams], ids=["greedy", "beams"])

CALLS: list[dict[str, Any]] = [
    {"adapters": "a", "language": "en"},
    {"adapters": ["a", None, "b", "b"], "language": "en"},
    {"language": "en"},
    {"adapters": ["b", "a", "b", None], "language": None},
    {"adapters": "b", "language": "en", "timestamps": True},
    {"language": "en", "min_new_tokens": 9, "max_new_tokens": 12},
]


def _expected(
    speech: SpeechModel, features: torch.Tensor, decode: Decode = greedy_decode, **call: object
) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphed_steps, "pay_on", lambda device: False)
        return decode(speech.model, features, **call)


def assert_same(got: Any, expected: Any) -> None:
    """Both are `Hypotheses`; torch rounds a logarithm at the end of a tensor otherwise."""
    assert replace(got, scores=None) == replace(expected, scores=None)
    assert (got.scores is None) == (expected.scores is None)
    if got.scores is not None:
        assert got.scores == pytest.approx(expected.scores, rel=1e-6)


@SEARCHES
def test_the_results_are_those_of_a_batch_that_rows_leave(
    speech: SpeechModel, features: torch.Tensor, graphed: list[RecordedStep], decode: Decode
) -> None:
    ended: set[int] = set()
    for call in CALLS:
        expected = _expected(speech, features, decode, **call)
        assert_same(decode(speech.model, features, **call), expected)
        ended |= {len(row) for row in expected.tokens}
    assert len(ended) > 1  # rows end at different steps, or nothing was shown


def test_what_judges_the_choices_of_a_gpu(
    speech: SpeechModel, features: torch.Tensor, graphed: list[RecordedStep]
) -> None:
    """It agrees with the CPU's own, and refuses those of other adapters."""
    names = ["a", None, "b", "b"]
    encoded = encode(speech, features, names)
    call: dict[str, Any] = {"encoded": encoded, "language": "en", "max_new_tokens": 16}
    for stamped in (False, True):
        judged: dict[str, Any] = {"timestamps": stamped, "limit": 16}
        found = greedy_decode(speech.model, adapters=names, timestamps=stamped, **call)
        check_choices(speech.model, encoded, found, names, **judged)
        best = beams(speech.model, adapters=names, timestamps=stamped, **call)
        check_scores(speech.model, encoded, best, best, names, **judged)
        for others in (["b", None, "b", "b"], ["a", None, "b", None]):
            with pytest.raises(AssertionError):
                check_choices(speech.model, encoded, found, others, **judged)
            with pytest.raises(AssertionError):
                check_scores(speech.model, encoded, best, best, others, **judged)


@SEARCHES
def test_adapters_and_utterances_change_without_another_graph(
    speech: SpeechModel, features: torch.Tensor, graphed: list[RecordedStep], decode: Decode
) -> None:
    for adapters in ("a", ["b", "a", None, "b"], None, "b"):
        for utterances in (features, features.flip(0)):
            call = {"adapters": adapters, "language": "en"}
            expected = _expected(speech, utterances, decode, **call)
            assert_same(decode(speech.model, utterances, **call), expected)
    assert len(graphed) == 1  # of one token: the prompt's step is run once a call
    decode(speech.model, features, language=None)
    assert len(graphed) == 1  # nor is that which detects the language
    decode(speech.model, features[:1], language="en")
    assert len(graphed) == 2  # another batch size
    timed = {"adapters": "a", "language": "en", "timestamps": True}
    for utterances in (features, features.flip(0)):
        expected = _expected(speech, utterances, decode, **timed)
        assert_same(decode(speech.model, utterances, **timed), expected)
    assert len(graphed) == 3  # logits, for the rules of timestamps


def test_one_utterance_has_its_adapter_in_every_beam(
    speech: SpeechModel, features: torch.Tensor, graphed: list[RecordedStep]
) -> None:
    for name in ("a", None, "b"):
        call = {"adapters": [name], "language": "es"}
        expected = _expected(speech, features[:1], beams, **call)
        assert_same(beams(speech.model, features[:1], **call), expected)
    assert len(graphed) == 1


def test_searches_of_as_many_rows_share_what_they_can(
    speech: SpeechModel, features: torch.Tensor, graphed: list[RecordedStep]
) -> None:
    """Three kinds of search in turns: each finds its own again, greedy and one beam the same."""
    searches = [(greedy_decode, {}), (beam_decode, {"beams": 1}), (beam_decode, {"beams": 2})]
    for _ in range(2):
        for decode, more in searches:
            call = {"language": "en", **more}
            expected = _expected(speech, features, decode, **call)
            assert_same(decode(speech.model, features, **call), expected)
    assert len(graphed) == 3
    assert [steps.beams for steps in _idle(speech)] == [1, 2]


def test_what_waits_leaves_room(
    speech: SpeechModel, features: torch.Tensor, monkeypatch: pytest.MonkeyPatch, graphed: Any
) -> None:
    def sizes_after(room: float) -> list[int]:
        monkeypatch.setattr(graphed_steps, "_room", lambda device: room)
        for count in (1, 4, 2, 3, 1):
            greedy_decode(speech.model, features[:count], language="en", max_new_tokens=2)
        return [steps.shape[0] for steps in _idle(speech)]

    greedy_decode(speech.model, features.repeat(2, 1, 1)[:5], language="en", max_new_tokens=2)
    row = _idle(speech)[0].nbytes / 5
    assert sizes_after(float("inf")) == [4, 2, 3, 1]  # that of five was the fifth
    assert sizes_after(4.5 * row) == [3, 1]
    assert sizes_after(0) == [1]  # the last used stays


def test_other_suppressed_tokens_are_seen(
    speech: SpeechModel, features: torch.Tensor, graphed: list[RecordedStep]
) -> None:
    before = greedy_decode(speech.model, features, language="en").tokens
    generation = speech.model.generation_config
    generation.suppress_tokens = [*generation.suppress_tokens, before[0][0]]
    after = greedy_decode(speech.model, features, language="en").tokens
    assert after == _expected(speech, features, language="en").tokens
    assert after != before


def test_a_loaded_adapter_is_seen(
    speech: SpeechModel,
    features: torch.Tensor,
    graphed: list[RecordedStep],
    tiny_whisper_folder: Path,
    tmp_path: Path,
) -> None:
    before = greedy_decode(speech.model, features, adapters="a", language="en")
    folder = make_adapter(tiny_whisper_folder, tmp_path / "other", rank=4, seed=7)
    lk.load_adapter(speech.model, folder, name="a")
    after = greedy_decode(speech.model, features, adapters="a", language="en")
    assert_same(after, _expected(speech, features, adapters="a", language="en"))
    assert after.tokens != before.tokens


@SEARCHES
def test_calls_at_the_same_time_and_copies_do_not_share(
    speech: SpeechModel, features: torch.Tensor, graphed: list[RecordedStep], decode: Decode
) -> None:
    calls = [{"adapters": name, "language": "en"} for name in ("a", "b", None)]
    expected = [_expected(speech, features, decode, **call) for call in calls]
    results: dict[int, list[Any]] = {}

    def work(index: int) -> None:
        results[index] = [decode(speech.model, features, **calls[index]) for _ in range(4)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(3):
        assert len(results[index]) == 4
        for got in results[index]:
            assert_same(got, expected[index])
    assert 1 <= len(_idle(speech)) <= 4
    assert not _idle(SimpleNamespace(model=copy.deepcopy(speech.model)))


def _idle(speech: Any) -> list[graphed_steps.GraphedSteps]:
    return speech.model.__dict__[graphed_steps._POOL].idle


@SEARCHES
def test_a_failed_call_gives_its_steps_back(
    speech: SpeechModel,
    features: torch.Tensor,
    graphed: list[RecordedStep],
    monkeypatch: pytest.MonkeyPatch,
    decode: Decode,
) -> None:
    expected = decode(speech.model, features, language="en")
    with monkeypatch.context() as patch:
        patch.setattr(RecordedStep, "run_at", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            decode(speech.model, features, language="en")
    assert len(_idle(speech)) == 1
    assert_same(decode(speech.model, features, language="en"), expected)


class FakeCuda:
    """Stands where `torch.cuda` is, and notes what a capture asks of it."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.capturing = 0

    def device(self, device: torch.device) -> Any:
        self.events.append(device)
        return nullcontext()

    def Stream(self) -> Any:
        return SimpleNamespace(wait_stream=lambda other: self.events.append("wait"))

    current_stream = Stream

    def stream(self, stream: Any) -> Any:
        return nullcontext()

    def CUDAGraph(self) -> Any:
        return SimpleNamespace(replay=lambda: self.events.append("replay"))

    def graph(self, graph: Any, *, stream: Any, capture_error_mode: str) -> Any:
        self.events.append(capture_error_mode)
        fake = self

        class Capture:
            def __enter__(self) -> None:
                fake.capturing += 1
                assert fake.capturing == 1
                time.sleep(0.05)

            def __exit__(self, *error: object) -> None:
                fake.capturing -= 1

        return Capture()


def test_a_capture_is_of_its_device_its_thread_and_one_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without a GPU: what torch is asked for. tests/gpu has captures beside other threads."""
    device = torch.device("cuda", 1)
    fake = FakeCuda()
    monkeypatch.setattr(torch, "cuda", fake)
    runs: list[int] = []
    failures: list[BaseException] = []
    tokens: Any = SimpleNamespace(device=device)
    step: Any = SimpleNamespace(run_at=lambda tokens, position: runs.append(fake.capturing))

    def work() -> None:
        try:
            graphed_steps._graph(step, tokens, torch.zeros(1))()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert runs == [0, 1] * 3  # once outside of the capture, once inside
    assert fake.events.count("replay") == 3
    begun = [event for event in fake.events if event != "replay"]
    assert begun == [device, "wait", "wait", "thread_local"] * 3
