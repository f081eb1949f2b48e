"""Models as files for other runtimes: our operators as ONNX nodes of the domain ``lora_kernels``.

    >>> program = torch.onnx.export(
    ...     model, inputs, dynamo=True, opset_version=18, custom_translation_table=translations()
    ... )
    >>> finish(program.model)
    >>> program.save("model.onnx")

Needs the extra ``export`` (onnx, onnxscript, onnxruntime).
"""

from .functional import kv_attention_step
from .model import finish, inlined, without_bodies
from .nodes import DOMAIN, NODES, PLUGIN_NAMESPACE, PLUGIN_VERSION, Node
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
