"""Runs an engine on buffers of cuda-python or PyCUDA, without torch.

Nothing here has run on a GPU in this project's own tests: they put the host's memory in the place
of a device's.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..errors import LoraKernelsError, describe_nearest
from .tensorrt_model import (
    aliases_path,
    find_plugin_library,
    load_tensorrt,
    load_tensorrt_rtx,
)


class Memory(Protocol):
    """The few calls of CUDA that a runner makes; addresses and streams are integers."""

    stream: int

    def allocate(self, size: int) -> int:
        """An address of ``size`` bytes on the device."""

    def free(self, address: int) -> None:
        """Gives back what :meth:`allocate` gave."""

    def to_device(self, address: int, array: np.ndarray) -> None:
        """Copies on the stream; ``array`` is contiguous."""

    def to_host(self, array: np.ndarray, address: int) -> None:
        """Copies on the stream; ``array`` is contiguous."""

    def synchronize(self) -> None:
        """Waits until the stream has done everything."""


class CudaPythonMemory:
    """:class:`Memory` by ``cuda-python`` (the package ``cuda-bindings``)."""

    def __init__(self) -> None:
        self._cuda = import_module("cuda.bindings.runtime")
        self.stream = int(self._done(self._cuda.cudaStreamCreate()))

    def _done(self, result: tuple[Any, ...]) -> Any:
        code, *values = result
        if int(code) != 0:
            _, text = self._cuda.cudaGetErrorString(code)
            said = text.decode() if isinstance(text, bytes) else str(text)
            raise LoraKernelsError(f"CUDA: {code.name}: {said}")
        return values[0] if values else None

    def allocate(self, size: int) -> int:
        """An address of ``size`` bytes on the device."""
        return int(self._done(self._cuda.cudaMalloc(max(size, 1))))

    def free(self, address: int) -> None:
        """Gives back what :meth:`allocate` gave."""
        self._done(self._cuda.cudaFree(address))

    def _copy(self, to: int, source: int, size: int, kind: str) -> None:
        direction = getattr(self._cuda.cudaMemcpyKind, kind)
        self._done(self._cuda.cudaMemcpyAsync(to, source, size, direction, self.stream))

    def to_device(self, address: int, array: np.ndarray) -> None:
        """Copies on the stream."""
        self._copy(address, array.ctypes.data, array.nbytes, "cudaMemcpyHostToDevice")

    def to_host(self, array: np.ndarray, address: int) -> None:
        """Copies on the stream."""
        self._copy(array.ctypes.data, address, array.nbytes, "cudaMemcpyDeviceToHost")

    def synchronize(self) -> None:
        """Waits until the stream has done everything."""
        self._done(self._cuda.cudaStreamSynchronize(self.stream))


class PyCudaMemory:
    """:class:`Memory` by PyCUDA, in the primary context of device 0."""

    def __init__(self) -> None:
        import_module("pycuda.autoprimaryctx")
        self._cuda = import_module("pycuda.driver")
        self._stream = self._cuda.Stream()
        self.stream = int(self._stream.handle)
        self._allocations: dict[int, Any] = {}

    def allocate(self, size: int) -> int:
        """An address of ``size`` bytes on the device."""
        allocation = self._cuda.mem_alloc(max(size, 1))
        self._allocations[int(allocation)] = allocation
        return int(allocation)

    def free(self, address: int) -> None:
        """Gives back what :meth:`allocate` gave."""
        self._allocations.pop(address).free()

    def to_device(self, address: int, array: np.ndarray) -> None:
        """Copies on the stream."""
        self._cuda.memcpy_htod_async(address, array, self._stream)

    def to_host(self, array: np.ndarray, address: int) -> None:
        """Copies on the stream."""
        self._cuda.memcpy_dtoh_async(array, address, self._stream)

    def synchronize(self) -> None:
        """Waits until the stream has done everything."""
        self._stream.synchronize()


def cuda_memory() -> Memory:
    """The first of cuda-python and PyCUDA that is installed.

    Raises
    ------
    LoraKernelsError
        If neither is.
    """
    for kind in (CudaPythonMemory, PyCudaMemory):
        try:
            return kind()
        except ModuleNotFoundError:
            continue
    raise LoraKernelsError(
        "cuda-python: expected it or PyCUDA to be installed, found neither; "
        "pip install 'cuda-bindings>=12.6'"
    )


class DeviceArray:
    """An array that stays on the device: a key-value cache between steps, an adapter bank.

    Parameters
    ----------
    memory
        Where it lives.
    shape, dtype
        What it is.
    """

    def __init__(self, memory: Memory, shape: tuple[int, ...], dtype: Any) -> None:
        self.memory, self.shape, self.dtype = memory, tuple(shape), np.dtype(dtype)
        self.nbytes = int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize
        self.address = memory.allocate(self.nbytes)

    def __del__(self) -> None:
        address = self.__dict__.pop("address", None)
        if address is not None:
            self.memory.free(address)

    def set(self, array: np.ndarray) -> None:
        """Copies an array of this shape and dtype to the device."""
        if array.shape != self.shape or array.dtype != self.dtype:
            raise LoraKernelsError(
                f"array: expected {self.dtype} {list(self.shape)}, got {array.dtype} "
                f"{list(array.shape)}"
            )
        contiguous = np.ascontiguousarray(array)
        self.memory.to_device(self.address, contiguous)
        self.memory.synchronize()  # the copy has read it

    def get(self) -> np.ndarray:
        """A copy on the host."""
        array = np.empty(self.shape, self.dtype)
        self.memory.to_host(array, self.address)
        self.memory.synchronize()
        return array


def _numpy_type(trt: Any, dtype: Any) -> np.dtype:
    if dtype == trt.bfloat16:
        return np.dtype(import_module("ml_dtypes").bfloat16)
    return np.dtype(trt.nptype(dtype))


class EngineRunner:
    """An engine with its buffers.

    Parameters
    ----------
    engine_path
        What :func:`~lora_kernels.export.tensorrt.build_engine` wrote.
    plugin_library
        The plugins it was built with; None: those of this package, if they were built.
    memory
        None: :func:`cuda_memory`.
    rtx
        It was built ahead of time, by TensorRT for RTX, whose runtime then runs it.

    Attributes
    ----------
    inputs, outputs
        Names.
    types, shapes
        Of each tensor by name; -1 is an open size.
    aliases
        Input by output, of caches that are appended to in place.

    Raises
    ------
    LoraKernelsError
        If TensorRT or a CUDA binding is missing, or the engine cannot be read: it was built by
        another version, for another GPU, or with plugins that are not loaded.
    """

    def __init__(
        self,
        engine_path: str | Path,
        *,
        plugin_library: str | Path | None = None,
        memory: Memory | None = None,
        rtx: bool = False,
    ) -> None:
        if rtx and plugin_library is not None:
            raise LoraKernelsError(
                "plugin_library: expected None with rtx, TensorRT for RTX takes no plugins, got "
                f"{plugin_library}; leave it out"
            )
        trt = self._trt = load_tensorrt_rtx() if rtx else load_tensorrt()
        path = Path(engine_path)
        if not path.is_file():
            raise LoraKernelsError(f"engine_path: expected a file, {path} is none")
        self.memory = memory or cuda_memory()
        self._logger = trt.Logger(trt.Logger.WARNING)
        runtime = trt.Runtime(self._logger)
        library = None if rtx else plugin_library or find_plugin_library(trt)
        if library is not None:
            runtime.get_plugin_registry().load_library(str(library))
        engine = runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            name = "TensorRT for RTX" if rtx else "TensorRT"
            raise LoraKernelsError(
                f"engine_path: {name} {trt.__version__} cannot read {path}; "
                "engines belong to the version that built them, to the GPU they were built for, "
                "and to their plugins (plugin_library), and those built ahead of time to TensorRT "
                "for RTX (rtx): build it again here"
            )
        self._runtime, self._engine = runtime, engine
        self._context = engine.create_execution_context()
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        kinds = {name: engine.get_tensor_mode(name) for name in names}
        self.inputs = [n for n in names if kinds[n] == trt.TensorIOMode.INPUT]
        self.outputs = [n for n in names if n not in self.inputs]
        self.types = {name: _numpy_type(trt, engine.get_tensor_dtype(name)) for name in names}
        self.shapes = {name: tuple(engine.get_tensor_shape(name)) for name in names}
        beside = aliases_path(path)
        self.aliases: dict[str, str] = (
            json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
        )
        self._buffers: dict[str, DeviceArray] = {}
        self._profile = 0

    def _choose_profile(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """The first profile that covers these shapes; the present one is asked first."""
        engine = self._engine
        others = [i for i in range(engine.num_optimization_profiles) if i != self._profile]
        first: str | None = None
        for profile in (self._profile, *others):
            reason = None
            for name, shape in shapes.items():
                least, _, most = (tuple(s) for s in engine.get_tensor_profile_shape(name, profile))
                fits = len(shape) == len(least) and all(
                    low <= size <= high for low, size, high in zip(least, shape, most, strict=True)
                )
                if not fits:
                    reason = (
                        f"{name}: expected {list(least)} to {list(most)}, got {list(shape)}; send "
                        "less at once, or build the engine with a profile that covers it"
                    )
                    break
            if reason is None:
                if profile != self._profile:
                    self._context.set_optimization_profile_async(profile, self.memory.stream)
                    self._profile = profile
                return
            first = first or reason
        raise LoraKernelsError(first or "the engine has no profile")

    def _buffer(self, name: str, shape: tuple[int, ...]) -> DeviceArray:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != shape:
            buffer = self._buffers[name] = DeviceArray(self.memory, shape, self.types[name])
        return buffer

    def _target(
        self, name: str, shape: tuple[int, ...], placed: Mapping[str, DeviceArray]
    ) -> DeviceArray:
        """Memory of an output that the caller gave none for."""
        alias = self.aliases.get(name)
        return placed[alias] if alias else self._buffer(name, shape)

    def __call__(
        self,
        inputs: Mapping[str, np.ndarray | DeviceArray],
        outputs: Mapping[str, DeviceArray] | None = None,
        keep: Collection[str] = (),
    ) -> dict[str, Any]:
        """One pass.

        Parameters
        ----------
        inputs
            By name. What is on the device is read there.
        outputs
            Memory of the caller's for some outputs, which then stay on the device. A cache that is
            appended to in place is the same :class:`DeviceArray` in both.
        keep
            Names of outputs that stay on the device, in memory of their own, or in that of the
            input that they continue in place.

        Returns
        -------
        dict
            What was kept, as :class:`DeviceArray`, and the outputs that ``outputs`` does not name,
            on the host.

        Raises
        ------
        LoraKernelsError
            If an input is missing, unknown, of another type, or not covered by a profile, or the
            engine fails.
        """
        bound = dict(outputs or {})
        for name in (*inputs, *bound):
            if name not in self.types:
                raise LoraKernelsError(
                    f"{name!r} is no tensor of the engine; {describe_nearest(name, self.types)}"
                )
        missing = [name for name in self.inputs if name not in inputs]
        if missing:
            raise LoraKernelsError(f"inputs: expected {', '.join(missing)} as well, got none")
        for name, value in inputs.items():
            if value.dtype != self.types[name]:
                raise LoraKernelsError(
                    f"{name}: expected {self.types[name]}, got {value.dtype}; convert it"
                )
        self._choose_profile({name: tuple(inputs[name].shape) for name in self.inputs})
        arrays: list[np.ndarray] = []  # alive until the stream has read them
        placed: dict[str, DeviceArray] = {}
        for name in self.inputs:
            value = inputs[name]
            if not isinstance(value, DeviceArray):
                arrays.append(np.ascontiguousarray(value))
                device = self._buffer(name, value.shape)
                self.memory.to_device(device.address, arrays[-1])
                value = device
            placed[name] = value
            self._context.set_input_shape(name, value.shape)
            self._context.set_tensor_address(name, value.address)
        results: dict[str, np.ndarray] = {}
        kept: dict[str, DeviceArray] = {}
        sources: dict[str, int] = {}
        for name in self.outputs:
            shape = tuple(self._context.get_tensor_shape(name))
            if name in keep and name not in bound:
                alias = self.aliases.get(name)
                new = placed[alias] if alias else DeviceArray(self.memory, shape, self.types[name])
                if alias:  # it is the caller's from now on, wherever it came from
                    self._buffers.pop(alias, None)
                bound[name] = kept[name] = new
            target = bound.get(name) or self._target(name, shape, placed)
            if target.shape != shape or target.dtype != self.types[name]:
                raise LoraKernelsError(
                    f"outputs: {name}: expected {self.types[name]} {list(shape)}, got "
                    f"{target.dtype} {list(target.shape)}"
                )
            self._context.set_tensor_address(name, target.address)
            if name not in bound:
                results[name] = np.empty(shape, self.types[name])
                sources[name] = target.address
        if not self._context.execute_async_v3(self.memory.stream):
            raise LoraKernelsError(
                "the engine failed; what a plugin refused stands on standard error"
            )
        for name, array in results.items():
            self.memory.to_host(array, sources[name])
        self.memory.synchronize()
        return {**kept, **results}
