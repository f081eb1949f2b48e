"""Whisper on a GPU as users run it: what it decodes, judged by the CPU; captures; threads."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "speech"))

from choices import check_choices, check_scores, encode
from tiny_whisper import make_adapter, make_tiny_whisper, tone

from lora_speech.data.features import extract_features
from lora_speech.decoding import graphed_steps
from lora_speech.decoding.beam import beam_decode
from lora_speech.decoding.decoder_step import RecordedStep
from lora_speech.decoding.greedy import Hypotheses, greedy_decode
from lora_speech.devices import choose_device, why_not_cuda
from lora_speech.models.loading import SpeechModel, load_for_serving

for package in ("transformers", "peft"):
    pytest.importorskip(package)

pytestmark = pytest.mark.skipif(bool(why_not_cuda()), reason=why_not_cuda())

LIMIT = 12
MIXES: list[list[str | None]] = [
    ["a", None, "b", "b"],
    ["b", "b", "b", "b"],
    [None, None, None, None],
    ["a", "a", "b", None],
]


class Pair(NamedTuple):
    """The same model on the CPU and on the GPU."""

    here: SpeechModel
    there: SpeechModel


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    base = make_tiny_whisper(tmp_path_factory.mktemp("whisper"))
    adapters = tmp_path_factory.mktemp("adapters")
    some = ["q_proj", "fc1"]
    return base, {
        "a": make_adapter(base, adapters / "a", rank=4, seed=0),
        "b": make_adapter(base, adapters / "b", rank=9, seed=1, targets=some),
    }


@pytest.fixture(params=[True, False], ids=["int8", "fp32"])
def pair(folders: tuple[Path, dict[str, Path]], request: pytest.FixtureRequest) -> Pair:
    return load_pair(folders, int8=request.param)


@pytest.fixture
def int8_pair(folders: tuple[Path, dict[str, Path]]) -> Pair:
    return load_pair(folders, int8=True)


def load_pair(folders: tuple[Path, dict[str, Path]], int8: bool) -> Pair:
    here, there = (
        load_for_serving(*folders, int8=int8, device=device) for device in ("cpu", "cuda")
    )
    assert there.device == choose_device("cuda")
    return Pair(here, there)


@pytest.fixture(autouse=True)
def plain() -> Iterator[None]:
    """Convolutions as precise as the CPU's, whose tiny models lose by threads."""
    before = torch.backends.cudnn.allow_tf32, torch.get_num_threads()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_num_threads(1)
    yield
    torch.backends.cudnn.allow_tf32 = before[0]
    torch.set_num_threads(before[1])


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[RecordedStep]:
    """Steps that were captured."""
    captured: list[RecordedStep] = []
    original = graphed_steps._graph

    def graph(step: RecordedStep, tokens: torch.Tensor, position: torch.Tensor) -> Any:
        captured.append(step)
        replay = original(step, tokens, position)
        assert isinstance(replay.__self__, torch.cuda.CUDAGraph)  # type: ignore[attr-defined]
        return replay

    monkeypatch.setattr(graphed_steps, "_graph", graph)
    return captured


def features_of(speech: SpeechModel) -> torch.Tensor:
    tones = [tone(0.5 + 0.3 * i, frequency=200.0 * (i + 1)) for i in range(4)]
    return extract_features(speech, tones)["input_features"]


def check(
    pair: Pair, names: list[str | None], beams: int = 1, timestamps: bool = False
) -> Callable[[], list[list[int]]]:
    """Decode the CPU's encoder output on the GPU, and let the CPU judge; returns what does so."""
    encoded = encode(pair.here, features_of(pair.here), names)
    call: dict[str, Any] = {
        "encoded": encoded, "adapters": names, "language": ["en", "es", "en", "es"],
        "timestamps": timestamps, "max_new_tokens": LIMIT,
    }  # fmt: skip
    judged: dict[str, Any] = {"timestamps": timestamps, "limit": LIMIT}
    if beams == 1:
        found = greedy_decode(pair.there.model, **call)
        check_choices(pair.here.model, encoded, found, names, **judged)
        return lambda: greedy_decode(pair.there.model, **call).tokens
    found = beam_decode(pair.there.model, beams=beams, **call)
    expected = beam_decode(pair.here.model, beams=beams, **call)
    check_scores(pair.here.model, encoded, found, expected, names, **judged)
    return lambda: beam_decode(pair.there.model, beams=beams, **call).tokens


