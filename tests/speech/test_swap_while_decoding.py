"""The lean decoder while another thread changes the adapters it uses."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_whisper import make_adapter, tone

import lora_kernels as lk
from lora_speech.data.features import extract_features
from lora_speech.decoding.beam import beam_decode
from lora_speech.decoding.greedy import greedy_decode
from lora_speech.decoding.whisper_encoder import FlatEncoder
from lora_speech.models.loading import load_for_serving

NAMES = ["me", None, "you"]


@pytest.mark.parametrize("decode", [greedy_decode, beam_decode])
@pytest.mark.parametrize("int8", [False, True], ids=["fp32", "int8"])
@pytest.mark.parametrize("change", ["replace", "remove"])
def test_a_decoding_under_way_keeps_its_adapters(
    tiny_whisper_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    decode: Callable[..., Any],
    int8: bool,
    change: str,
) -> None:
    """They change after the encoder and before the decoder, which must not mix them."""
    folders = {
        name: make_adapter(tiny_whisper_folder, tmp_path / name, rank=rank, seed=rank)
        for name, rank in (("me", 4), ("you", 3), ("other", 6))
    }
    other = folders.pop("other")
    speech = load_for_serving(tiny_whisper_folder, folders, int8=int8)
    model = speech.model
    recordings = [tone(1.0, frequency=200.0 * (1 + i)) for i in range(3)]
    features = extract_features(speech, recordings)["input_features"]

    def decoded() -> list[list[int]]:
        return decode(model, features, adapters=NAMES, language="en").tokens

    def swap() -> None:
        lk.remove_adapter(model, "me")
        lk.load_adapter(model, other, name="me" if change == "replace" else "third")

    expected = decoded()
    encode, todo = FlatEncoder.__call__, [swap]

    def encode_then_change(self: FlatEncoder, given: torch.Tensor) -> torch.Tensor:
        encoded = encode(self, given)
        if todo:
            thread = threading.Thread(target=todo.pop())
            thread.start()
            thread.join()
        return encoded

    monkeypatch.setattr(FlatEncoder, "__call__", encode_then_change)
    assert decoded() == expected
    assert not todo
    if change == "remove":
        assert list(lk.list_adapters(model)) == ["you", "third"]
        with pytest.raises(lk.AdapterError, match="got 'me'"):
            decoded()
        return
    after = decoded()
    assert after[0] != expected[0]
    assert after[1:] == expected[1:]
