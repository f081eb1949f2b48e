"""Engines: what builders are given, what they refuse, and real ones by TensorRT for RTX."""

from __future__ import annotations

import errno
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from single_calls import Call, bank, exported, run

from lora_kernels import export, ops, reference
from lora_kernels.errors import LoraKernelsError, UnsupportedError
from lora_kernels.export import tensorrt as engines
from lora_kernels.export import tensorrt_model as models

ir = pytest.importorskip("onnx_ir", reason="needs the extra `export`")
pytest.importorskip("onnxscript", reason="needs the extra `export`")
pytest.importorskip("onnxruntime", reason="needs the extra `export`")

needs_rtx = pytest.mark.skipif(
    not any(map(importlib.util.find_spec, ("tensorrt_rtx", "tensorrt_rtx_bindings"))),
    reason="needs TensorRT for RTX: pip install '.[tensorrt]'",
)
K, N = 64, 96
PROFILE = {
    "x": ((1, 1, K), (4, 100, K), (16, 1500, K)),
    "lora_a": ((1, K), (32, K), (64, K)),
    "lora_b": ((1, N), (32, N), (64, N)),
    "scales": ((1,), (4,), (8,)),
    "offsets": ((2,), (5,), (9,)),
    "adapter_ids": ((1,), (4,), (16,)),
}


