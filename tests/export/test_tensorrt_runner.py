"""The runner's own work (profiles, buffers, refusals), with the host's memory and a made-up engine.

It cannot show that TensorRT does as it is told: that needs a GPU.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lora_kernels.errors import LoraKernelsError
from lora_kernels.export import tensorrt_runner
from lora_kernels.export.tensorrt_runner import DeviceArray, EngineRunner


class HostMemory:
    """The host's memory as a device's; counts what is taken and not given back."""

    stream = 7

    def __init__(self) -> None:
        self.blocks: dict[int, ctypes.Array] = {}

    def allocate(self, size: int) -> int:
        block = ctypes.create_string_buffer(max(size, 1))
        self.blocks[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    def free(self, address: int) -> None:
        del self.blocks[address]

    def to_device(self, address: int, array: np.ndarray) -> None:
        ctypes.memmove(address, array.ctypes.data, array.nbytes)

    def to_host(self, array: np.ndarray, address: int) -> None:
        ctypes.memmove(array.ctypes.data, address, array.nbytes)

    def synchronize(self) -> None:
        pass


class Engine:
    """``y = x + 1`` [rows, 4] and ``cache_out = cache`` with 2 added, in place or not."""

    names = ("x", "cache", "y", "cache_out")
    num_io_tensors, num_optimization_profiles = 4, 2
    rows = ((1, 2, 4), (5, 6, 8))  # of the two profiles

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.profiles: list[int] = []

    def get_tensor_name(self, i: int) -> str:
        return self.names[i]

    def get_tensor_mode(self, name: str) -> str:
        return "in" if name in ("x", "cache") else "out"

    def get_tensor_dtype(self, name: str) -> str:
        return "float32"

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        return [(rows, 4) if name == "x" else (3,) for rows in self.rows[profile]]

    def create_execution_context(self) -> Engine:
        return self

    def set_optimization_profile_async(self, profile: int, stream: int) -> None:
        self.profiles.append(profile)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> None:
        self.shapes[name] = shape

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes.get("x" if name in ("x", "y") else "cache", (-1,))

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        for source, result, added in (("x", "y", 1), ("cache", "cache_out", 2)):
            count = int(np.prod(self.shapes[source]))
            kind = ctypes.c_float * count
            values = np.array(kind.from_address(self.addresses[source]))
            kind.from_address(self.addresses[result])[:] = values + added
        return True


@pytest.fixture
def engine(monkeypatch) -> Engine:
    made = Engine()
    loaded = SimpleNamespace(load_library=lambda path: None)
    trt = SimpleNamespace(
        __version__="10.16.1",
        bfloat16="bfloat16",
        nptype=np.dtype,
        Logger=type("Logger", (), {"WARNING": 2, "__init__": lambda self, level: None}),
        TensorIOMode=SimpleNamespace(INPUT="in"),
        Runtime=lambda logger: SimpleNamespace(
            get_plugin_registry=lambda: loaded,
            deserialize_cuda_engine=lambda data: made if data == b"engine" else None,
        ),
    )
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, trt)
    return made


@pytest.fixture
def runner(engine: Engine, tmp_path) -> EngineRunner:
    (tmp_path / "e.engine").write_bytes(b"engine")
    return EngineRunner(tmp_path / "e.engine", memory=HostMemory())


def inputs(rows: int) -> dict[str, np.ndarray]:
    x = np.arange(rows * 4, dtype=np.float32).reshape(rows, 4)
    return {"x": x, "cache": np.ones(3, np.float32)}


def test_outputs_come_back(runner: EngineRunner) -> None:
    given = inputs(2)
    got = runner(given)
    np.testing.assert_array_equal(got["y"], given["x"] + 1)
    np.testing.assert_array_equal(got["cache_out"], np.full(3, 3.0))
    transposed = {**given, "x": np.asfortranarray(given["x"])}
    np.testing.assert_array_equal(runner(transposed)["y"], given["x"] + 1)


def test_a_cache_stays_on_the_device(runner: EngineRunner) -> None:
    cache = DeviceArray(runner.memory, (3,), np.float32)
    cache.set(np.ones(3, np.float32))
    for _ in range(2):
        got = runner({"x": inputs(1)["x"], "cache": cache}, {"cache_out": cache})
        assert list(got) == ["y"]
    np.testing.assert_array_equal(cache.get(), np.full(3, 5.0))


def test_what_is_kept_goes_on_on_the_device(engine: Engine, runner: EngineRunner) -> None:
    first = runner(inputs(1), keep=["cache_out"])["cache_out"]
    second = runner({"x": inputs(1)["x"], "cache": first}, keep=["cache_out"])["cache_out"]
    assert second.address != first.address
    np.testing.assert_array_equal(first.get(), np.full(3, 3.0))
    np.testing.assert_array_equal(second.get(), np.full(3, 5.0))
    runner.aliases = {"cache_out": "cache"}
    third = runner({"x": inputs(1)["x"], "cache": second}, keep=["cache_out"])["cache_out"]
    assert third is second
    np.testing.assert_array_equal(third.get(), np.full(3, 7.0))


def test_what_an_engine_continues_in_place_stands_beside_it(engine: Engine, tmp_path) -> None:
    """Given from the host, kept on the device or not: the output is the input's memory."""
    (tmp_path / "e.engine").write_bytes(b"engine")
    (tmp_path / "e.engine.aliases.json").write_text('{"cache_out": "cache"}')
    runner = EngineRunner(tmp_path / "e.engine", memory=HostMemory())
    got = runner(inputs(1))
    assert engine.addresses["cache_out"] == engine.addresses["cache"]
    np.testing.assert_array_equal(got["cache_out"], np.full(3, 3.0))
    kept = runner(inputs(1), keep=["cache_out"])["cache_out"]
    runner(inputs(1))  # another call from the host must not write what was kept
    np.testing.assert_array_equal(kept.get(), np.full(3, 3.0))


