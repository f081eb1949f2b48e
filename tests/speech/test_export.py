"""Models as other runtimes load them, on a tiny random Whisper: torch's own tokens."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lora_kernels as lk
from lora_speech.errors import ModelError
from lora_speech.export.folder import banks
from lora_speech.export.graphs import EncodeGraph, PrefillGraph, StepGraph
from lora_speech.export.operators import KernelOperators, StandardOperators
from lora_speech.export.run import ExportReport, export_model
from lora_speech.models.loading import load_for_serving


@pytest.mark.parametrize("operators", [KernelOperators(), StandardOperators()])
@torch.no_grad()
def test_graphs_are_the_model(
    tiny_whisper_folder: Path, adapters: dict[str, Path], operators: Any
) -> None:
    """A mixed batch through the three graphs, against whole forward passes with live adapters."""
    model = load_for_serving(tiny_whisper_folder, adapters).model
    linears = {
        name.removeprefix("model."): (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if name.endswith(("_proj", "fc1", "fc2"))
    }
    tensors = {}
    for name in adapters:
        layers = lk.get_adapter(model, name).layers.items()
        tensors[name] = {
            f"{key.removeprefix('model.')}.{kind}": value.numpy()
            for key, layer in layers
            for kind, value in (
                ("lora_a", layer.a_matrix),
                ("lora_b", (layer.b_matrix.t() * layer.scale).contiguous()),
            )
        }
    bank = banks(tensors, linears)
    features = torch.randn(3, 80, 200, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([[257, 258, 270, 11], [257, 259, 3, 12], [257, 1, 5, 13]])
    encode, prefill, step = (
        kind(model, operators, linears) for kind in (EncodeGraph, PrefillGraph, StepGraph)
    )

    def inputs(graph: Any) -> list[torch.Tensor]:
        ids = torch.tensor([1, -1, 0], dtype=torch.int32)
        return [ids, *(torch.from_numpy(bank[name]) for name in graph.adapter_inputs[1:])]

    cross = encode([features], inputs(encode))
    first, *caches = prefill([tokens[:, :3], *cross], inputs(prefill))
    lengths = torch.full((3,), 3, dtype=torch.int32)
    second, *_ = step([tokens[:, 3:], lengths, *caches, *cross], inputs(step))
    with lk.use_adapters(["some", None, "all"]):
        expected = model(input_features=features, decoder_input_ids=tokens).logits
    torch.testing.assert_close(first, expected[:, 2], atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(second, expected[:, 3], atol=2e-4, rtol=1e-3)
    assert not torch.allclose(first, model(
        input_features=features, decoder_input_ids=tokens).logits[:, 2], atol=1e-2)  # fmt: skip


def test_a_linear_that_no_adapter_changes_gets_a_row_that_nobody_owns() -> None:
    a = {"x.lora_a": np.ones((2, 3), np.float32), "x.lora_b": np.ones((2, 4), np.float32)}
    found = banks({"a": a, "b": {}}, {"x": (3, 4), "y": (5, 6)})
    assert found["x.offsets"].tolist() == [0, 2, 2] and found["x.lora_a"].shape == (2, 3)
    assert found["y.offsets"].tolist() == [0, 0, 0] and found["y.lora_b"].shape == (1, 6)


@pytest.mark.slow
def test_onnx_with_live_adapters(
    export: Callable[..., ExportReport],
    adapters: dict[str, Path],
    tiny_whisper_folder: Path,
    tmp_path: Path,
) -> None:
    """ONNX Runtime, which knows nothing of us, emits torch's tokens for each adapter."""
    report = export("onnx", adapters=adapters)
    assert report.check.identical and report.check.wer == 0
    assert {c.adapter for c in report.check.comparisons} == {None, "all", "some"}
    texts = {c.adapter: c.got for c in report.check.comparisons[:3]}
    assert texts["all"] != texts[None]
    assert json.loads((tmp_path / "out" / "check.json").read_text())["identical"]
    # Graphs share their weights: two decoders would be half as much again.
    weights = tiny_whisper_folder / "model.safetensors"
    assert report.bytes["weights.bin"] < 1.05 * weights.stat().st_size
    _engines_stand_in(tmp_path / "out", report)


