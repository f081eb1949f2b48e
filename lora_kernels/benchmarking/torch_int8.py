"""torch's dynamically quantized linear, the INT8 that plain torch offers on a CPU."""

from __future__ import annotations

import warnings
from typing import Any

import torch

ENGINES = ("x86", "onednn")


def pack(weight: torch.Tensor, bias: torch.Tensor, engine: str) -> Any:
    """Quantize a weight [N, K] per output channel and prepack it for one engine."""
    torch.backends.quantized.engine = engine
    scales = (weight.abs().amax(1) / 127).double()
    zero_points = torch.zeros(weight.shape[0], dtype=torch.int64)
    with warnings.catch_warnings():  # deprecated, and still what there is to compare with
        warnings.simplefilter("ignore")
        quantized = torch.quantize_per_channel(weight, scales, zero_points, 0, torch.qint8)
    return torch.ops.quantized.linear_prepack(quantized, bias)


def linear(x: torch.Tensor, packed: Any, engine: str) -> torch.Tensor:
    """y = x Wᵀ + bias, with x quantized on the way."""
    torch.backends.quantized.engine = engine
    return torch.ops.quantized.linear_dynamic(x, packed, True)
