"""Fused LoRA kernels for speech models."""