def _engines_stand_in(folder: Path, report: ExportReport) -> None:
    """The decoder over engines, with ONNX Runtime and the host's memory in a GPU's place."""
    import onnxruntime

    from lora_kernels.export.tensorrt_runner import DeviceArray
    from lora_speech.export.engine_decoding import open_engines

    class Memory:
        def __init__(self) -> None:
            self.arrays: dict[int, np.ndarray] = {}

        def allocate(self, size: int) -> int:
            self.arrays[len(self.arrays)] = np.empty(size, np.uint8)
            return len(self.arrays) - 1

        def free(self, address: int) -> None:
            pass

        def to_device(self, address: int, array: np.ndarray) -> None:
            self.arrays[address][:] = np.frombuffer(array.tobytes(), np.uint8)

        def to_host(self, array: np.ndarray, address: int) -> None:
            array[...] = self.arrays[address].view(array.dtype).reshape(array.shape)

        def synchronize(self) -> None:
            pass

    memory: Any = Memory()
    kinds = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(int32)": np.int32}

    def load(path: Path) -> Any:
        session = onnxruntime.InferenceSession(str(folder / f"{path.stem}.onnx"))
        given = session.get_inputs()

        class Runner:
            inputs = tuple(i.name for i in given)
            outputs = tuple(o.name for o in session.get_outputs())
            types = {i.name: np.dtype(kinds[i.type]) for i in given}  # noqa: RUF012
            shapes = {i.name: i.shape for i in given}  # noqa: RUF012

            def __init__(self) -> None:
                self.memory = memory

            def __call__(self, feeds: Mapping[str, Any], keep: list[str]) -> dict[str, Any]:
                # Adapters and caches come from the device, the rest from the host.
                assert all(
                    isinstance(value, DeviceArray) == ("lora_" in name or ("." in name
                                                       and "offsets" not in name))
                    for name, value in feeds.items()
                )  # fmt: skip
                host = {k: v.get() if isinstance(v, DeviceArray) else v for k, v in feeds.items()}
                results = dict(zip(self.outputs, session.run(None, host), strict=True))
                for name in keep:
                    array = DeviceArray(memory, results[name].shape, np.float32)
                    array.set(results[name])
                    results[name] = array
                return results

        return Runner()

    engines = open_engines(folder, folder, load)
    from lora_speech.data.features import extract_features

    features = extract_features(report.plan.model, [report.plan.samples[0]])["input_features"]
    decoding = engines.decoding
    for comparison in report.check.comparisons[:3]:
        tokens = engines.decode(
            features.numpy(), decoding.prompt, decoding.max_new_tokens, comparison.adapter
        )
        text = report.plan.model.processor.tokenizer.decode(tokens, skip_special_tokens=True)
        assert text.strip() == comparison.got
    with pytest.raises(ModelError, match="expected one of all, some, got 'nobody'"):
        engines.decode(features.numpy(), decoding.prompt, 4, "nobody")


@pytest.mark.slow
def test_onnx_with_int8_and_a_merged_adapter(
    export: Callable[..., ExportReport], adapters: dict[str, Path]
) -> None:
    merged = export("onnx", adapters={"all": adapters["all"]}, merge=True, int8=True, max_wer=9.0)
    # A random model has no margins: rounding in another order may turn a token, not the first ones.
    assert all(c.same >= 1 for c in merged.check.comparisons)
    assert merged.plan.merged == "all" and not merged.plan.live
    assert merged.bytes["weights.bin"] < 500_000  # of 1.2 MB in fp32


def test_peft_and_back(
    export: Callable[..., ExportReport], adapters: dict[str, Path], tmp_path: Path
) -> None:
    """transformers and peft load what was written, and it is the adapter that was given."""
    report = export("peft", adapters=adapters, max_wer=9.0)
    # generate() drops what stands between timestamps, which a random model emits; so the start.
    assert all(c.same >= 1 for c in report.check.comparisons)
    texts = {c.adapter: c.got for c in report.check.comparisons[:3]}
    assert len(set(texts.values())) == 3
    written = lk.read_peft_folder(tmp_path / "out" / "adapters" / "some")
    given = lk.read_peft_folder(adapters["some"])
    assert written.layers.keys() == given.layers.keys()
    for name, layer in given.layers.items():
        assert torch.equal(layer.lora_a, written.layers[name].lora_a)


def test_ctranslate2_merges(
    export: Callable[..., ExportReport],
    adapters: dict[str, Path],
    tones: list[Path],
    tmp_path: Path,
) -> None:
    """faster-whisper loads the folder, and CTranslate2 does not say what the base says."""
    pytest.importorskip("ctranslate2")
    pytest.importorskip("faster_whisper")
    report = export("ctranslate2", adapters={"all": adapters["all"]}, max_wer=9.0)
    assert all(c.same >= 1 for c in report.check.comparisons)
    assert report.plan.merged == "all" and report.plan.model.adapters == ()
    plain = export_model(
        report.plan.model.source, "ctranslate2", tmp_path / "plain", check=tones, max_wer=9.0
    )
    for with_it, without in zip(report.check.comparisons, plain.check.comparisons, strict=True):
        assert with_it.got != without.got
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()


@pytest.mark.slow
@pytest.mark.skipif(
    not any(map(importlib.util.find_spec, ("tensorrt_rtx", "tensorrt_rtx_bindings"))),
    reason="needs TensorRT for RTX: pip install '.[tensorrt]'",
)
def test_engines_ahead_of_time(
    export: Callable[..., ExportReport], adapters: dict[str, Path]
) -> None:
    """Real engines for a GPU that is not here; their graphs are compared with torch."""
    report = export(
        "tensorrt",
        adapters=adapters,
        options={"arch": "sm86", "precision": "fp32", "max_batch": "2", "max_rank": "16"},
    )
    assert report.check.identical
    assert all(report.bytes[f"{name}.engine"] > 50_000 for name in ("encode", "prefill", "step"))
    assert "not run" in report.target.usage(report.output)