class Layer(torch.nn.Module):
    """A layer whose adapters and routing are inputs."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("weight", (torch.randn(N, K) / K**0.5).to(dtype))
        self.eval()

    def forward(self, x, lora_a, lora_b, scales, offsets, adapter_ids):
        return ops.lora_linear(
            x,
            self.weight,
            lora_a=lora_a,
            lora_b=lora_b,
            scales=scales,
            offsets=offsets,
            adapter_ids=adapter_ids,
            activation="gelu",
        )


def layer(folder: Path, dtype: torch.dtype = torch.float16) -> tuple[Path, Layer, dict]:
    module = Layer(dtype)
    inputs = {"x": torch.randn(3, 7, K).to(dtype)} | bank([4, 2, 17], K, N, 3, dtype)
    batch, rows, total, count = map(torch.export.Dim, ("batch", "rows", "total", "count"))
    shapes = ({0: batch, 1: rows}, {0: total}, {0: total}, {0: count}, {0: count + 1}, {0: batch})
    model = exported(module, tuple(inputs.values()), folder, dynamic_shapes=shapes)
    return model, module, inputs


def attention(folder: Path) -> Path:
    case = dict.fromkeys(("q", "k", "v"), torch.randn(2, 1, 4, 16))
    case |= {name: torch.zeros(2, 4, 32, 16) for name in ("k_cache", "v_cache")}
    case["lengths"] = torch.tensor([3, 5], dtype=torch.int32)
    return exported(Call(export.kv_attention_step, list(case), {}), tuple(case.values()), folder)


def int8(folder: Path) -> Path:
    packed = ops.int8_pack(*reference.quantize_weight(torch.randn(N, K)))

    def call(x, packed_weight):
        return ops.int8_lora_linear(x, packed_weight, N)

    x = torch.randn(3, K)
    return exported(Call(call, ["x"], {"packed_weight": packed}), (x,), folder)


def node_types(path: Path) -> list[tuple[str, str]]:
    return [(node.domain, node.op_type) for node in ir.load(path).graph]


@pytest.mark.slow
def test_with_plugins_nodes_stay_and_caches_are_appended_to_in_place(tmp_path: Path) -> None:
    found = models.prepare(attention(tmp_path), tmp_path / "out.onnx", plugins=True)
    assert found.nodes == {"KvAttentionStep": 1}
    assert len(found.aliases) == len(set(found.aliases.values())) == 2
    model = ir.load(tmp_path / "out.onnx")
    assert not model.functions
    (node,) = [n for n in model.graph if n.domain == export.DOMAIN]
    assert node.attributes["in_place"].value == 1
    assert node.attributes["plugin_namespace"].value == export.PLUGIN_NAMESPACE


def test_without_plugins_bodies_take_their_place(tmp_path: Path) -> None:
    model, module, inputs = layer(tmp_path, torch.float32)
    found = models.prepare(model, tmp_path / "out.onnx", plugins=False)
    assert found == models.Prepared({"LoraLinearGelu": 1}, {})
    assert all(domain == "" for domain, _ in node_types(tmp_path / "out.onnx"))
    (y,) = run(tmp_path / "out.onnx", tuple(inputs.values()))
    torch.testing.assert_close(y, module(**inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_int8_layers_need_plugins(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="plugin_library"):
        models.prepare(int8(tmp_path), tmp_path / "out.onnx", plugins=False)
    assert models.prepare(tmp_path / "model.onnx", tmp_path / "out.onnx", plugins=True).nodes


def test_the_equivalent_command() -> None:
    profiles = [{"x": ((1, 8), (2, 8), (4, 8))}, {"x": ((5, 8), (6, 8), (7, 8))}]
    got = models.trtexec_command(
        "a model.onnx",
        "m.engine",
        profiles,
        plugin_library="libp.so",
        timing_cache="t.cache",
        in_place=True,
    )
    assert got == (
        "trtexec '--onnx=a model.onnx' --saveEngine=m.engine --stronglyTyped "
        "--dynamicPlugins=libp.so --profile=0 --minShapes=x:1x8 --optShapes=x:2x8 "
        "--maxShapes=x:4x8 --profile=1 --minShapes=x:5x8 --optShapes=x:6x8 --maxShapes=x:7x8 "
        "--timingCacheFile=t.cache --preview=+aliasedPluginIO1003"
    )


def test_tensorrt_that_is_missing_or_old_is_named(monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").touch()
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(LoraKernelsError, match="pip install tensorrt"):
        engines.build_engine(tmp_path / "m.onnx", tmp_path / "e", profiles={})
    for version in ("10.2.0.19", "12.0.1"):
        monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__=version))
        with pytest.raises(UnsupportedError, match=f"10.3 to 11, got {version}"):
            engines.build_engine(tmp_path / "m.onnx", tmp_path / "e", profiles={})


def test_wrong_arguments(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"no model")
    here, out = tmp_path / "m.onnx", tmp_path / "e"
    with pytest.raises(LoraKernelsError, match="onnx_path"):
        engines.build_engine(tmp_path / "none.onnx", out, profiles={}, target="sm80")
    with pytest.raises(LoraKernelsError, match="target: expected None or one of"):
        engines.build_engine(here, out, profiles={}, target="sm90")
    with pytest.raises(UnsupportedError, match="takes no plugins"):
        engines.build_engine(here, out, profiles={}, target="sm80", plugin_library="x.so")


@needs_rtx
@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm80", "sm86", "sm89", "sm120"])
def test_rtx_builds_ahead_of_time(tmp_path: Path, target: str) -> None:
    model, _, _ = layer(tmp_path)
    steps = []
    report = engines.build_engine(
        model,
        tmp_path / "e.engine",
        profiles=PROFILE,
        precision="fp16",
        target=target,
        progress=lambda *step: steps.append(step),
    )
    assert report.engine.stat().st_size == report.bytes > N * K * 2
    assert report.standard == {"LoraLinearGelu": 1} and not report.plugins
    assert report.builder.startswith("TensorRT for RTX 1.7") and report.target == target
    assert steps and all(0 <= step <= count for _, step, count in steps)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["e.engine", "model.onnx"]


@needs_rtx
@pytest.mark.slow
def test_rtx_builds_a_cached_attention_step(tmp_path: Path) -> None:
    report = engines.build_engine(
        attention(tmp_path), tmp_path / "e.engine", profiles={}, target="sm89"
    )
    assert report.standard == {"KvAttentionStep": 1} and report.bytes > 0


@needs_rtx
@pytest.mark.slow
def test_a_failed_build_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    model, _, _ = layer(tmp_path)

    def refused(error: type[Exception], match: str, **changed) -> None:
        options = {"profiles": PROFILE, "target": "sm80"} | changed
        with pytest.raises(error, match=match):
            engines.build_engine(model, tmp_path / "e.engine", **options)
        assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]

    without = {name: sizes for name, sizes in PROFILE.items() if name != "lora_a"}
    refused(LoraKernelsError, r"'lora_a' \[-1, 64\], got none", profiles=without)
    refused(LoraKernelsError, "'lora_c' is no input", profiles=PROFILE | {"lora_c": ((), (), ())})
    wide = PROFILE | {"lora_b": ((1, N), (8, N + 1), (64, N))}
    refused(LoraKernelsError, "'lora_b': expected least <= usual", profiles=wide)
    refused(LoraKernelsError, r"model\.half\(\)", precision="bf16")
    refused(LoraKernelsError, "cancelled", progress=lambda *_: False)

    def full(self: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    refused(LoraKernelsError, "no space is left")


class Recorded:
    """A TensorRT that notes what it is asked for; every attribute is another such thing."""

    def __init__(self, calls: list, name: str, known: dict) -> None:
        self.calls, self.name, self.known = calls, name, known

    def __getattr__(self, name: str):
        return self.known.get(name, Recorded(self.calls, f"{self.name}.{name}", self.known))

    def __call__(self, *arguments):
        self.calls.append((self.name.split(".")[-1], arguments))
        return self


@pytest.fixture
def tensorrt(monkeypatch) -> list:
    """Calls to a recorded TensorRT 10.16, which builds the bytes ``engine``."""
    calls: list = []
    known = {
        "__version__": "10.16.1.11",
        "ILogger": type("ILogger", (), {"Severity": SimpleNamespace(ERROR=1, INTERNAL_ERROR=0)}),
        "NetworkDefinitionCreationFlag": SimpleNamespace(STRONGLY_TYPED=1),
        "PreviewFeature": SimpleNamespace(ALIASED_PLUGIN_IO_10_03="aliased"),
        "num_inputs": 0,
        "serialize": lambda: b"timings",
        "build_serialized_network": lambda network, config: b"engine",
    }
    monkeypatch.setitem(sys.modules, "tensorrt", Recorded(calls, "tensorrt", known))
    return calls


def test_tensorrt_is_asked_for_plugins_and_caches_in_place(tmp_path: Path, tensorrt: list) -> None:
    """What a builder does with it needs a GPU; here, that it is asked, and what is left behind."""
    model = attention(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    (tmp_path / "libp.so").touch()
    (tmp_path / "t.cache").write_bytes(b"earlier")
    report = engines.build_engine(
        model,
        tmp_path / "model.engine",  # of the model's own name
        profiles={},
        plugin_library=tmp_path / "libp.so",
        timing_cache=tmp_path / "t.cache",
    )
    asked = dict(tensorrt)
    assert asked["load_library"] == (str(tmp_path / "libp.so"),)
    assert asked["create_network"] == (2,)
    assert asked["set_preview_feature"] == ("aliased", True)
    assert asked["create_timing_cache"] == (b"earlier",)
    assert Path(*asked["parse_from_file"]).name == "model.tensorrt.onnx"
    assert (tmp_path / "t.cache").read_bytes() == b"timings"
    assert (tmp_path / "model.engine").read_bytes() == b"engine"
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.name in before} == before
    assert report.plugins == {"KvAttentionStep": 1} and not report.standard
    assert report.model == tmp_path / "model.tensorrt.onnx" and report.model.is_file()
    assert f"--dynamicPlugins={tmp_path}/libp.so" in report.trtexec
    assert f"--onnx={report.model}" in report.trtexec
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".building")]


def test_a_missing_plugin_library_is_named(tmp_path: Path, tensorrt: list) -> None:
    (tmp_path / "m.onnx").touch()
    with pytest.raises(LoraKernelsError, match="plugin_library: expected a file"):
        engines.build_engine(
            tmp_path / "m.onnx", tmp_path / "e", profiles={}, plugin_library="none.so"
        )
