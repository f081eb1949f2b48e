"""Models as other runtimes load them, on a tiny random Whisper: torch's own tokens."""

from __future__ import annotations

import errno
import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from exported import make_adapters, write_tones
from safetensors import SafetensorError
from tiny_whisper import make_adapter
from typer.testing import CliRunner

import lora_kernels as lk
from lora_kernels.errors import LoraKernelsError
from lora_speech.cli import app
from lora_speech.errors import ModelError, SpeechError
from lora_speech.export import run as run_module
from lora_speech.export import target as target_module
from lora_speech.export.folder import banks
from lora_speech.export.graphs import EncodeGraph, PrefillGraph, StepGraph
from lora_speech.export.operators import KernelOperators, StandardOperators
from lora_speech.export.run import ExportReport, export_model
from lora_speech.models.loading import load_for_serving


@pytest.fixture(scope="module")
def base(tiny_whisper_folder: Path) -> Path:
    return tiny_whisper_folder


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_adapters(base, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_tones(tmp_path_factory.mktemp("recordings"))


@pytest.fixture
def export(base: Path, recordings: list[Path], tmp_path: Path) -> Callable[..., ExportReport]:
    def call(to: str, **more: Any) -> ExportReport:
        return export_model(base, to, tmp_path / "out", check=recordings, **more)

    return call


def _nothing_left(folder: Path) -> bool:
    return not list(folder.iterdir())


@pytest.mark.parametrize("operators", [KernelOperators(), StandardOperators()])
@torch.no_grad()
def test_graphs_are_the_model(base: Path, adapters: dict[str, Path], operators: Any) -> None:
    """A mixed batch through the three graphs, against whole forward passes with live adapters."""
    model = load_for_serving(base, adapters).model
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
    export: Callable[..., ExportReport], adapters: dict[str, Path], base: Path, tmp_path: Path
) -> None:
    """ONNX Runtime, which knows nothing of us, emits torch's tokens for each adapter."""
    report = export("onnx", adapters=adapters)
    assert report.check.identical and report.check.wer == 0
    assert {c.adapter for c in report.check.comparisons} == {None, "all", "some"}
    texts = {c.adapter: c.got for c in report.check.comparisons[:3]}
    assert texts["all"] != texts[None]
    assert json.loads((tmp_path / "out" / "check.json").read_text())["identical"]
    # Graphs share their weights: two decoders would be half as much again.
    assert report.bytes["weights.bin"] < 1.05 * (base / "model.safetensors").stat().st_size
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
    from lora_speech.features import extract_features

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
    recordings: list[Path],
    tmp_path: Path,
) -> None:
    """faster-whisper loads the folder, and CTranslate2 does not say what the base says."""
    pytest.importorskip("ctranslate2")
    pytest.importorskip("faster_whisper")
    report = export("ctranslate2", adapters={"all": adapters["all"]}, max_wer=9.0)
    assert all(c.same >= 1 for c in report.check.comparisons)
    assert report.plan.merged == "all" and report.plan.model.adapters == ()
    plain = export_model(
        report.plan.model.source, "ctranslate2", tmp_path / "plain", check=recordings, max_wer=9.0
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


@pytest.mark.parametrize(
    ("to", "more", "text"),
    [
        ("nothing", {}, "to: expected one of peft, ctranslate2, onnx"),
        ("peft", {"int8": True}, "expected a target that takes INT8, got peft"),
        ("peft", {"merge": True}, "expected an adapter to merge, got none"),
        ("onnx", {"options": {"opset": "9"}}, "--option: expected one that onnx takes, chunk"),
        ("onnx", {"options": {"chunk": "0"}}, "--option chunk: expected a whole number from 1 on"),
        ("tensorrt", {"options": {"arch": "sm10"}}, "--option arch: expected one of sm75"),
        ("tensorrt", {"options": {"max_rank": "-1"}}, "expected a whole number from 1 on"),
    ],
)
def test_refused_before_anything_is_written(
    export: Callable[..., ExportReport],
    tmp_path: Path,
    to: str,
    more: dict[str, Any],
    text: str,
) -> None:
    with pytest.raises(SpeechError, match=text):
        export(to, **more)
    assert _nothing_left(tmp_path)


@pytest.mark.parametrize("name", ["a/b", "../x", "v1.2", ""])
def test_names_of_adapters_are_names_of_files(
    export: Callable[..., ExportReport], adapters: dict[str, Path], tmp_path: Path, name: str
) -> None:
    with pytest.raises(SpeechError, match="expected names of letters, digits, - and _, got"):
        export("peft", adapters={name: adapters["all"]})
    assert _nothing_left(tmp_path)


def test_a_layer_that_no_graph_adapts_is_not_dropped(
    export: Callable[..., ExportReport], base: Path, tmp_path: Path
) -> None:
    odd = make_adapter(base, tmp_path / "odd", rank=2, seed=5, targets=["q_proj", "proj_out"])
    with pytest.raises(ModelError, match="take adapters for, got proj_out; merge"):
        export("onnx", adapters={"odd": odd})
    # Whisper's output layer is its embedding: merged, the adapter would change both.
    with pytest.raises(ModelError, match=r"adapter 'odd': proj_out: .* share .*export it to peft"):
        export("onnx", adapters={"odd": odd}, merge=True)
    assert [path.name for path in tmp_path.iterdir()] == ["odd"]
    assert export("peft", adapters={"odd": odd}, max_wer=9.0).plan.live == ("odd",)


def test_an_adapter_of_another_shape_is_named() -> None:
    a = {"x.lora_a": np.ones((2, 3), np.float32), "x.lora_b": np.ones((2, 4), np.float32)}
    with pytest.raises(
        ModelError, match=r"adapter 'a': x.lora_a: expected \[rank, 5\], got \[2, 3"
    ):
        banks({"a": a}, {"x": (5, 4)})
    with pytest.raises(ModelError, match="expected a linear that the graphs take"):
        banks({"a": a}, {"y": (3, 4)})


def test_language(export: Callable[..., ExportReport]) -> None:
    with pytest.raises(ModelError, match=r"language: expected one that the model knows \(en, es"):
        export("peft", language="de")
    report = export("peft", language="es", max_wer=9.0)
    assert report.plan.language == "es"


def test_several_adapters_are_not_merged(
    export: Callable[..., ExportReport], adapters: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(SpeechError, match=r"expected one, .* got 2 \(all, some\)"):
        export("peft", adapters=adapters, merge=True)
    assert _nothing_left(tmp_path)


def test_tensorrt_that_is_not_there_is_named(export: Callable[..., ExportReport]) -> None:
    if importlib.util.find_spec("tensorrt"):
        pytest.skip("TensorRT is installed here")
    with pytest.raises(LoraKernelsError, match="pip install tensorrt"):
        export("tensorrt")


def test_what_torch_does_not_say_is_not_published(
    export: Callable[..., ExportReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = SimpleNamespace(decode=lambda features, prompt, limit, adapter: [70, 71, 72])
    peft = target_module.target("peft")
    changed = target_module.Target(**{**vars(peft), "open": lambda folder: wrong})
    monkeypatch.setattr(run_module, "target", lambda name: changed)
    with pytest.raises(ModelError, match="expected texts within 5% WER of the torch model's"):
        export("peft")
    assert _nothing_left(tmp_path)


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("No space left on device")],
)
def test_a_full_disk_leaves_nothing(
    export: Callable[..., ExportReport],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    def full(plan: Any, folder: Path, say: Any) -> None:
        (folder / "half").write_bytes(b"0" * 1000)
        raise error

    changed = target_module.Target(**{**vars(target_module.target("peft")), "write": full})
    monkeypatch.setattr(run_module, "target", lambda name: changed)
    with pytest.raises(SpeechError, match="No space left on device; choose another place or make"):
        export("peft")
    assert _nothing_left(tmp_path)


def test_a_failed_replacement_keeps_what_was_there(
    export: Callable[..., ExportReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = export("peft", max_wer=9.0)
    before = (report.output / "check.json").read_text()

    def broken(partial: Path, path: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(run_module, "publish", broken)
    with pytest.raises(SpeechError, match="Input/output error"):
        export("peft", max_wer=9.0, overwrite=True)
    assert (report.output / "check.json").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_place_that_cannot_be_is_refused_at_once(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "load_base", lambda base: pytest.fail("was loaded"))
    (tmp_path / "file").write_text("")
    with pytest.raises(SpeechError, match="is a file; choose another place"):
        export_model(base, "peft", tmp_path / "file" / "below" / "out")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SpeechError, match="a link; name its target"):
        export_model(base, "peft", tmp_path / "link")


def test_an_export_replaces_only_an_export(
    base: Path, recordings: list[Path], tmp_path: Path
) -> None:
    runner, output = CliRunner(), tmp_path / "out"
    arguments = ["export", "--to", "peft", "--base", str(base), "--output", str(output)]
    arguments += ["--check", str(recordings[0]), "--max-wer", "9"]
    output.mkdir()
    (output / "mine.txt").write_text("keep")
    for more in ([], ["--overwrite"]):
        result = runner.invoke(app, [*arguments, *more])
        assert isinstance(result.exception, SpeechError)
    assert "has no check.json" in str(result.exception)
    assert [path.name for path in output.iterdir()] == ["mine.txt"]
    (output / "mine.txt").unlink()
    output.rmdir()
    assert runner.invoke(app, arguments).exit_code == 0
    before = (output / "check.json").stat().st_mtime_ns
    result = runner.invoke(app, [*arguments, "--overwrite"])
    assert result.exit_code == 0 and (output / "check.json").stat().st_mtime_ns > before
    assert "adapters merged: none" in result.output and "model.safetensors" in result.output
    assert " 0.0 MB" not in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_options_and_recordings_are_read_first(base: Path, tmp_path: Path) -> None:
    arguments = ["export", "--to", "peft", "--base", str(base), "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*arguments, "--option", "quick"])
    assert "--option: expected NAME=VALUE, got 'quick'" in str(result.exception)
    result = CliRunner().invoke(app, [*arguments, "--check", str(tmp_path / "gone.wav")])
    assert "gone.wav" in str(result.exception)
    assert _nothing_left(tmp_path)
