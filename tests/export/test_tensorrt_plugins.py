"""The plugin library: one source for every TensorRT, and real registries of both majors.

What a builder and a runtime ask of a plugin is asked in tests/cpp/tensorrt_test.cpp, which
tests/test_core.py runs where TENSORRT_INCLUDE_DIR is set.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from single_calls import Call, bank, exported

from lora_kernels import ops
from lora_kernels.export import NODES
from lora_kernels.export.tensorrt_model import prepare

ROOT = Path(__file__).resolve().parents[2]
# Folders of headers, of several versions if there are; the first is built.
HEADERS = [
    Path(p)
    for p in os.environ.get(
        "LORA_KERNELS_TENSORRT_HEADERS", os.environ.get("TENSORRT_INCLUDE_DIR", "")
    ).split(os.pathsep)
    if p
]
# Where tensorrt_lean_bindings are: the environment's own (""), and folders of other versions.
SITES = [""] if importlib.util.find_spec("tensorrt_lean_bindings") else []
SITES += [p for p in os.environ.get("LORA_KERNELS_TENSORRT_SITES", "").split(os.pathsep) if p]

needs_headers = pytest.mark.skipif(
    not HEADERS, reason="needs TensorRT's headers: set TENSORRT_INCLUDE_DIR"
)


def toolkit() -> Path:
    """The CUDA toolkit, whose runtime's header TensorRT's include."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    if not (home / "include" / "cuda_runtime_api.h").is_file():
        pytest.skip(f"needs the CUDA toolkit's headers: none in {home} (set CUDA_HOME)")
    return home


@needs_headers
@pytest.mark.slow
@pytest.mark.parametrize("headers", HEADERS, ids=str)
def test_one_source_compiles_against_every_version(headers: Path) -> None:
    sources = sorted((ROOT / "csrc/bindings/tensorrt").glob("*.cpp"))
    command = ["g++", "-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror"]
    command += ["-isystem", headers, "-isystem", toolkit() / "include"]
    command += ["-I", ROOT / "csrc", "-I", ROOT / "csrc/include"]
    subprocess.run([*command, *sources], check=True)


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """The library; LORA_KERNELS_TENSORRT_LIBRARY names one that is there."""
    named = os.environ.get("LORA_KERNELS_TENSORRT_LIBRARY")
    if named:
        return Path(named)
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    toolkit()
    folder = tmp_path_factory.mktemp("plugins")
    configure = ["cmake", "-S", ROOT, "-B", folder, "-DLORA_KERNELS_TENSORRT=ON"]
    configure += ["-DLORA_KERNELS_CUDA=OFF", f"-DTENSORRT_INCLUDE_DIR={HEADERS[0]}"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}"]
    configure += ["-G", "Ninja"] if shutil.which("ninja") else []
    subprocess.run(configure, check=True, capture_output=True)
    build = ["cmake", "--build", folder, "-j", "2", "--target", "lora_kernels_tensorrt"]
    subprocess.run(build, check=True, capture_output=True)
    (built,) = folder.glob("liblora_kernels_tensorrt*.so")
    return built


@needs_headers
@pytest.mark.slow
@pytest.mark.skipif(not SITES, reason="needs a registry: pip install '.[tensorrt]'")
@pytest.mark.parametrize("site", SITES)
def test_a_registry_loads_and_creates(library: Path, site: str) -> None:
    """In a process of its own: a plugin library cannot be taken back, and may crash."""
    probe = [sys.executable, Path(__file__).with_name("registry_probe.py"), site, library]
    run = subprocess.run(probe, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-3000:]
    answer = json.loads(run.stdout.splitlines()[-1])
    assert set(answer["plugins"]) == set(NODES)
    for name, plugin in answer["plugins"].items():
        node = NODES[name]
        assert plugin["core"] == [name, "1", "lora_kernels"]
        assert plugin["outputs"] == len(node.outputs)
        # what the exporter writes is what the creator reads
        written = {a for a in node.attributes if not a.startswith("plugin_")}
        assert written == set(plugin["fields"]) - {"in_place"}
    assert answer["refused"]
    assert "has_bias: expected 0 or 1, got 7" in run.stderr


@needs_headers
@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx_bindings") is None,
    reason="needs TensorRT's parser, which comes with RTX: pip install '.[tensorrt]'",
)
@pytest.mark.parametrize("flag", [1, 7])
def test_a_parser_reads_nodes_into_plugins(library: Path, tmp_path: Path, flag: int) -> None:
    """TensorRT's own parser. RTX takes no plugins and aborts once it has made ours."""
    import onnx_ir as ir

    k, n = 12, 20
    fixed = bank([2, 3], k, n, 1) | {"weight": torch.randn(n, k)}
    module = Call(ops.lora_linear, ["x"], fixed, activation="gelu")
    model = exported(module, (torch.randn(4, k),), tmp_path)
    prepare(model, tmp_path / "prepared.onnx", plugins=True)
    prepared = ir.load(tmp_path / "prepared.onnx")
    for node in prepared.graph:
        if node.domain == "lora_kernels":
            node.attributes["has_lora"] = ir.AttrInt64("has_lora", flag)
    ir.save(prepared, tmp_path / "flagged.onnx")
    probe = Path(__file__).with_name("parser_probe.py")
    run = subprocess.run(
        [sys.executable, probe, library, tmp_path / "flagged.onnx"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    refusal = "has_lora: expected 0 or 1, got 7" in run.stderr
    created = "Successfully created plugin: LoraLinearGelu" in run.stdout
    assert (created, refusal) == (flag == 1, flag == 7), run.stdout[-3000:] + run.stderr[-2000:]
    assert "not found in plugin node" not in run.stdout


@needs_headers
@pytest.mark.slow
def test_the_library_links_nothing_of_tensorrt_and_exports_two_symbols(library: Path) -> None:
    if shutil.which("nm") is None or shutil.which("ldd") is None:
        pytest.skip("binutils are not installed")
    needed = subprocess.run(["ldd", library], capture_output=True, text=True).stdout
    assert "nvinfer" not in needed and "libcudart" not in needed
    symbols = subprocess.run(
        ["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert {s.split()[-1] for s in symbols if " T " in s} == {"getCreators", "setLoggerFinder"}


@needs_headers
@pytest.mark.slow
def test_an_enqueue_reaches_the_cuda_kernels() -> None:
    """The plugins over the emulation: lora_linear's kernels, and refusals of what has none."""
    sys.path.insert(0, str(ROOT / "tests/cuda"))
    from emulated import build, missing

    if missing():
        pytest.skip(missing())
    options = ("-DLORA_KERNELS_SANITIZE=address,undefined", f"-DTENSORRT_INCLUDE_DIR={HEADERS[0]}")
    program = build("tensorrt_emulated_test", *options)
    run = subprocess.run([program], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert "all checks passed" in run.stdout
