"""lora_linear without torch: addresses and a stream, on PyCUDA's arrays or numpy's.

Build the module first, once for each Python (pybind11, its headers, comes with torch)::

    cmake -S . -B build/raw -DLORA_KERNELS_RAW=ON -DLORA_KERNELS_CUDA=ON
    cmake --build build/raw --target _raw
    PYTHONPATH=build/raw python examples/raw_lora_linear.py

Without PyCUDA, or without a GPU, the part on the GPU says so and is left out.
"""

from __future__ import annotations

import numpy as np

import _raw as raw  # type: ignore[import-not-found]  # isort: skip

ROWS, IN, OUT, RANK = 32, 1280, 1280, 16


def problem(dtype: raw.DType) -> raw.LoraLinearProblem:
    lora = raw.LoraShape(adapters=1, total_rank=RANK, max_rank=RANK, dtype=dtype)
    return raw.LoraLinearProblem(
        rows=ROWS, in_features=IN, out_features=OUT, dtype=dtype, lora=lora
    )


def operands(dtype: type) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0).standard_normal
    return {
        "x": draw((ROWS, IN)).astype(dtype),
        "weight": (draw((OUT, IN)) / IN**0.5).astype(dtype),
        "lora_a": (draw((RANK, IN)) / IN**0.5).astype(dtype),
        "lora_b": draw((OUT, RANK)).astype(dtype),  # PEFT's B: read with strides, not copied
        "scales": np.array([2.0], dtype=np.float32),
    }


STRIDES = dict(x_stride=IN, weight_stride=IN, a_stride=IN, b_stride_rank=1, b_stride_out=RANK)


def expected(o: dict[str, np.ndarray]) -> np.ndarray:
    x, w, a, b = (o[name].astype(np.float64) for name in ("x", "weight", "lora_a", "lora_b"))
    return x @ w.T + 2.0 * (x @ a.T) @ b.T


def error(y: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(y - want).max() / np.abs(want).max())


def on_numpy() -> None:
    o, y = operands(np.float32), np.empty((ROWS, OUT), np.float32)
    plan = raw.plan(problem(raw.DType.float32), raw.host_device())
    workspace = np.empty(plan.workspace_bytes + 64, np.uint8)
    aligned = workspace.ctypes.data + -workspace.ctypes.data % 64
    addresses = {name: array.ctypes.data for name, array in o.items()}
    raw.run(plan, **addresses, **STRIDES, y=y.ctypes.data, workspace=aligned)
    print(f"numpy:  {plan}\n        relative error {error(y, expected(o)):.1e}")
    assert error(y, expected(o)) < 1e-5


def on_pycuda() -> None:
    try:
        import pycuda.autoprimaryctx  # noqa: F401 - the context that the runtime launches into
        import pycuda.driver as driver
        from pycuda import gpuarray
    except Exception as cause:  # its import fails in several ways where there is no driver
        print(f"PyCUDA: skipped, it is not installed or found no GPU ({cause})")
        return
    o, stream = operands(np.float16), driver.Stream()
    there = {name: gpuarray.to_gpu_async(array, stream=stream) for name, array in o.items()}
    y = gpuarray.empty((ROWS, OUT), np.float16)
    plan = raw.plan(problem(raw.DType.float16), raw.cuda_device(0))
    workspace = driver.mem_alloc(max(plan.workspace_bytes, 1))
    addresses = {name: int(array.gpudata) for name, array in there.items()}
    raw.run(
        plan,
        **addresses,
        **STRIDES,
        y=int(y.gpudata),
        workspace=int(workspace),
        stream=stream.handle,
    )
    stream.synchronize()
    print(f"PyCUDA: {plan}\n        relative error {error(y.get(), expected(o)):.1e}")
    assert error(y.get(), expected(o)) < 5e-3


if __name__ == "__main__":
    on_numpy()
    on_pycuda()
