"""Greedy decoding over TensorRT engines, without torch: caches and adapters stay on the device."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_speech.export.folder import Decoding, read_banks, read_decoding
from lora_speech.export.graph_decoding import GraphRecognizer

NAMES = ("encode", "prefill", "step")
ENGINES = "engines.json"


def ahead_of_time(folder: Path) -> bool:
    """Whether TensorRT for RTX built the engines of a folder, for an `arch` that it names."""
    path = folder / ENGINES
    return path.is_file() and json.loads(path.read_text(encoding="utf-8"))["arch"] is not None


def open_engines(
    folder: Path, companions: Path | None = None, load: Callable[[Path], Any] | None = None
) -> GraphRecognizer:
    """Load the engines that `lora-speech export --to tensorrt` wrote.

    Parameters
    ----------
    folder : Path
        Holds ``encode.engine``, ``prefill.engine`` and ``step.engine``.
    companions : Path, optional
        Holds `decoding.json` and the adapters; ``FOLDER/onnx`` by default.
    load : callable, optional
        Makes a runner of an engine's path; `EngineRunner`s that share memory by default.

    Returns
    -------
    GraphRecognizer
    """
    from lora_kernels.export.tensorrt_runner import EngineRunner, cuda_memory

    companions = companions or folder / "onnx"
    if load is None:
        memory, rtx = cuda_memory(), ahead_of_time(folder)

        def load(path: Path) -> Any:
            return EngineRunner(path, memory=memory, rtx=rtx)

    runners = {name: load(folder / f"{name}.engine") for name in NAMES}
    decoding = read_decoding(companions)
    assert isinstance(decoding, Decoding)
    shapes = [(name, runner.shapes[name]) for runner in runners.values() for name in runner.inputs]
    adapters = read_banks(companions, decoding.live, shapes)
    engines = {name: _Engine(runner) for name, runner in runners.items()}
    return GraphRecognizer(decoding, lambda name, inputs: engines[name](inputs), adapters)


class _Engine:
    """A runner whose outputs, but the logits, and whose adapters stay on the device."""

    def __init__(self, runner: Any) -> None:
        self.runner = runner
        self.kept = [name for name in runner.outputs if name != "logits"]
        self.adapters: dict[str, tuple[np.ndarray, Any]] = {}

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        runner, feeds = self.runner, {}
        for name in runner.inputs:
            value = inputs[name]
            if isinstance(value, np.ndarray):
                converted = value.astype(runner.types[name], copy=False)
                value = self._placed(name, value, converted) if "lora_" in name else converted
            feeds[name] = value
        return dict(runner(feeds, keep=self.kept))

    def _placed(self, name: str, given: np.ndarray, converted: np.ndarray) -> Any:
        """A bank on the device, copied when it is first seen."""
        from lora_kernels.export.tensorrt_runner import DeviceArray

        known = self.adapters.get(name)
        if known is None or known[0] is not given:
            array = DeviceArray(self.runner.memory, converted.shape, converted.dtype)
            array.set(converted)
            known = self.adapters[name] = (given, array)
        return known[1]
