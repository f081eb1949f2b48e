"""A small Parakeet of random weights, its processor and an adapter, in the Hugging Face layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from tiny_whisper import tone
from torch import nn

LETTERS = "abcdefghijklmnopqrstuvwxyz "


def parakeet(**encoder: Any) -> nn.Module:
    """Real shapes of a Parakeet, as far as `encoder` does not change them; random weights."""
    from transformers import ParakeetCTCConfig, ParakeetForCTC

    blank = len(LETTERS)
    config = ParakeetCTCConfig(
        vocab_size=blank + 1, pad_token_id=blank, encoder_config={"layerdrop": 0.0, **encoder}
    )
    torch.manual_seed(0)
    model = ParakeetForCTC(config).eval()
    with torch.no_grad():  # what a fresh model has at zero or one would hide mistakes
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if "running" in name:
                tensor.uniform_(0.5, 1.5)
            elif "bias" in name:
                tensor.normal_(0.0, 0.1)
            elif tensor.dim() > 1:  # wide enough for the frames to matter
                tensor.normal_(0.0, 2.0 / tensor[0].numel() ** 0.5)
        model.ctc_head.weight.normal_(0.0, 1.0)
    return model


def small(**more: Any) -> nn.Module:
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    return parakeet(**sizes, subsampling_conv_channels=8, num_mel_bins=16, **more)


def write_tune(path: Path) -> Path:
    """Tones of four heights one after another: frames that differ."""
    tones = [tone(0.4, frequency=f) for f in (200.0, 3000.0, 700.0, 1500.0)]
    soundfile.write(path, np.concatenate(tones), 16_000)
    return path


def make_parakeet(path: Path, recording: Path) -> Path:
    """Save one that hears no letter everywhere in `recording`."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import ParakeetFeatureExtractor, ParakeetProcessor, ParakeetTokenizer

    vocabulary = {letter: index for index, letter in enumerate(LETTERS)} | {"<pad>": len(LETTERS)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=" "))
    tokenizer.decoder = decoders.Fuse()
    processor = ParakeetProcessor(
        ParakeetFeatureExtractor(feature_size=16),
        ParakeetTokenizer(tokenizer_object=tokenizer, pad_token="<pad>", unk_token=" "),
    )
    model = small()
    inputs = processor.feature_extractor(
        soundfile.read(recording)[0], sampling_rate=16_000, return_tensors="pt"
    )
    with torch.no_grad():  # no letter is the likeliest everywhere
        model.ctc_head.bias -= model(**inputs).logits[0].median(0).values
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


def make_parakeet_adapter(folder: Path, path: Path) -> Path:
    """An adapter of rank 3 of that Parakeet."""
    from peft import LoraConfig, get_peft_model
    from transformers import ParakeetForCTC

    model = get_peft_model(
        ParakeetForCTC.from_pretrained(folder),
        LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "o_proj", "linear1"]),
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.3)
    model.save_pretrained(path)
    return path
