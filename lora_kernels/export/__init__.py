"""Models as files for other runtimes: our operators as ONNX nodes of the domain ``lora_kernels``.

    >>> program = torch.onnx.export(
    ...     model, inputs, dynamo=True, opset_version=18, custom_translation_table=translations()
    ... )
    >>> finish(program.model)
    >>> program.save("model.onnx")

Needs the extra ``export`` (onnx, onnxscript, onnxruntime). Importing this package imports neither
them nor torch: an engine's runner needs none of these.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .nodes import DOMAIN, NODES, PLUGIN_NAMESPACE, PLUGIN_VERSION, Node

if TYPE_CHECKING:
    from .functional import kv_attention_step
    from .model import finish, inlined, without_bodies
    from .translation import translations

__all__ = [
    "DOMAIN",
    "NODES",
    "PLUGIN_NAMESPACE",
    "PLUGIN_VERSION",
    "Node",
    "finish",
    "inlined",
    "kv_attention_step",
    "translations",
    "without_bodies",
]

_HOMES = {
    "finish": "model",
    "inlined": "model",
    "kv_attention_step": "functional",
    "translations": "translation",
    "without_bodies": "model",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
