"""Small random models and adapters that the tests share; nothing is downloaded."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

import lora_kernels as lk

FRAMES = 40  # mel frames of the tiny Whisper, two per encoder position
MELS = 8
VOCABULARY = 100


def whisper(seed: int = 0, attention: str = "sdpa", **overrides: Any) -> Any:
    """A random ``WhisperForConditionalGeneration`` whose greedy text is not one repeated token."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "max_source_positions": FRAMES // 2,
        "max_target_positions": 64,
        "num_mel_bins": MELS,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 3,
        "init_std": 0.3,
        "dropout": 0.0,
    }
    settings.update(overrides)
    model = WhisperForConditionalGeneration(WhisperConfig(**settings)).eval()
    model.config._attn_implementation = attention
    model.generation_config.suppress_tokens = None
    model.generation_config.begin_suppress_tokens = None
    return model


def features(batch: int = 3, seed: int = 1) -> torch.Tensor:
    """Log-mel features [batch, mels, frames] for :func:`whisper`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, MELS, FRAMES, generator=generator)


def labels(batch: int = 3, length: int = 7, seed: int = 2) -> torch.Tensor:
    """Token ids [batch, length] for :func:`whisper`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, VOCABULARY, (batch, length), generator=generator)


def generate(model: Any, inputs: torch.Tensor, **settings: Any) -> torch.Tensor:
    """Greedy (or beam, with ``num_beams=``) tokens."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = model.generate(inputs, do_sample=False, max_new_tokens=20, **settings)
    assert isinstance(result, torch.Tensor)
    return result


def linear_names(model: nn.Module, skip: Iterable[str] = ("proj_out", "linear_pos")) -> list[str]:
    """Names of linear layers and pointwise convolutions, without those that end in ``skip``."""
    return [
        name
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or isinstance(module, lk.nn.AdapterHost))
        or (type(module) is nn.Conv1d and module.kernel_size == (1,))
        if not name.endswith(tuple(skip))
    ]


def adapter(
    model: nn.Module,
    rank: int,
    seed: int,
    names: Iterable[str] | None = None,
    size: float = 0.3,
) -> lk.Adapter:
    """A random adapter for a model's linear layers."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in linear_names(model) if names is None else names:
        module = model.get_submodule(name)
        kernel = (1,) if isinstance(module, nn.Conv1d) else ()
        n, k = module.weight.shape[:2]  # type: ignore[union-attr,index]
        a = torch.randn(rank, k, *kernel, generator=generator) * size
        b = torch.randn(n, rank, *kernel, generator=generator) * size
        tensors[name] = (a, b)
    return lk.Adapter.from_tensors(tensors, alpha=rank)


def peft_whisper(model: Any | None = None, **settings: Any) -> Any:
    """A tiny Whisper with PEFT's LoRA, B not zero so that LoRA matters."""
    from peft import LoraConfig, get_peft_model

    defaults: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj", "fc1"]}
    defaults.update(settings)
    model = get_peft_model(whisper() if model is None else model, LoraConfig(**defaults))
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model
