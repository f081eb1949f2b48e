"""TensorRT engines of exported models, where TensorRT or TensorRT for RTX is installed.

With TensorRT, the nodes of the domain ``lora_kernels`` are our plugins. TensorRT for RTX takes no
plugins, and builds on a machine without a GPU for the architecture that it is told: there, and
where no plugin library was built, the nodes' bodies in standard operators take their place.
"""

from __future__ import annotations

import errno
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import LoraKernelsError, UnsupportedError, describe_nearest
from .model import inlined, without_bodies
from .nodes import DOMAIN

Shape = tuple[int, ...]
Profile = Mapping[str, tuple[Shape, Shape, Shape]]  # of each input: least, usual and most
Progress = Callable[[str, int, int], "bool | None"]

# Architectures that TensorRT for RTX builds for ahead of time.
RTX_TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120")
_PRECISIONS = {"fp32": "FLOAT", "fp16": "FLOAT16", "bf16": "BFLOAT16"}
_OLDEST, _BEYOND = (10, 3), (12, 0)


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


def _module(names: Sequence[str], install: str) -> Any:
    for name in names:
        try:
            return import_module(name)
        except ModuleNotFoundError:
            continue
        except (ImportError, OSError) as error:
            raise LoraKernelsError(
                f"{name}: expected an installation that loads, got: {error}; install it anew: "
                f"{install}"
            ) from error
    raise LoraKernelsError(f"{names[0]}: expected it to be installed, it was not found; {install}")


def load_tensorrt() -> Any:
    """The module ``tensorrt``, checked.

    Raises
    ------
    LoraKernelsError
        If it is not installed, or older than 10.3, or newer than 11.
    """
    trt = _module(["tensorrt"], "pip install tensorrt (it brings NVIDIA's libraries)")
    version = tuple(int(part) for part in trt.__version__.split(".")[:2])
    if not _OLDEST <= version < _BEYOND:
        raise UnsupportedError(
            f"tensorrt: expected 10.3 to 11, got {trt.__version__}; install one of these"
        )
    return trt


def _load_rtx() -> Any:
    return _module(
        ["tensorrt_rtx", "tensorrt_rtx_bindings"], "pip install 'lora-kernels[tensorrt]'"
    )


def find_plugin_library(trt: Any) -> Path | None:
    """The plugin library of this package for a TensorRT's major version; None: not built."""
    import lora_kernels

    name = f"liblora_kernels_tensorrt{trt.__version__.split('.')[0]}.so"
    for folder in lora_kernels.__path__:
        if Path(folder, name).is_file():
            return Path(folder, name)
    return None


def _counted(names: list[str]) -> dict[str, int]:
    return {name: names.count(name) for name in sorted(set(names))}


def prepare(onnx_path: str | Path, prepared_path: str | Path, *, plugins: bool) -> dict[str, int]:
    """Write a model as a TensorRT builder is to read it.

    Parameters
    ----------
    onnx_path
        A model that went through :func:`lora_kernels.export.finish`.
    prepared_path
        Where to write; the weights go to a file ``.data`` beside it.
    plugins
        Whether our nodes stay, without bodies, and key-value caches are appended to in place. If
        not, the bodies take their place.

    Returns
    -------
    dict
        Our nodes by name, with their number.

    Raises
    ------
    LoraKernelsError
        If the file cannot be read, or holds INT8 layers that are to become standard operators,
        which TensorRT has not.
    """
    import onnx_ir as ir

    try:
        model = ir.load(onnx_path)
    except Exception as error:
        raise LoraKernelsError(
            f"onnx_path: expected an ONNX model, {onnx_path} cannot be read: {error}"
        ) from error
    nodes = [node for node in model.graph.all_nodes() if node.domain == DOMAIN]
    if plugins:
        for node in nodes:
            if node.op_type.startswith("KvAttentionStep"):
                node.attributes["in_place"] = ir.AttrInt64("in_place", 1)
        without_bodies(model)
    else:
        int8 = [node.op_type for node in nodes if node.op_type.startswith("Int8LoraLinear")]
        if int8:
            raise UnsupportedError(
                f"onnx_path: expected layers in floating point, as no plugin library is used, got "
                f"{len(int8)} Int8LoraLinear: TensorRT has no standard operators for them; export "
                "the model without quantize(), or build the plugin library "
                "(docs/tensorrt.md) and name it in plugin_library"
            )
        inlined(model)
    path = Path(prepared_path)
    ir.save(model, path, external_data=path.name + ".data")
    return _counted([node.op_type for node in nodes])


