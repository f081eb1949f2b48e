"""What is written beside exported graphs; `folder.py` reads it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from lora_speech.decoding.prompts import prompt_tokens, special_tokens, token_limit
from lora_speech.export.conformer_graphs import SUBSAMPLING
from lora_speech.export.folder import ADAPTERS, DECODING, CtcDecoding, Decoding
from lora_speech.export.target import Plan


def ctc_decoding_of(plan: Plan, step: Any) -> CtcDecoding:
    """How a plan's Conformer is decoded; `step` is its `ConformerStepGraph`, or None."""
    return CtcDecoding(
        sampling_rate=plan.model.sampling_rate,
        blank=int(plan.model.model.config.pad_token_id),
        chunk=0 if step is None else step.chunk,
        subsampling=0 if step is None else SUBSAMPLING,
        caches={} if step is None else {name: step.cache_shape(name, 1) for name in step.caches},
        live=list(plan.live),
        int8=plan.int8,
    )


def decoding_of(plan: Plan) -> Decoding:
    """How a plan's Whisper is decoded."""
    whisper, extractor = plan.model.model, plan.model.processor.feature_extractor
    config, tokens = whisper.config, special_tokens(whisper)
    prompt = prompt_tokens(tokens, plan.language)
    return Decoding(
        sampling_rate=int(extractor.sampling_rate),
        n_fft=int(extractor.n_fft),
        hop_length=int(extractor.hop_length),
        mel_bands=int(extractor.feature_size),
        window_samples=int(extractor.n_samples),
        prompt=prompt,
        languages=dict(tokens.languages),
        end=tokens.end,
        suppressed=list(tokens.suppressed),
        suppressed_first=list(tokens.suppressed_first),
        max_new_tokens=token_limit(tokens, len(prompt), None),
        positions=tokens.max_positions,
        layers=int(config.decoder_layers),
        heads=int(config.decoder_attention_heads),
        head_size=int(config.d_model) // int(config.decoder_attention_heads),
        cross_positions=int(config.max_source_positions),
        live=list(plan.live),
        int8=plan.int8,
    )


def write_companions(plan: Plan, folder: Path, decoding: Decoding | CtcDecoding) -> None:
    """Write `decoding.json` and the processor's files."""
    record = json.dumps(asdict(decoding), indent=1)
    (folder / DECODING).write_text(record + "\n", encoding="utf-8")
    plan.model.processor.save_pretrained(folder)


def adapted_linears(plan: Plan) -> tuple[str, ...]:
    """Names, within `WhisperModel`, of the linears that any live adapter changes."""
    import lora_kernels as lk

    changed = {n for name in plan.live for n in lk.get_adapter(plan.model.model, name).layers}
    order = [name for name, _ in plan.model.model.named_modules() if name in changed]
    return tuple(name.removeprefix("model.") for name in order)


def write_adapters(plan: Plan, folder: Path) -> None:
    """Write `adapters/NAME.safetensors`: lora_a [r, K] and lora_b [r, N] of each linear.

    fp32; the scale is in lora_b.
    """
    from safetensors.numpy import save_file

    import lora_kernels as lk

    for name in plan.live:
        tensors: dict[str, np.ndarray] = {}
        for linear, layer in lk.get_adapter(plan.model.model, name).layers.items():
            key = linear.removeprefix("model.")
            b = layer.b_matrix.detach().float().t() * layer.scale
            tensors[f"{key}.lora_a"] = layer.a_matrix.detach().float().numpy().copy()
            tensors[f"{key}.lora_b"] = np.ascontiguousarray(b.numpy())
        (folder / ADAPTERS).mkdir(exist_ok=True)
        save_file(tensors, str(folder / ADAPTERS / f"{name}.safetensors"))
