"""Faults in the CUDA kernels that the emulation has to catch: test_emulation.py plants them."""

from __future__ import annotations

from . import attention, int8_lora_linear, lora_linear
from .fault import Fault

__all__ = ["FAULTS", "Fault"]

FAULTS = [*lora_linear.FAULTS, *int8_lora_linear.FAULTS, *attention.FAULTS]
