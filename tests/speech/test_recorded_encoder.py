"""The recorded INT8 encoder against the same encoder call by call, and against fp32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_whisper import make_adapter

import lora_kernels as lk
from lora_speech.decoding.adapter_rows import AdapterRows
from lora_speech.decoding.recorded_encoder import EncoderParts
from lora_speech.decoding.whisper_encoder import FlatEncoder
from lora_speech.models.loading import load_base, load_for_serving


@pytest.fixture
def folders(tiny_whisper_folder: Path, tmp_path: Path) -> dict[str, Path]:
    return {
        name: make_adapter(tiny_whisper_folder, tmp_path / name, rank=rank, seed=rank)
        for name, rank in (("four", 4), ("nine", 9))
    }


@pytest.fixture
def features(tiny_whisper_folder: Path) -> torch.Tensor:
    config = load_base(tiny_whisper_folder).model.config
    return torch.randn(3, config.num_mel_bins, 2 * config.max_source_positions)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("adapters", [None, ["nine"], ["four", None, "nine"]], ids=str)
def test_is_as_near_to_fp32_as_int8_call_by_call(
    tiny_whisper_folder: Path,
    folders: dict[str, Path],
    features: torch.Tensor,
    adapters: list[str | None] | None,
) -> None:
    plain = load_for_serving(tiny_whisper_folder, folders, int8=False).model
    int8 = load_for_serving(tiny_whisper_folder, folders, int8=True).model
    batch = len(features)
    with torch.inference_mode():
        exact = FlatEncoder(plain.model.encoder, AdapterRows.of(plain, adapters, batch))(features)
        encoder = FlatEncoder(int8.model.encoder, AdapterRows.of(int8, adapters, batch))
        assert encoder.parts is not None
        recorded = encoder(features)
        with lk.use_adapters(adapters if adapters else [None]):
            modules = int8.model.encoder(features).last_hidden_state
    assert relative(recorded, exact) < 1.5 * relative(modules, exact) + 0.005
    assert relative(recorded, exact) < 0.05
    assert relative(recorded, exact) < 0.5 * relative(exact.roll(1, 0), exact)  # tells rows apart


def test_rows_do_not_depend_on_their_neighbours(
    tiny_whisper_folder: Path, folders: dict[str, Path], features: torch.Tensor
) -> None:
    model = load_for_serving(tiny_whisper_folder, folders, int8=True).model
    names = ["nine", None, "four"]
    with torch.inference_mode():
        together = FlatEncoder(model.model.encoder, AdapterRows.of(model, names, 3))(features)
        for row, name in enumerate(names):
            rows = AdapterRows.of(model, [name], 1)
            alone = FlatEncoder(model.model.encoder, rows)(features[row : row + 1])
            assert torch.equal(alone[0], together[row]), name


def test_threads_change_no_bit(
    tiny_whisper_folder: Path, folders: dict[str, Path], features: torch.Tensor
) -> None:
    model = load_for_serving(tiny_whisper_folder, folders, int8=True).model
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            rows = AdapterRows.of(model, ["nine"], 1)
            with torch.inference_mode():
                results.append(FlatEncoder(model.model.encoder, rows)(features[:1]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


def test_follows_weights_that_change(
    tiny_whisper_folder: Path, folders: dict[str, Path], features: torch.Tensor
) -> None:
    model = load_for_serving(tiny_whisper_folder, folders, int8=True).model
    encoder = model.model.encoder

    def encode() -> torch.Tensor:
        with torch.inference_mode():
            return FlatEncoder(encoder, AdapterRows.of(model, None, 1))(features[:1])

    first = encode()
    with torch.no_grad():
        encoder.conv2.weight.mul_(-1)
    assert not torch.equal(encode(), first)
    with torch.no_grad():
        encoder.conv2.weight.mul_(-1)
    assert torch.equal(encode(), first)


def test_what_it_cannot_read_is_left_to_the_modules(tiny_whisper_folder: Path) -> None:
    encoder = load_base(tiny_whisper_folder).model.model.encoder
    assert EncoderParts.of(encoder) is None  # floating point
    model = load_for_serving(tiny_whisper_folder, {}, int8=True).model
    assert EncoderParts.of(model.model.encoder) is not None
    model.model.encoder.layers[0].activation_fn = torch.nn.ReLU()
    assert EncoderParts.of(model.model.encoder) is None
