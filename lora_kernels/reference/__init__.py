"""The executable specification of every operator, in plain PyTorch and never optimised.

Tests, benchmarks and documentation compare against these functions. They compute in float64
unless told otherwise, and their gradients are autograd's.
"""

from .int8_lora_linear import (
    int8_accumulators,
    int8_lora_linear,
    quantize_rows,
    quantize_static,
    quantize_weight,
)
from .kv_attention_step import kv_attention_step
from .kv_pack import kv_pack, kv_unpack
from .kv_relative_step import kv_relative_step
from .lora_linear import apply_activation, lora_branch, lora_linear
from .philox import dropout_keep_mask, philox4x32_10

__all__ = [
    "apply_activation",
    "dropout_keep_mask",
    "int8_accumulators",
    "int8_lora_linear",
    "kv_attention_step",
    "kv_pack",
    "kv_relative_step",
    "kv_unpack",
    "lora_branch",
    "lora_linear",
    "philox4x32_10",
    "quantize_rows",
    "quantize_static",
    "quantize_weight",
]
