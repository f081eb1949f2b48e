"""Fused LoRA kernels for speech models: train with PEFT, serve many live adapters on one base.

Three operators (``lora_linear``, ``int8_lora_linear``, ``kv_attention_step``) and what puts them
into the models people already load: :func:`swap`, :func:`quantize`, :func:`load_adapter` and
:func:`use_adapters`. Importing this package imports neither transformers nor PEFT.
"""

from . import errors, nn, ops, reference
from .adapters import (
    Adapter,
    AdapterBank,
    AdapterLayer,
    read_peft_folder,
    use_adapters,
    write_peft_folder,
)
from .errors import AdapterError, LoraKernelsError, SwapError, UnsupportedError
from .implementations import force_implementation
from .live import (
    AdapterInfo,
    add_adapter,
    get_adapter,
    list_adapters,
    load_adapter,
    remove_adapter,
    save_adapter,
)
from .merge import MergeReport, merge
from .nn import (
    Int8LoraLinear,
    KVCache,
    KVCacheAttention,
    LoraLinear,
    LoraPointwiseConv1d,
)
from .quantization import Int8Dynamic, quantize, register_scheme
from .report import SwapReport
from .swap import swap, unswap

__all__ = [
    "Adapter",
    "AdapterBank",
    "AdapterError",
    "AdapterInfo",
    "AdapterLayer",
    "Int8Dynamic",
    "Int8LoraLinear",
    "KVCache",
    "KVCacheAttention",
    "LoraKernelsError",
    "LoraLinear",
    "LoraPointwiseConv1d",
    "MergeReport",
    "SwapError",
    "SwapReport",
    "UnsupportedError",
    "add_adapter",
    "errors",
    "force_implementation",
    "get_adapter",
    "list_adapters",
    "load_adapter",
    "merge",
    "nn",
    "ops",
    "quantize",
    "read_peft_folder",
    "reference",
    "register_scheme",
    "remove_adapter",
    "save_adapter",
    "swap",
    "unswap",
    "use_adapters",
    "write_peft_folder",
]
