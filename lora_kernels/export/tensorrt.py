"""TensorRT engines of exported models, where TensorRT or TensorRT for RTX is installed.

With TensorRT, the nodes of the domain ``lora_kernels`` are our plugins. TensorRT for RTX takes no
plugins, and builds on a machine without a GPU for the architecture that it is told: there, and
where no plugin library was built, the nodes' bodies in standard operators take their place.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import LoraKernelsError, UnsupportedError
from .tensorrt_model import (
    Profile,
    aliases_path,
    check_precision,
    check_profile,
    find_plugin_library,
    load_tensorrt,
    load_tensorrt_rtx,
    prepare,
    trtexec_command,
)

Progress = Callable[[str, int, int], "bool | None"]

# Architectures that TensorRT for RTX builds for ahead of time.
RTX_TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120")


@dataclass(frozen=True)
class EngineReport:
    """What :func:`build_engine` made.

    Attributes
    ----------
    engine, bytes, seconds
        The file, its size, and how long the build took.
    builder
        "TensorRT 10.16.1.11" or "TensorRT for RTX 1.7.1.116".
    target
        The architecture that was named, or None: this machine's.
    plugins
        Nodes that run as plugins, by name, with their number.
    standard
        Nodes that became standard operators, by name, with their number.
    model
        The ONNX file that the builder read; beside the engine where it is not the given one.
    trtexec
        A shell command that builds the same engine; "" for RTX.
    """

    engine: Path
    bytes: int
    seconds: float
    builder: str
    target: str | None
    plugins: dict[str, int] = field(default_factory=dict)
    standard: dict[str, int] = field(default_factory=dict)
    model: Path = Path()
    trtexec: str = ""


@contextmanager
def _workplace(engine: Path) -> Iterator[Path]:
    """A folder beside the engine that is gone afterwards, and a full disk by its name."""
    engine.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".building-", dir=engine.parent))
    try:
        yield folder
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise LoraKernelsError(
            f"engine_path: no space is left on the disk of {engine.parent} (a build needs about "
            "twice the model's size); free some, or name another folder. Nothing was left behind."
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _logger(trt: Any) -> Any:
    """Keeps what a builder says of errors, so that it can be told with ours."""

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)

    return Logger()


def _monitor(trt: Any, progress: Progress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self.steps[phase] = steps
            progress(phase, 0, steps)

        def step_complete(self, phase: str, step: int) -> bool:
            return progress(phase, step + 1, self.steps.get(phase, 0)) is not False

        def phase_finish(self, phase: str) -> None:
            steps = self.steps.pop(phase, 0)
            progress(phase, steps, steps)

    return Monitor()


def print_progress(phase: str, step: int, steps: int) -> None:
    """A line on standard error that tells how far a build is; for ``progress``."""
    if steps:
        done = 24 * step // steps
        bar = "#" * done + "-" * (24 - done)
        sys.stderr.write(f"\r[{bar}] {step}/{steps} {phase[:40]:<40}")
        sys.stderr.flush()


def build_engine(
    onnx_path: str | Path,
    engine_path: str | Path,
    *,
    profiles: Profile | Sequence[Profile],
    precision: str | None = None,
    plugin_library: str | Path | None = None,
    target: str | None = None,
    timing_cache: str | Path | None = None,
    progress: Progress | None = None,
) -> EngineReport:
    """Build an engine from an exported model.

    Parameters
    ----------
    onnx_path
        A model that went through :func:`lora_kernels.export.finish`. Networks are strongly typed:
        the engine computes in the types of the file.
    engine_path
        Where the engine goes; it replaces what is there when it is complete.
    profiles
        For each input with open sizes its least, usual and most shape; several profiles as a
        sequence. The ranks of adapters that are inputs are sizes like any other.
    precision
        "fp32", "fp16" or "bf16" to insist on the file's type, None to take it as it is.
    plugin_library
        Our plugins; None: those of this package for the TensorRT that is installed, if they were
        built, else standard operators.
    target
        None: TensorRT, for the GPU of this machine. One of ``RTX_TARGETS``: TensorRT for RTX,
        ahead of time, on a machine with or without a GPU.
    timing_cache
        A file that is read, if it is there, and written; builds that follow are shorter.
    progress
        Called with (phase, step, steps); returning False cancels. See :func:`print_progress`.

    Returns
    -------
    EngineReport
        What was built.

    Raises
    ------
    LoraKernelsError
        If TensorRT is missing or of another version, a profile does not fit the model, the build
        fails (with TensorRT's own words), is cancelled, or the disk is full. Nothing is left.
    """
    onnx_path, engine_path = Path(onnx_path), Path(engine_path)
    all_profiles: list[Profile] = [profiles] if isinstance(profiles, Mapping) else list(profiles)
    if not onnx_path.is_file():
        raise LoraKernelsError(f"onnx_path: expected a file, {onnx_path} is none")
    rtx = target is not None
    if target is not None and target not in RTX_TARGETS:
        raise LoraKernelsError(
            f"target: expected None or one of {', '.join(RTX_TARGETS)}, got {target!r}"
        )
    if rtx and plugin_library is not None:
        raise UnsupportedError(
            "plugin_library: expected None for TensorRT for RTX, which takes no plugins; leave it "
            "out, or target=None to build with TensorRT"
        )
    trt = load_tensorrt_rtx() if rtx else load_tensorrt()
    library = Path(plugin_library) if plugin_library else None
    if library is not None and not library.is_file():
        raise LoraKernelsError(
            f"plugin_library: expected a file, {library} is none; build it as docs/tensorrt.md says"
        )
    if library is None and not rtx:
        library = find_plugin_library(trt)
    started = time.perf_counter()
    with _workplace(engine_path) as folder:
        # Under a name of its own: the weights beside it must not be those of the exported model.
        prepared = folder / (engine_path.stem + ".tensorrt.onnx")
        found = prepare(onnx_path, prepared, plugins=library is not None)
        nodes, in_place = found.nodes, bool(found.aliases)
        # What trtexec would read is kept only where the exported file would not do.
        kept = engine_path.with_name(prepared.name) if library and nodes else onnx_path
        serialized, cache = _build(
            trt,
            prepared,
            all_profiles,
            precision,
            library,
            target,
            _read_cache(timing_cache),
            in_place,
            progress,
        )
        built = folder / engine_path.name
        built.write_bytes(memoryview(serialized))
        size = built.stat().st_size
        if cache is not None and timing_cache is not None:
            _replace_file(Path(timing_cache), memoryview(cache))
        if kept != onnx_path:
            for part in (prepared, prepared.with_name(prepared.name + ".data")):
                if part.exists():  # a model without weights has no second file
                    part.replace(kept.with_name(part.name))
        aliases_path(engine_path).unlink(missing_ok=True)
        if found.aliases:  # an engine does not tell of its plugins' aliases
            (folder / "aliases").write_text(json.dumps(found.aliases), encoding="utf-8")
            (folder / "aliases").replace(aliases_path(engine_path))
        built.replace(engine_path)
    name = "TensorRT for RTX" if rtx else "TensorRT"
    return EngineReport(
        engine_path,
        size,
        time.perf_counter() - started,
        f"{name} {trt.__version__}",
        target,
        nodes if library else {},
        {} if library else nodes,
        kept,
        ""
        if rtx
        else trtexec_command(
            kept,
            engine_path,
            all_profiles,
            plugin_library=library,
            timing_cache=timing_cache,
            in_place=in_place,
        ),
    )


def _replace_file(path: Path, data: memoryview) -> None:
    """Write a file whole, beside its place: it may lie on another disk than the engine."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _read_cache(path: str | Path | None) -> bytes:
    return Path(path).read_bytes() if path is not None and Path(path).is_file() else b""


def _build(
    trt: Any,
    model: Path,
    profiles: Sequence[Profile],
    precision: str | None,
    library: Path | None,
    target: str | None,
    timing: bytes,
    in_place: bool,
    progress: Progress | None,
) -> tuple[Any, Any]:
    """The serialized engine, and the timing cache where there is such a thing."""
    logger = _logger(trt)
    builder = trt.Builder(logger)
    if library is not None:
        builder.get_plugin_registry().load_library(str(library))
    # From 11 on every network is strongly typed, and so is one of RTX.
    strongly = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if strongly is None else 1 << int(strongly))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(model)):
        said = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise LoraKernelsError(
            f"onnx_path: TensorRT {trt.__version__} cannot read the model: "
            + "; ".join(said or logger.errors)
        )
    check_precision(network, trt, precision)
    config = builder.create_builder_config()
    for sizes in profiles:
        check_profile(network, sizes)
        profile = builder.create_optimization_profile()
        for name, (least, usual, most) in sizes.items():
            profile.set_shape(name, least, usual, most)
        config.add_optimization_profile(profile)
    if target is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), 0)
    if in_place:
        config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    cached = None
    if target is None:
        cached = config.create_timing_cache(timing)
        config.set_timing_cache(cached, False)
    monitor = None if progress is None else _monitor(trt, progress)
    if monitor is not None:
        config.progress_monitor = monitor
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise LoraKernelsError(
            "the build failed or was cancelled: "
            + ("; ".join(logger.errors[-3:]) or "no reason")
            + "; what a plugin refused stands on standard error"
        )
    return serialized, None if cached is None else cached.serialize()
