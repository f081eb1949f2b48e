"""Operands of int8_lora_linear that its tests share."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from lora_kernels import ops, reference


def quantized(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight [n, k] packed, and as the specification takes it."""
    q, scales = reference.quantize_weight(torch.randn(n, k) / max(k, 1) ** 0.5)
    return ops.int8_pack(q, scales), q, scales


def ragged_bank(rows: int, k: int, n: int, dtype: torch.dtype) -> dict[str, Any]:
    """Four adapters of ranks 4, 0, 17 and 1, and rows that mix them with the base alone."""
    ranks = [4, 0, 17, 1]
    operands = {
        "lora_a": (torch.randn(sum(ranks), k) / max(k, 1) ** 0.5).to(dtype),
        "lora_b": torch.randn(sum(ranks), n).to(dtype),
        "scales": torch.tensor([0.7, 1.0, 2.0, -0.3]),
        "offsets": torch.tensor([0, *itertools.accumulate(ranks)], dtype=torch.int32),
    }
    if rows:
        operands["adapter_ids"] = torch.randint(-1, 4, (rows,), dtype=torch.int32)
    return operands