def test_the_profile_that_covers_the_input_is_chosen(runner: EngineRunner, engine: Engine) -> None:
    for rows in (4, 7, 8, 1):
        runner(inputs(rows))
    assert engine.profiles == [1, 0]
    with pytest.raises(LoraKernelsError, match=r"x: expected \[1, 4\] to \[4, 4\], got \[9, 4\]"):
        runner(inputs(9))


def test_wrong_inputs_are_named(runner: EngineRunner) -> None:
    given = inputs(2)
    with pytest.raises(LoraKernelsError, match="expected cache as well"):
        runner({"x": given["x"]})
    with pytest.raises(LoraKernelsError, match="'z' is no tensor"):
        runner({**given, "z": given["x"]})
    with pytest.raises(LoraKernelsError, match="x: expected float32, got float64"):
        runner({**given, "x": given["x"].astype(float)})
    small = DeviceArray(runner.memory, (2,), np.float32)
    with pytest.raises(LoraKernelsError, match="outputs: cache_out: expected"):
        runner(given, {"cache_out": small})


def test_buffers_are_reused_and_given_back(runner: EngineRunner) -> None:
    memory = runner.memory
    for _ in range(3):
        runner(inputs(2))
    assert len(memory.blocks) == 4
    runner(inputs(3))
    assert len(memory.blocks) == 4
    runner._buffers.clear()
    assert not memory.blocks


def test_what_cannot_be_run_is_named(engine: Engine, tmp_path, monkeypatch) -> None:
    with pytest.raises(LoraKernelsError, match="expected a file"):
        EngineRunner(tmp_path / "none.engine", memory=HostMemory())
    (tmp_path / "bad.engine").write_bytes(b"other")
    with pytest.raises(LoraKernelsError, match="build it again here"):
        EngineRunner(tmp_path / "bad.engine", memory=HostMemory())
    for name in ("cuda.bindings.runtime", "pycuda.autoprimaryctx"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(LoraKernelsError, match="cuda-bindings"):
        tensorrt_runner.cuda_memory()


def test_an_engine_built_ahead_of_time_is_run_by_tensorrt_for_rtx(
    engine: Engine, tmp_path, monkeypatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    (tmp_path / "e.engine").write_bytes(b"engine")
    runner = EngineRunner(tmp_path / "e.engine", memory=HostMemory(), rtx=True)
    np.testing.assert_array_equal(runner(inputs(2))["y"], inputs(2)["x"] + 1)
    with pytest.raises(LoraKernelsError, match="plugin_library: expected None with rtx"):
        EngineRunner(tmp_path / "e.engine", plugin_library="p.so", rtx=True)
    (tmp_path / "bad.engine").write_bytes(b"other")
    with pytest.raises(LoraKernelsError, match=r"TensorRT for RTX 10.16.1 cannot read"):
        EngineRunner(tmp_path / "bad.engine", memory=HostMemory(), rtx=True)


def test_tensorrt_for_rtx_has_what_the_runner_calls() -> None:
    rtx = pytest.importorskip("tensorrt_rtx_bindings")
    parts = {
        rtx: "Logger Runtime TensorIOMode bfloat16 nptype",
        rtx.Runtime: "deserialize_cuda_engine",
        rtx.ICudaEngine: "create_execution_context get_tensor_dtype get_tensor_mode "
        "get_tensor_name get_tensor_profile_shape get_tensor_shape num_io_tensors "
        "num_optimization_profiles",
        rtx.IExecutionContext: "execute_async_v3 get_tensor_shape set_input_shape "
        "set_optimization_profile_async set_tensor_address",
    }
    for part, names in parts.items():
        assert not [name for name in names.split() if not hasattr(part, name)]


def test_the_example_runs_an_engine_without_torch(tmp_path) -> None:
    """In a process of its own, up to where TensorRT itself is needed."""
    example = Path(__file__).resolve().parents[2] / "examples" / "run_engine.py"
    code = (
        "import runpy, sys\n"
        f"space = runpy.run_path({str(example)!r})\n"
        "module = space['import_runner']()\n"
        "assert module.EngineRunner and 'torch' not in sys.modules, 'torch was imported'\n"
        "sys.modules['tensorrt'] = None\n"
        "sys.argv[1:] = ['none.engine', 'in.npz', 'out.npz']\n"
        f"runpy.run_path({str(example)!r}, run_name='__main__')\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 1
    assert "error: tensorrt: expected it to be installed" in run.stderr, run.stderr
    assert not list(tmp_path.iterdir())
