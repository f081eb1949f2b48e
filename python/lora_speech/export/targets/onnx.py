"""ONNX: three files that ONNX Runtime runs as they are, and TensorRT with our plugins."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_speech.export.companions import write_adapters, write_companions
from lora_speech.export.ctc_decoding import CtcRecognizer
from lora_speech.export.folder import CtcDecoding, read_banks, read_decoding
from lora_speech.export.graph_decoding import Arrays, GraphRecognizer
from lora_speech.export.graph_inputs import STEP_SIZES, make_graphs
from lora_speech.export.onnx_graphs import write_onnx
from lora_speech.export.target import Plan, Say, Target, whole_number

_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
}


def _write(plan: Plan, folder: Path, say: Say) -> None:
    graphs, decoding = make_graphs(plan)
    write_onnx(graphs, folder, say)
    write_adapters(plan, folder)
    write_companions(plan, folder, decoding)


def open_graphs(folder: Path) -> GraphRecognizer | CtcRecognizer:
    """The files of a folder in ONNX Runtime, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    sessions = {
        path.stem: onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        for path in sorted(folder.glob("*.onnx"))
    }
    wanted = {
        name: {i.name: _TYPES[i.type] for i in session.get_inputs()}
        for name, session in sessions.items()
    }
    given = {name: [o.name for o in session.get_outputs()] for name, session in sessions.items()}
    shapes = [(i.name, i.shape) for session in sessions.values() for i in session.get_inputs()]
    decoding = read_decoding(folder)

    def run(name: str, inputs: Arrays) -> Mapping[str, np.ndarray]:
        feeds: Any = {
            key: inputs[key].astype(kind, copy=False) for key, kind in wanted[name].items()
        }
        return dict(zip(given[name], sessions[name].run(None, feeds), strict=True))

    adapters = read_banks(folder, decoding.live, shapes)
    if isinstance(decoding, CtcDecoding):
        return CtcRecognizer(decoding, run, adapters)
    return GraphRecognizer(decoding, run, adapters)


def _ready(options: Mapping[str, str]) -> None:
    for name, default in STEP_SIZES.items():
        whole_number(options, name, default)


def _usage(folder: Path) -> str:
    names = ", ".join(path.name for path in sorted(folder.glob("*.onnx")))
    return f"{names} in ONNX Runtime: inputs and outputs are explained in docs/export_onnx.md"


TARGET = Target(
    name="onnx",
    write=_write,
    open=open_graphs,
    live=True,
    int8="ours",
    objectives=("sequence", "ctc"),
    packages=("onnx", "onnxscript", "onnxruntime"),
    options={
        "chunk": "of a streaming step of Parakeet, positions of 80 ms; 16 by default",
        "left": "positions that a streaming step sees behind it; 64 by default",
    },
    ready=_ready,
    usage=_usage,
)