@pytest.mark.parametrize("timestamps", [False, True], ids=["text", "timestamps"])
@pytest.mark.parametrize("beams", [1, 3], ids=["greedy", "beams"])
def test_decoding(pair: Pair, captures: list[RecordedStep], beams: int, timestamps: bool) -> None:
    """Adapters are switched, and nothing is captured anew."""
    again = [check(pair, names, beams, timestamps) for names in MIXES]
    first = [decode() for decode in again]
    assert [decode() for decode in again] == first
    assert len({str(tokens) for tokens in first}) == len(MIXES)
    assert len(captures) == (1 if pair.there.int8 else 0)


@pytest.mark.parametrize("beams", [1, 3], ids=["greedy", "beams"])
def test_call_by_call(int8_pair: Pair, beams: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that have finished leave the batch."""
    monkeypatch.setattr(graphed_steps, "pay_on", lambda device: False)
    for names in MIXES[:2]:
        check(int8_pair, names, beams)


def test_one_utterance_and_other_batches(int8_pair: Pair, captures: list[RecordedStep]) -> None:
    here, there = int8_pair
    features = features_of(here)
    for count in (1, 3, 1, 3):
        names = MIXES[0][:count]
        encoded = encode(here, features[:count], names)
        found = greedy_decode(
            there.model, encoded=encoded, adapters=names, language="en", max_new_tokens=LIMIT
        )
        check_choices(here.model, encoded, found, names, limit=LIMIT)
    assert len(captures) == 2


def test_from_features_on_the_host(pair: Pair) -> None:
    """The whole way, with the language detected: features move, the GPU encodes for itself."""
    here, there = pair
    features = features_of(here)
    assert features.device.type == "cpu"
    for names in MIXES[:2]:
        encoded = encode(there, features, names)
        exact = encode(here, features, names)
        # INT8: the CPU's encoder is in integers throughout, the GPU's between its linears in fp32.
        assert (encoded - exact).norm() / exact.norm() < (0.05 if there.int8 else 1e-3)
        found = greedy_decode(there.model, features, adapters=names, max_new_tokens=LIMIT)
        check_choices(here.model, encoded, found, names, limit=LIMIT)
        detected = greedy_decode(
            here.model, encoded=encoded, adapters=names, max_new_tokens=1
        ).languages
        assert found.languages == detected


def test_threads_beside_each_other(
    folders: tuple[Path, dict[str, Path]], captures: list[RecordedStep]
) -> None:
    """Captures beside calls of other threads, other captures, and others' allocations."""
    here, there = load_pair(folders, int8=True)
    calls: list[tuple[Callable[..., Hypotheses], dict[str, Any]]] = []
    for names in MIXES[:2]:
        encoded = encode(here, features_of(here), names)
        call = {
            "encoded": encoded, "adapters": names, "language": "en", "max_new_tokens": LIMIT,
        }  # fmt: skip
        calls += [(greedy_decode, call), (beam_decode, {"beams": 3, **call})]
    alone = load_pair(folders, int8=True).there
    expected = [search(alone.model, **call) for search, call in calls]
    found: dict[int, list[Hypotheses]] = {}
    failures: list[BaseException] = []
    done = threading.Event()

    def decode(index: int) -> None:
        search, call = calls[index]
        try:
            found[index] = [search(there.model, **call) for _ in range(3)]
        except BaseException as error:
            failures.append(error)

    def allocate() -> None:
        held: list[torch.Tensor] = []  # so that torch has to ask the device for more, every time
        while not done.wait(0.005) and len(held) < 128:
            held.append(torch.empty(32 << 20, dtype=torch.uint8, device=there.device))

    other = threading.Thread(target=allocate)
    threads = [threading.Thread(target=decode, args=(index,)) for index in range(len(calls))]
    for thread in (other, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    other.join()
    assert not failures
    for index, results in found.items():
        assert [result.tokens for result in results] == [expected[index].tokens] * 3
    assert 2 <= len(captures) - 2 <= len(calls)  # two were the other model's


def test_a_device_that_is_not_the_current_one(folders: tuple[Path, dict[str, Path]]) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    here = load_for_serving(*folders, int8=True, device="cpu")
    last = f"cuda:{torch.cuda.device_count() - 1}"
    pair = Pair(here, load_for_serving(*folders, int8=True, device=last))
    with torch.cuda.device(0):
        for beams in (1, 3):
            check(pair, MIXES[0], beams)
