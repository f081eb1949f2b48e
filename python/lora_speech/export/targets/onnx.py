"""ONNX: three files that ONNX Runtime runs as they are, and TensorRT with our plugins."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lora_speech.export.companions import write_adapters, write_companions
from lora_speech.export.folder import Decoding, banks, input_sizes, read_adapters
from lora_speech.export.graph_decoding import Arrays, GraphRecognizer
from lora_speech.export.onnx_graphs import GRAPHS, write_onnx
from lora_speech.export.target import Plan, Say, Target

_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
}


def _write(plan: Plan, folder: Path, say: Say) -> None:
    write_onnx(plan, folder, say)
    write_adapters(plan, folder)
    write_companions(plan, folder)


def open_graphs(folder: Path) -> GraphRecognizer:
    """The files of a folder in ONNX Runtime, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    sessions = {
        name: onnxruntime.InferenceSession(
            str(folder / f"{name}.onnx"), options, providers=["CPUExecutionProvider"]
        )
        for name in GRAPHS
    }
    wanted = {
        name: {i.name: _TYPES[i.type] for i in session.get_inputs()}
        for name, session in sessions.items()
    }
    given = {name: [o.name for o in session.get_outputs()] for name, session in sessions.items()}
    shapes = [(i.name, i.shape) for session in sessions.values() for i in session.get_inputs()]
    decoding = Decoding.read(folder)

    def run(name: str, inputs: Arrays) -> Mapping[str, np.ndarray]:
        feeds = {key: inputs[key].astype(kind, copy=False) for key, kind in wanted[name].items()}
        return dict(zip(given[name], sessions[name].run(None, feeds), strict=True))

    adapters = banks(read_adapters(folder, decoding.live), input_sizes(shapes))
    return GraphRecognizer(decoding, run, adapters)


def _usage(folder: Path) -> str:
    return (
        f"onnxruntime.InferenceSession('{folder}/step.onnx')   # encode, prefill, step: "
        "docs/export.md"
    )


TARGET = Target(
    name="onnx",
    write=_write,
    open=open_graphs,
    live=True,
    int8="ours",
    packages=("onnx", "onnxscript", "onnxruntime"),
    usage=_usage,
)
