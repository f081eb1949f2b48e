"""The operators as functions of tensors: ``torch.ops.lora_kernels.*`` with defaults and docs.

Each stem has its own file, with the public function, the fake kernel (shapes for
``torch.compile`` and export) and the gradient.
"""

from __future__ import annotations

from . import _library as _library
from .composite import Composite
from .int8_lora_linear import int8_lora_linear, int8_pack, int8_pack_screen, int8_unpack
from .int8_lora_topk import int8_lora_topk
from .kv_attention_step import kv_attention_step
from .kv_pack import kv_pack
from .kv_relative_step import kv_relative_step
from .lora_linear import lora_linear

__all__ = [
    "Composite",
    "int8_lora_linear",
    "int8_lora_topk",
    "int8_pack",
    "int8_pack_screen",
    "int8_unpack",
    "kv_attention_step",
    "kv_pack",
    "kv_relative_step",
    "lora_linear",
]
