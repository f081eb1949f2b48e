"""Modules that drop into models: linear layers with live adapters, and cached attention."""

from .adapter_host import AdapterHost
from .int8_lora_linear import Int8LoraLinear, Int8LoraPointwiseConv1d
from .kv_attention_step import KVCacheAttention
from .kv_cache import KVCache
from .lora_linear import LoraLinear, LoraPointwiseConv1d

__all__ = [
    "AdapterHost",
    "Int8LoraLinear",
    "Int8LoraPointwiseConv1d",
    "KVCache",
    "KVCacheAttention",
    "LoraLinear",
    "LoraPointwiseConv1d",
]
