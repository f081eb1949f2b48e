"""What happens to an exported model around its nodes: packed weights, and bodies."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import LoraKernelsError
from .nodes import DOMAIN, MINIMUM_OPSET, NODES, VERSION

if TYPE_CHECKING:
    import onnx_ir as ir

_CHANNELS, _STEP = 64, 4  # of a block of a packed weight (int8_packing.h)


@cache
def _functions() -> dict[str, bytes]:
    """The body of every node and of what it calls, serialized, by name."""
    from . import bodies

    protos = {}
    for name, value in vars(bodies).items():
        if not hasattr(value, "to_function_proto"):
            continue
        proto = value.to_function_proto()
        node = NODES.get(name)
        if node is not None:
            proto.attribute[:] = node.attributes
            assert tuple(i.removeprefix("n_") for i in proto.input) == node.inputs, name
        protos[name] = proto.SerializeToString()
    return protos


def _bodies(opset: int) -> list[ir.Function]:
    import onnx
    import onnx_ir as ir

    functions = []
    for serialized in _functions().values():
        proto = onnx.FunctionProto.FromString(serialized)
        for imported in proto.opset_import:
            if not imported.domain:
                imported.version = opset
        functions.append(ir.serde.deserialize_function(proto))
    return functions


def _of_domain(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph.all_nodes() if node.domain == DOMAIN]


def _called(functions: list[ir.Function], names: set[str]) -> list[ir.Function]:
    """The functions of these names and what they call."""
    by_name = {function.name: function for function in functions}
    found: dict[str, ir.Function] = {}
    while names:
        name = names.pop()
        if name in found:
            continue
        found[name] = by_name[name]
        names |= {node.op_type for node in by_name[name] if node.domain == DOMAIN}
    return [function for function in functions if function.name in found]


def _words(packed: np.ndarray, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """A packed weight in words of 4 bytes, and its scales [N]."""
    blocks = (channels + _CHANNELS - 1) // _CHANNELS
    words = np.ascontiguousarray(packed).view(np.int32)
    tails = words.reshape(blocks, -1)[:, -2 * _CHANNELS : -_CHANNELS]  # scales, then sums
    return words, np.ascontiguousarray(tails).view(np.float32).reshape(-1)[:channels].copy()


def finish(model: ir.Model) -> ir.Model:
    """Complete what ``torch.onnx.export`` wrote with :func:`translations`, in place.

    Packed INT8 weights become int32 words (a type that every runtime keeps as it is) beside their
    scales, and each node gets its body in standard operators, so that the model runs without us.

    Parameters
    ----------
    model
        ``ONNXProgram.model``.

    Returns
    -------
    onnx_ir.Model
        The same model.

    Raises
    ------
    LoraKernelsError
        If the model's opset is too old, or a packed weight is not stored in it.
    """
    import onnx_ir as ir

    opset = model.opset_imports.get("", 0)
    if opset < MINIMUM_OPSET:
        raise LoraKernelsError(
            f"opset_version: expected {MINIMUM_OPSET} or later, got {opset}; pass it to "
            "torch.onnx.export"
        )
    nodes = _of_domain(model)
    done: dict[str, tuple[ir.Value, ir.Value]] = {}
    for node in nodes:
        if not node.op_type.startswith("Int8LoraLinear"):
            continue
        packed = node.inputs[1]
        if packed is None or packed.dtype != ir.DataType.UINT8:
            continue
        tensor = packed.const_value
        name = packed.name or node.name or ""
        if tensor is None:
            raise LoraKernelsError(
                f"packed_weight: expected a buffer of the model, got the computed tensor {name!r}; "
                "quantize the model before exporting it"
            )
        if name not in done:
            channels: Any = node.inputs[2].shape[0]  # type: ignore[union-attr, index]
            parts = zip(("words", "scales"), _words(tensor.numpy(), channels), strict=True)
            values = []
            for suffix, array in parts:
                part = f"{name}.{suffix}"
                value = ir.Value(name=part, const_value=ir.tensor(array, name=part))
                value.dtype, value.shape = (
                    ir.DataType.from_numpy(array.dtype),
                    ir.Shape(array.shape),
                )
                model.graph.register_initializer(value)
                values.append(value)
            done[name] = (values[0], values[1])
        for index, value in enumerate(done[name], start=1):
            node.replace_input_with(index, value)
    _drop_unused(model)
    if nodes:
        model.opset_imports[DOMAIN] = VERSION
    for function in _called(_bodies(opset), {node.op_type for node in nodes}):
        model.functions[function.identifier()] = function
    return model


def _drop_unused(model: ir.Model) -> None:
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    RemoveUnusedNodesPass()(model)


def inlined(model: ir.Model) -> ir.Model:
    """Put the bodies in the place of the nodes, in place: standard operators alone.

    For runtimes that take no functions, or confuse their names.
    """
    from onnx_ir.passes.common import InlinePass

    InlinePass()(model)
    model.opset_imports.pop(DOMAIN, None)
    return model


def without_bodies(model: ir.Model) -> ir.Model:
    """Take the bodies away, in place: the nodes are plugins or nothing.

    For TensorRT with the plugin library: some of its parsers prefer a body to a plugin.
    """
    for identifier in [key for key in model.functions if key[0] == DOMAIN]:
        del model.functions[identifier]
    return model
