"""TensorRT: an engine per graph, adapters bound at run time.

Where TensorRT is installed, for this machine's GPU, with our plugins if they were built. With
``--option arch=sm89`` by TensorRT for RTX, ahead of time, for a GPU that need not be here.
"""

from __future__ import annotations

import copy
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lora_speech.errors import SpeechError
from lora_speech.export.companions import decoding_of, write_adapters, write_companions
from lora_speech.export.engine_decoding import ENGINES, ahead_of_time, open_engines
from lora_speech.export.graph_inputs import make_graphs
from lora_speech.export.graphs import Graph
from lora_speech.export.onnx_graphs import write_onnx
from lora_speech.export.target import Plan, Recognizer, Say, Target, whole_number
from lora_speech.export.targets.onnx import open_graphs
from lora_speech.files import write_json

ONNX = "onnx"
TRTEXEC = "trtexec.sh"
_PRECISIONS = {"fp16": torch.float16, "fp32": torch.float32}


def _ready(options: Mapping[str, str]) -> None:
    from lora_kernels.export.tensorrt import RTX_TARGETS
    from lora_kernels.export.tensorrt_model import load_tensorrt, load_tensorrt_rtx

    arch, precision = options.get("arch"), options.get("precision", "fp16")
    if arch is not None and arch not in RTX_TARGETS:
        raise SpeechError(
            f"--option arch: expected one of {', '.join(RTX_TARGETS)}, got {arch!r}; leave it out "
            "to build for this machine's GPU"
        )
    if precision not in _PRECISIONS:
        raise SpeechError(
            f"--option precision: expected one of {', '.join(_PRECISIONS)}, got {precision!r}; "
            "leave it out for fp16"
        )
    for name in ("max_batch", "max_rank"):
        _number(options, name)
    cache = options.get("timing_cache")
    if cache is not None and arch is not None:
        raise SpeechError(
            f"--option timing_cache: expected none with arch, got {cache}: TensorRT for RTX keeps "
            "none; leave it out"
        )
    if cache is not None and not Path(cache).absolute().parent.is_dir():
        raise SpeechError(
            f"--option timing_cache: expected a file in a folder that is there, got {cache}; make "
            "the folder first"
        )
    if arch is None:
        load_tensorrt()
    else:
        load_tensorrt_rtx()


def _fits(plan: Plan) -> None:
    from lora_kernels import get_adapter
    from lora_kernels.export.tensorrt_model import find_plugin_library, load_tensorrt

    ranks: dict[str, int] = {}
    for name in plan.live:
        for linear, layer in get_adapter(plan.model.model, name).layers.items():
            ranks[linear] = ranks.get(linear, 0) + layer.rank
    most = max(ranks.values(), default=0)
    if most > _number(plan.options, "max_rank"):
        raise SpeechError(
            f"--option max_rank: expected at least {most}, the rank rows of all adapters together, "
            f"got {_number(plan.options, 'max_rank')}; raise it"
        )
    standard = "arch" in plan.options or find_plugin_library(load_tensorrt()) is None
    if plan.int8 and standard:
        raise SpeechError(
            "--int8: expected TensorRT with this package's plugins, which compute INT8 layers, got "
            f"{'TensorRT for RTX, which takes none' if 'arch' in plan.options else 'none built'}; "
            "leave it out, or build the plugins (docs/tensorrt.md)"
        )


def _number(options: Mapping[str, str], name: str) -> int:
    return whole_number(options, name, {"max_batch": 8, "max_rank": 256}[name])


def _profile(plan: Plan, graph: Graph) -> dict[str, Any]:
    """Least, usual and most sizes of each input; ranks are those of all adapters together."""
    batch, most = _number(plan.options, "max_batch"), _number(plan.options, "max_rank")
    decoding = decoding_of(plan)
    profile: dict[str, Any] = {}
    least = graph.sizes(1, 1)
    usual = graph.sizes(1, len(decoding.prompt) if graph.open_sizes else 1)
    largest = graph.sizes(batch, decoding.positions // 2 if graph.open_sizes else 1)
    for name, *sizes in zip(graph.inputs, least, usual, largest, strict=True):
        profile[name] = tuple(shape for shape, _ in sizes)
    for name in graph.adapter_inputs:
        linear, _, kind = name.rpartition(".")
        if not linear:
            profile[name] = ((1,), (1,), (batch,))
        elif kind == "offsets":
            profile[name] = ((2,), (1 + len(plan.live),), (1 + max(64, len(plan.live)),))
        else:
            width = graph.width(linear, kind)
            profile[name] = ((1, width), (min(most, 16 * len(plan.live)), width), (most, width))
    return profile


def _write(plan: Plan, folder: Path, say: Say) -> None:
    from lora_kernels.export.tensorrt import build_engine

    precision = plan.options.get("precision", "fp16")
    whisper = copy.deepcopy(plan.model.model).to(_PRECISIONS[precision])
    (folder / ONNX).mkdir()
    graphs, decoding = make_graphs(plan, model=whisper)
    write_onnx(graphs, folder / ONNX, say)
    write_adapters(plan, folder / ONNX)
    write_companions(plan, folder / ONNX, decoding)
    cache = plan.options.get("timing_cache")
    lines = []
    for name, graph in graphs.items():

        def progress(phase: str, step: int, steps: int, name: str = name) -> None:
            say(f"building {name}: {phase} {step}/{steps}")

        say(f"building {name}")
        report = build_engine(
            folder / ONNX / f"{name}.onnx",
            folder / f"{name}.engine",
            profiles=_profile(plan, graph),
            precision=precision,
            target=plan.options.get("arch"),
            timing_cache=None if cache is None else Path(cache).absolute(),
            progress=progress,
        )
        lines.append(report.trtexec.replace(f"{folder}{os.sep}", ""))
    write_json(folder / ENGINES, {"built_by": report.builder, "arch": plan.options.get("arch")})
    if any(lines):
        head = '#!/bin/sh\n# Builds these engines again.\nset -e; cd "$(dirname "$0")"\n'
        (folder / TRTEXEC).write_text(head + "\n".join(lines) + "\n", encoding="utf-8")
        (folder / TRTEXEC).chmod(0o755)


def _open(folder: Path) -> Recognizer:
    """The engines where they can run; ahead of time, the graphs they were built from."""
    return open_graphs(folder / ONNX) if ahead_of_time(folder) else open_engines(folder)


def _usage(folder: Path) -> str:
    if not ahead_of_time(folder):
        lines = (folder / TRTEXEC).read_text(encoding="utf-8").splitlines()[3:]
        return "\n".join([f"cd {shlex.quote(str(folder))}", *lines])
    return (
        "engines were built and not run: that needs the GPU they are for, and there\n"
        f"python examples/transcribe_engine.py {shlex.quote(str(folder))} talk.wav\n"
        f"Compared with torch were the graphs in {folder / ONNX}, run by ONNX Runtime."
    )


TARGET = Target(
    name="tensorrt",
    write=_write,
    open=_open,
    live=True,
    int8="ours",
    packages=("onnx", "onnxscript", "onnxruntime"),
    extra="tensorrt",
    options={
        "arch": "sm75, sm80, sm86, sm89 or sm120: ahead of time, by TensorRT for RTX",
        "precision": "fp16 or fp32; fp16 by default",
        "max_batch": "utterances at once at most; 8 by default",
        "max_rank": "rank rows of all adapters together at most; 256 by default",
        "timing_cache": "a file that makes later builds shorter",
    },
    ready=_ready,
    fits=_fits,
    usage=_usage,
)
