"""What a TensorRT builder needs: the module, our plugins, a model it can read, sizes that fit."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import LoraKernelsError, UnsupportedError, describe_nearest
from .model import inlined, without_bodies
from .nodes import DOMAIN

Shape = tuple[int, ...]
Profile = Mapping[str, tuple[Shape, Shape, Shape]]  # of each input: least, usual and most

_OLDEST, _BEYOND = (10, 3), (12, 0)
_PRECISIONS = ("fp32", "fp16", "bf16")


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


def load_tensorrt_rtx() -> Any:
    """The module ``tensorrt_rtx``; an error that says how to install it otherwise."""
    return _module(
        ["tensorrt_rtx", "tensorrt_rtx_bindings"], "pip install 'lora-kernels[tensorrt]'"
    )


def aliases_path(engine: Path) -> Path:
    """The file beside an engine that says which caches it continues in place."""
    return engine.with_name(engine.name + ".aliases.json")


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


@dataclass(frozen=True)
class Prepared:
    """What a builder reads.

    Attributes
    ----------
    nodes
        Our nodes by name, with their number.
    aliases
        Input by output, of the caches that are appended to in place.
    """

    nodes: dict[str, int]
    aliases: dict[str, str]


def _append_in_place(model: Any, nodes: Sequence[Any]) -> dict[str, str]:
    """Let steps write the caches they are given, where these come from outside and leave again.

    A cache that the graph itself makes, as a prompt's, may be one tensor for several nodes.
    """
    import onnx_ir as ir

    inputs = {value: value.name for value in model.graph.inputs}
    outputs = {value: value.name for value in model.graph.outputs}
    aliases: dict[str, str] = {}
    for node in nodes:
        if not node.op_type.startswith("KvAttentionStep"):
            continue
        pairs = list(zip(node.outputs[1:], node.inputs[3:], strict=False))
        own = {before for _, before in pairs}  # one tensor for two caches would be written twice
        fits = all(before in inputs and after in outputs for after, before in pairs)
        if fits and len(own) == len(pairs) and not {inputs[b] for b in own} & set(aliases.values()):
            node.attributes["in_place"] = ir.AttrInt64("in_place", 1)
            aliases |= {outputs[after]: inputs[before] for after, before in pairs}
    return aliases


def prepare(onnx_path: str | Path, prepared_path: str | Path, *, plugins: bool) -> Prepared:
    """Write a model as a TensorRT builder is to read it.

    Parameters
    ----------
    onnx_path
        A model that went through :func:`lora_kernels.export.finish`.
    prepared_path
        Where to write; the weights go to a file ``.data`` beside it.
    plugins
        Whether our nodes stay, without bodies, and key-value caches that are inputs and outputs of
        the graph are appended to in place. If not, the bodies take their place.

    Returns
    -------
    Prepared

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
    aliases: dict[str, str] = {}
    if plugins:
        aliases = _append_in_place(model, nodes)
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
    return Prepared(_counted([node.op_type for node in nodes]), aliases)


def check_profile(network: Any, profile: Profile) -> None:
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


def check_precision(network: Any, trt: Any, precision: str | None) -> None:
    """The types of a strongly typed network are those of its file."""
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