def _check_profile(network: Any, profile: Profile) -> None:
    """Every input that has open sizes is covered, by sizes that fit the closed ones."""
    inputs = {network.get_input(i).name: network.get_input(i) for i in range(network.num_inputs)}
    for name in profile:
        if name not in inputs:
            raise LoraKernelsError(
                f"profiles: {name!r} is no input of the model; {describe_nearest(name, inputs)}"
            )
    for name, tensor in inputs.items():
        sizes = tuple(tensor.shape)
        if name not in profile:
            if -1 in sizes:
                raise LoraKernelsError(
                    f"profiles: expected the sizes of input {name!r} {list(sizes)}, got none; give "
                    "its least, usual and most shape"
                )
            continue
        least, usual, most = profile[name]
        fits = len(least) == len(usual) == len(most) == len(sizes) and all(
            low <= middle <= high and (size == -1 or low == high == size)
            for low, middle, high, size in zip(least, usual, most, sizes, strict=True)
        )
        if not fits:
            raise LoraKernelsError(
                f"profiles: {name!r}: expected least <= usual <= most and the model's sizes "
                f"{list(sizes)}, got {list(least)}, {list(usual)}, {list(most)}"
            )


def _check_precision(network: Any, trt: Any, precision: str | None) -> None:
    if precision is None:
        return
    if precision not in _PRECISIONS:
        raise LoraKernelsError(
            f"precision: expected {', '.join(_PRECISIONS)} or None, got {precision!r}"
        )
    kinds = {"fp32": trt.float32, "fp16": trt.float16, "bf16": trt.bfloat16}
    wanted = kinds[precision]
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    floating = {i.name: i.dtype for i in inputs if i.dtype in kinds.values()}
    # Scales of adapters and caches are fp32 whatever the model is.
    if floating and wanted not in floating.values():
        raise LoraKernelsError(
            f"precision: expected {precision} among the model's inputs, got "
            + ", ".join(f"{name} {str(dtype).split('.')[-1]}" for name, dtype in floating.items())
            + "; types are those of the file: convert the model (model.half()) before exporting it"
        )


def trtexec_command(
    model: str | Path,
    engine: str | Path,
    profiles: Sequence[Profile],
    *,
    plugin_library: str | Path | None = None,
    timing_cache: str | Path | None = None,
    in_place: bool = False,
) -> str:
    """The shell command that builds what :func:`build_engine` builds.

    Parameters
    ----------
    model
        What :func:`prepare` wrote.
    engine, profiles, plugin_library, timing_cache
        As in :func:`build_engine`.
    in_place
        Whether key-value caches are appended to in place.
    """
    words = ["trtexec", f"--onnx={model}", f"--saveEngine={engine}", "--stronglyTyped"]
    if plugin_library:
        words.append(f"--dynamicPlugins={plugin_library}")
    for number, profile in enumerate(profiles):
        if len(profiles) > 1:
            words.append(f"--profile={number}")
        for option, index in (("min", 0), ("opt", 1), ("max", 2)):
            shapes = [f"{n}:{'x'.join(map(str, s[index])) or '1'}" for n, s in profile.items()]
            if shapes:
                words.append(f"--{option}Shapes={','.join(shapes)}")
    if timing_cache:
        words.append(f"--timingCacheFile={timing_cache}")
    if in_place:
        words.append("--preview=+aliasedPluginIO1003")
    return shlex.join(words)


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
    trt = _load_rtx() if rtx else load_tensorrt()
    library = Path(plugin_library) if plugin_library else None
    if library is not None and not library.is_file():
        raise LoraKernelsError(
            f"plugin_library: expected a file, {library} is none; build it as docs/tensorrt.md says"
        )
    if library is None and not rtx:
        library = find_plugin_library(trt)
    started = time.perf_counter()
    with _workplace(engine_path) as folder:
        prepared = folder / (engine_path.stem + ".onnx")
        nodes = prepare(onnx_path, prepared, plugins=library is not None)
        in_place = library is not None and any(n.startswith("KvAttentionStep") for n in nodes)
        # What trtexec would read is kept only where it is not the exported file itself.
        kept = engine_path.with_suffix(".onnx") if library and nodes else onnx_path
        if kept != onnx_path and kept.resolve() == onnx_path.resolve():
            kept = engine_path.with_suffix(".tensorrt.onnx")
            prepared = prepared.rename(folder / kept.name)
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
            (folder / "cache").write_bytes(memoryview(cache))
            (folder / "cache").replace(timing_cache)
        if kept != onnx_path:
            data = folder / (engine_path.stem + ".onnx.data")
            if data.exists():
                data.replace(kept.parent / data.name)
            prepared.replace(kept)
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
    _check_precision(network, trt, precision)
    config = builder.create_builder_config()
    for sizes in profiles:
        _check_profile(network, sizes)
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
            "the build failed or was cancelled: " + ("; ".join(logger.errors[-3:]) or "no reason")
        )
    return serialized, None if cached is None else cached.serialize()
