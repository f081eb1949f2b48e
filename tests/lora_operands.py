"""Operands of lora_linear that its tests share."""

from __future__ import annotations

import itertools

import torch


def bank(mode: str, rows: int, k: int, n: int, dtype: torch.dtype) -> dict:
    """LoRA operands: none, PEFT's own layout, a bank of three adapters, dropout, fp32 factors."""
    if mode == "none":
        return {}
    if mode == "bank":
        ranks = [4, 0, 17]
        operands = {
            "lora_a": (torch.randn(21, k) / k**0.5).to(dtype),
            "lora_b": torch.randn(21, n).to(dtype),
            "scales": torch.tensor([0.7, 1.0, 2.0]),
            "offsets": torch.tensor([0, *itertools.accumulate(ranks)], dtype=torch.int32),
        }
        if rows:
            operands["adapter_ids"] = torch.randint(-1, 3, (rows,), dtype=torch.int32)
        return operands
    factors = torch.float32 if mode == "fp32" else dtype
    operands = {
        "lora_a": (torch.randn(5, k) / k**0.5).to(factors),
        "lora_b": torch.randn(n, 5).to(factors).t(),
        "scales": torch.tensor([0.7]),
    }
    if mode == "dropout":
        operands |= {"dropout_p": 0.3, "dropout_seed": torch.tensor([1234567])}
    return operands


def base(rows: int, k: int, n: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    x, weight = torch.randn(rows, k), torch.randn(n, k) / k**0.5
    return x.to(dtype), weight.to(dtype), torch.randn(n).to(dtype), torch.randn(rows, n).to(dtype)
