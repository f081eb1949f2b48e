"""The nodes of the ONNX domain ``lora_kernels``: names, inputs, outputs and attributes.

A node has all of its inputs, always: TensorRT plugins and functions have no absent ones. What a
call leaves out is a placeholder, for which an attribute ``has_<input>`` is 0: a bias or residual
[1] of zeros, an x_scale [1] of 0, a bank of one rank row of zeros and the adapter id -1. Read as
operands they give the same result.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx
    from onnxscript.values import Op

DOMAIN = "lora_kernels"
VERSION = 1
PLUGIN_VERSION = "1"
PLUGIN_NAMESPACE = "lora_kernels"
# of the standard operators in the bodies, and the least that a model may be exported with
MINIMUM_OPSET = 18

_BANK = ("lora_a", "lora_b", "scales", "offsets", "adapter_ids")
_LINEAR = ("x", "weight", "bias", *_BANK, "residual")
_INT8_LINEAR = ("x", "packed_weight", "weight_scales", "bias", *_BANK, "residual", "x_scale")
_OPTIONAL = ("bias", "lora", "residual")
_CACHES = ("k_cache", "v_cache")
_KV_SCALES = ("k_scales", "v_scales")
_WHERE = ("lengths", "slots")


@dataclass(frozen=True)
class Node:
    """One operator of the domain.

    Attributes
    ----------
    name
        The type of the node, and the name of its TensorRT plugin.
    inputs, outputs
        By name, in order.
    optional
        What a call may leave out: there is an attribute ``has_<name>`` for each.
    has_scale
        Whether there is the attribute ``scale``, the factor of attention scores.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...] = ("y",)
    optional: tuple[str, ...] = ()
    has_scale: bool = False

    @property
    def attributes(self) -> tuple[str, ...]:
        """The names of all attributes."""
        flags = tuple(f"has_{name}" for name in self.optional)
        scale = ("scale",) if self.has_scale else ()
        return (*flags, *scale, "plugin_version", "plugin_namespace")


ACTIVATIONS = {"none": "", "gelu": "Gelu", "silu": "Silu"}  # a suffix of the linear nodes' names

NODES: dict[str, Node] = {
    node.name: node
    for node in (
        *(
            Node(f"LoraLinear{suffix}", _LINEAR, optional=_OPTIONAL)
            for suffix in ACTIVATIONS.values()
        ),
        *(
            Node(f"Int8LoraLinear{suffix}", _INT8_LINEAR, optional=(*_OPTIONAL, "x_scale"))
            for suffix in ACTIVATIONS.values()
        ),
        Node(
            "KvAttentionStep",
            ("q", "k", "v", *_CACHES, *_WHERE),
            ("out", *_CACHES),
            ("slots",),
            True,
        ),
        Node(
            "KvAttentionStepInt8",
            ("q", "k", "v", *_CACHES, *_KV_SCALES, *_WHERE),
            ("out", *_CACHES, *_KV_SCALES),
            ("slots",),
            True,
        ),
        Node("KvAttentionFixed", ("q", *_CACHES, *_WHERE), ("out",), ("slots",), True),
        Node(
            "KvAttentionFixedInt8",
            ("q", *_CACHES, *_KV_SCALES, *_WHERE),
            ("out",),
            ("slots",),
            True,
        ),
    )
}


def _schema(node: Node) -> onnx.defs.OpSchema:
    from onnx.defs import OpSchema

    # Every tensor may have a type of its own: what fits together, the operator says.
    everything = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
    everything += ["tensor(int8)", "tensor(int32)"]
    kinds = {"scale": OpSchema.AttrType.FLOAT}
    kinds |= {f"plugin_{name}": OpSchema.AttrType.STRING for name in ("version", "namespace")}
    parameters = [OpSchema.FormalParameter(name, f"T_{name}") for name in node.inputs]
    results = [
        OpSchema.FormalParameter(
            f"{name}_out" if name in node.inputs else name,
            f"T_{name}" if name in node.inputs else f"T_{node.inputs[0]}",
        )
        for name in node.outputs
    ]
    return OpSchema(
        node.name,
        DOMAIN,
        VERSION,
        inputs=parameters,
        outputs=results,
        type_constraints=[(f"T_{name}", everything, "") for name in node.inputs],
        attributes=[
            OpSchema.Attribute(name, kinds.get(name, OpSchema.AttrType.INT), required=True)
            for name in node.attributes
        ],
    )


@cache
def operator(name: str) -> Op:
    """What a translation of ``torch.onnx.export`` calls to emit a node.

    Parameters
    ----------
    name
        A key of ``NODES``.
    """
    from onnxscript.values import Op, Opset

    return Op(Opset(DOMAIN, VERSION), name, _schema(NODES[name]))
