"""Conformers as graphs: a whole recording, and Parakeet in streaming steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
import torch.nn.functional as F
from tiny_parakeet import parakeet, small

import lora_kernels as lk
from lora_speech.errors import SpeechError
from lora_speech.export.conformer_graphs import SUBSAMPLING, ConformerStepGraph, RecognizeGraph
from lora_speech.export.ctc_decoding import collapse
from lora_speech.export.operators import KernelOperators
from lora_speech.export.run import export_model


def steps(graph: ConformerStepGraph, features: torch.Tensor) -> torch.Tensor:
    """Logits of a recording that comes chunk by chunk."""
    batch, total, _ = features.shape
    size = SUBSAMPLING * graph.chunk
    padded = F.pad(features, (0, 0, SUBSAMPLING, size))
    caches = [torch.zeros(graph.cache_shape(name, batch)) for name in graph.caches]
    found, done = [], 0
    for begin in range(0, total, size):
        frames = min(size, total - begin)
        inputs = [
            padded[:, begin : begin + SUBSAMPLING + size],
            torch.full((batch,), frames, dtype=torch.int32),
            torch.full((batch,), done, dtype=torch.int32),
            *caches,
        ]
        logits, *caches = graph(inputs, [])
        count = -(-frames // SUBSAMPLING)
        found.append(logits[:, :count])
        done += count
    return torch.cat(found, 1)


def in_chunks(model: Any, features: torch.Tensor, chunk: int, left: int) -> torch.Tensor:
    """transformers' own layers over the whole recording, masked as steps see it."""
    encoder = model.encoder
    x = encoder.subsampling(features) * encoder.input_scale
    positions = encoder.encode_positions(x)
    at = torch.arange(x.shape[1])
    begin = at // chunk * chunk
    mask = (at < begin[:, None] + chunk) & (at >= begin[:, None] - left)
    for layer in encoder.layers:
        deep = layer.conv.depthwise_conv

        def convolve(z: torch.Tensor, deep: Any = deep) -> torch.Tensor:
            # A chunk with what went before it, and zeros for what follows.
            parts, tail = [], deep.padding[0]
            for start in range(0, z.shape[2], chunk):
                seen = F.pad(z[:, :, : start + chunk], (tail, tail))
                out = F.conv1d(seen, deep.weight, deep.bias, groups=deep.groups)
                parts.append(out[:, :, start : start + chunk])
            return torch.cat(parts, 2)

        deep.forward = convolve
        try:
            x = x + 0.5 * layer.feed_forward1(layer.norm_feed_forward1(x))
            y, _ = layer.self_attn(layer.norm_self_att(x), positions, mask[None, None])
            x = x + y
            x = x + layer.conv(layer.norm_conv(x))
            x = x + 0.5 * layer.feed_forward2(layer.norm_feed_forward2(x))
            x = layer.norm_out(x)
        finally:
            del deep.forward
    return model.ctc_head(x)


@pytest.mark.parametrize(("frames", "chunk", "left"), [(93, 12, 5), (128, 4, 6), (109, 3, 20)])
@torch.no_grad()
def test_steps_are_the_masked_whole(frames: int, chunk: int, left: int) -> None:
    """One step over everything is the model itself; several are the model with a chunk mask."""
    model = small()
    features = torch.randn(2, frames, 16, generator=torch.Generator().manual_seed(0))
    graph = ConformerStepGraph(model, KernelOperators(), (), chunk, left)
    got = steps(graph, features)
    torch.testing.assert_close(got, in_chunks(model, features, chunk, left), atol=1e-4, rtol=1e-4)
    whole = model(features).logits
    assert torch.allclose(got, whole, atol=1e-4) == (chunk * SUBSAMPLING >= frames)


@torch.no_grad()
def test_a_padded_batch_is_each_recording_alone() -> None:
    model = small()
    graph = RecognizeGraph(model, KernelOperators(), (), "input_features")
    features = torch.randn(2, 80, 16)
    mask = torch.ones(2, 80, dtype=torch.bool)
    mask[1, 50:] = False
    [both] = graph([features * mask[:, :, None], mask], [])
    [alone] = graph([features[1:, :50], mask[1:, :50]], [])
    torch.testing.assert_close(both[1, : alone.shape[1]], alone[0], atol=1e-5, rtol=1e-4)


def test_paths_collapse() -> None:
    assert collapse([9, 1, 1, 9, 1, 2, 2, 9, 9], blank=9) == [1, 1, 2]
    assert collapse([9, 9], blank=9) == []


@pytest.mark.slow
def test_onnx_whole_and_in_steps_with_a_live_adapter(
    tiny_parakeet_folder: Path, parakeet_adapter: Path, tune: Path, tmp_path: Path
) -> None:
    report = export_model(
        tiny_parakeet_folder, "onnx", tmp_path / "out", adapters={"accent": parakeet_adapter},
        check=[tune],
        options={"chunk": "3", "left": "8"},
    )  # fmt: skip
    assert report.check.identical
    found = {(c.way == "in steps", c.adapter): c for c in report.check.comparisons}
    assert set(found) == {(way, name) for way in (False, True) for name in (None, "accent")}
    assert all(c.tokens > 2 for c in found.values())
    assert found[False, "accent"].got != found[False, None].got != found[True, None].got
    # What is compared is not only ours: transformers says the same of the whole recording.
    model, processor = report.plan.model.model, report.plan.model.processor
    inputs = processor.feature_extractor(
        soundfile.read(tune)[0], sampling_rate=16_000, return_tensors="pt"
    )
    with lk.use_adapters("accent"):
        theirs = processor.tokenizer.decode(model.generate(**inputs)[0])
    assert theirs.strip() == found[False, "accent"].got


@pytest.mark.slow
@torch.no_grad()
def test_real_shapes_in_onnx_runtime(tmp_path: Path) -> None:
    """Width, heads and kernels of the released FastConformer; one of its layers."""
    import onnx_ir
    import onnxruntime

    from lora_speech.export.graph_inputs import example_inputs
    from lora_speech.export.onnx_graphs import export_onnx

    model = parakeet(num_hidden_layers=1)
    graph = ConformerStepGraph(model, KernelOperators(), (), 8, 16).eval()
    onnx_ir.save(export_onnx(graph), tmp_path / "step.onnx", external_data="step.data")
    inputs, _ = example_inputs(graph, batch=2)
    inputs = [torch.randn_like(x) if x.is_floating_point() else x * 30 for x in inputs]
    session = onnxruntime.InferenceSession(str(tmp_path / "step.onnx"))
    feeds = {name: x.numpy() for name, x in zip(graph.inputs, inputs, strict=True)}
    for got, expected in zip(session.run(None, feeds), graph(inputs, []), strict=True):
        torch.testing.assert_close(torch.from_numpy(got), expected, atol=2e-3, rtol=1e-3)


def test_only_onnx_takes_them(tiny_parakeet_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SpeechError, match="got a Parakeet, which --to peft does not take"):
        export_model(tiny_parakeet_folder, "peft", tmp_path / "out")
    assert not list(tmp_path.iterdir())
