"""What is installed for speech, beside the report of the kernels themselves."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

EXTRAS = (
    ("transformers", "models, tokenizers, features"),
    ("peft", "training adapters"),
    ("safetensors", "weights"),
    ("soundfile", "reading audio"),
    ("soxr", "sampling rates"),
    ("jiwer", "error rates"),
    ("typer", "the command line"),
    ("rich", "progress"),
    ("espeakng-loader", "synthetic speech for the demonstration"),
    ("datasets", "Hugging Face data sets"),
)
"""Distributions of the `speech` extra, and what each is for."""


def report() -> str:
    """Return the report of `lora_kernels.environment`, then what speech needs."""
    from lora_kernels import environment
    from lora_speech.devices import choose_device, why_not_cuda

    lines = [str(environment.report()).rstrip(), "", "speech:"]
    missing = []
    for name, purpose in EXTRAS:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            version = "missing"
            missing.append(name)
        lines.append(f"  {name:<16} {version:<12} {purpose}")
    lines.append(f"  {'base model':<16} {_base_model():<12} the shipped Whisper")
    reason = why_not_cuda()
    lines.append(
        f"  {'device':<16} {choose_device('auto')!s:<12} what --device auto takes"
        + (f": for CUDA {reason}" if reason else "")
    )
    if missing:
        lines.append("  fix: pip install 'lora-kernels[speech]'")
    return "\n".join(lines)


def _base_model() -> str:
    from lora_speech.errors import ModelError
    from lora_speech.models.loading import shipped_model_path

    try:
        weights = Path(shipped_model_path()) / "model.safetensors"
        return f"{weights.stat().st_size / 1e6:.1f} MB"
    except (ModelError, OSError):
        return "missing"
