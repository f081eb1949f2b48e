"""The raw module on addresses of CUDA tensors, on torch's stream: the torch operators' bits."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from attention_steps import Step, int32, make_blocked_step, make_step
from raw_calls import Raw
from relative_steps import Chunk, make_chunk

from lora_kernels import ops, reference
from lora_kernels.ops._dispatch import has_cuda

ROOT = Path(__file__).resolve().parents[2]
BUILT = ROOT / "build" / "raw"  # where examples/raw_lora_linear.py says


def _module() -> ModuleType | str:
    """The raw module, or why it is not there."""
    if not torch.cuda.is_available():
        return "no GPU"
    if not has_cuda(torch.ops.lora_kernels.lora_linear.default):
        return "the library was built without its CUDA kernels (LORA_KERNELS_CUDA=ON)"
    if importlib.util.find_spec("_raw") is None:
        sys.path.append(str(BUILT))
    try:
        module = importlib.import_module("_raw")
        module.cuda_device(0)
    except (ImportError, RuntimeError) as cause:
        return f"no _raw with CUDA kernels ({cause}); build it as examples/raw_lora_linear.py says"
    return module


MODULE = _module()
pytestmark = pytest.mark.skipif(isinstance(MODULE, str), reason=str(MODULE))


@pytest.fixture(params=["default stream", "a stream"])
def raw(request: pytest.FixtureRequest) -> Iterator[Raw]:
    stream = torch.cuda.Stream() if request.param == "a stream" else torch.cuda.default_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield Raw(MODULE, MODULE.cuda_device(0), torch.cuda.current_stream().cuda_stream)


def there(dtype: torch.dtype, *shapes: tuple[int, int]) -> list[torch.Tensor]:
    return [torch.randn(shape).to("cuda", dtype) for shape in shapes]


def assert_same_bits(got: object, want: object) -> None:
    tensors = [[t] if isinstance(t, torch.Tensor) else list(t) for t in (got, want)]
    for ours, theirs in zip(*tensors, strict=True):
        assert torch.equal(ours.flatten().nan_to_num(77), theirs.flatten().nan_to_num(77))


DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.float32])


@DTYPES
@pytest.mark.parametrize("rows", [3, 300])
def test_linear(raw: Raw, dtype: torch.dtype, rows: int) -> None:
    x, w, a, b = there(dtype, (rows, 136), (264, 136), (8, 136), (8, 264))
    assert_same_bits(raw.lora_linear(x, w, a, b), ops.lora_linear(x, w, lora_a=a, lora_b=b))
    (dy,) = there(dtype, (rows, 264))
    none = (None, None, None)
    dx, _, _, da, db = torch.ops.lora_kernels.lora_linear_backward(
        dy, x, w, a, b, *none, 0.0, None, True, False, False, True
    )
    ours = raw.lora_linear_backward(dy, x, w, a, b)
    assert_same_bits([t.to(dtype) for t in ours], [t.to(dtype) for t in (dx, da, db)])


@DTYPES
@pytest.mark.parametrize("rows", [3, 300])
def test_int8(raw: Raw, dtype: torch.dtype, rows: int) -> None:
    x, a, b = there(dtype, (rows, 136), (8, 136), (8, 264))
    packed = ops.int8_pack(*reference.quantize_weight(torch.randn(264, 136))).cuda()
    want = ops.int8_lora_linear(x, packed, 264, lora_a=a, lora_b=b)
    assert_same_bits(raw.int8_lora_linear(x, packed, 264, a, b), want)
    assert_same_bits(raw.int8_unpack(packed, 264, 136), ops.int8_unpack(packed, 264, 136))


def steps(dtype: torch.dtype) -> list[Step]:
    return [
        make_step(tokens=2, dtype=dtype, slots=int32(2, 0, 1), chosen=[1]),
        make_step(dtype=dtype, slots="per position"),
        make_step(dtype=dtype, cache_dtype=torch.int8),
        make_blocked_step(dtype=dtype, positions=70),
    ]


@DTYPES
def test_attention(raw: Raw, dtype: torch.dtype) -> None:
    for step in steps(dtype):
        ours, theirs = step.to("cuda"), step.to("cuda")
        assert_same_bits(ours.run(raw.kv_attention_step), theirs.run())
        assert_same_bits(ours.caches(), theirs.caches())


@DTYPES
def test_packed_states(raw: Raw, dtype: torch.dtype) -> None:
    k, v = torch.randn(2, 37, 2 * 3 * 20).to("cuda", dtype).split(3 * 20, dim=2)
    assert_same_bits(raw.kv_pack(k, v, 3), ops.kv_pack(k, v, 3))


@DTYPES
def test_chunks(raw: Raw, dtype: torch.dtype) -> None:
    chunk = make_chunk(counts=int32(5, 2, 0), slots=int32(3, 0, 1), rings=4, dtype=dtype).poison()
    to_gpu: Callable[[object], object] = lambda x: x.cuda() if torch.is_tensor(x) else x  # noqa: E731
    ours, theirs = (Chunk(*map(to_gpu, chunk.clone().arguments())) for _ in range(2))
    assert_same_bits(ours.run(raw.kv_relative_step), theirs.run())
    assert_same_bits(ours.caches(), theirs.caches())


def test_pycuda() -> None:
    """The example on PyCUDA's arrays, in the primary context, where PyCUDA is installed."""
    pytest.importorskip("pycuda")
    path = os.pathsep.join([str(BUILT), *filter(None, [os.environ.get("PYTHONPATH")])])
    run = subprocess.run(
        [sys.executable, ROOT / "examples" / "raw_lora_linear.py"],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "PyCUDA: lora_linear" in run.stdout, run.stdout
