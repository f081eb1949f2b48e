"""A tiny Whisper with random weights, and recordings made of tones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch


def tone(seconds: float = 1.0, rate: int = 16_000, frequency: float = 440.0) -> np.ndarray:
    """A sine, float32 [samples]."""
    time = np.arange(int(seconds * rate)) / rate
    return (0.3 * np.sin(2 * np.pi * frequency * time)).astype(np.float32)


SEED = 1
"""One of those for which the rows of a batch of tones differ in length."""

WORDS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "go",
    "stop",
    "left",
    "right",
    "up",
    "down",
    "yes",
    "no",
]


def make_tiny_whisper(folder: Path) -> Path:
    """Write the model; its vocabulary is byte-level characters plus a few merged words."""
    from transformers import (
        GenerationConfig,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperProcessor,
        WhisperTokenizer,
    )

    tokenizer = make_tokenizer(folder, WhisperTokenizer)
    ids = tokenizer.convert_tokens_to_ids
    config = WhisperConfig(
        vocab_size=len(tokenizer),
        num_mel_bins=80,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        max_source_positions=100,
        max_target_positions=48,
        decoder_start_token_id=ids("<|startoftranscript|>"),
        eos_token_id=ids("<|endoftext|>"),
        pad_token_id=ids("<|endoftext|>"),
        bos_token_id=ids("<|endoftext|>"),
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
    )
    torch.manual_seed(SEED)
    model = WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():  # weights this wide make outputs vary with the audio, and some rows end
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "encoder.embed_positions" not in name:
                parameter.normal_(0.0, 0.04 if "embed" in name else 0.3)
        model.model.decoder.embed_tokens.weight[config.eos_token_id] *= 2.0
    model.generation_config = GenerationConfig(
        decoder_start_token_id=config.decoder_start_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        bos_token_id=config.bos_token_id,
        max_length=48,
        is_multilingual=True,
        lang_to_id={"<|en|>": ids("<|en|>"), "<|es|>": ids("<|es|>")},
        task_to_id={"transcribe": ids("<|transcribe|>"), "translate": ids("<|translate|>")},
        no_timestamps_token_id=ids("<|notimestamps|>"),
        suppress_tokens=[ids("<|translate|>"), ids("<|transcribe|>"), 5, 9],
        begin_suppress_tokens=[220, config.eos_token_id],
        max_initial_timestamp_index=50,
        return_timestamps=False,
    )
    extractor = WhisperFeatureExtractor(feature_size=80, chunk_length=2)
    model.save_pretrained(folder, safe_serialization=True)
    WhisperProcessor(extractor, tokenizer).save_pretrained(folder)
    return folder


def make_tokenizer(folder: Path, tokenizer_class: type) -> object:
    """A byte-level tokenizer with Whisper's special tokens and 101 timestamps."""
    from tokenizers.pre_tokenizers import ByteLevel

    vocabulary = {token: index for index, token in enumerate(sorted(ByteLevel.alphabet()))}
    merges: list[str] = []
    for word in WORDS:
        left = word[0]
        for letter in word[1:]:
            if left + letter not in vocabulary:
                vocabulary[left + letter] = len(vocabulary)
                merges.append(f"{left} {letter}")
            left += letter
    special = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|es|>", "<|translate|>"]
    special += ["<|transcribe|>", "<|startoflm|>", "<|startofprev|>", "<|nospeech|>"]
    special += ["<|notimestamps|>"]
    for token in special:
        vocabulary[token] = len(vocabulary)
    vocab_file, merges_file = folder / "vocab.json", folder / "merges.txt"
    vocab_file.write_text(json.dumps(vocabulary))
    merges_file.write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    tokenizer = tokenizer_class(
        vocab=str(vocab_file), merges=str(merges_file), unk_token="<|endoftext|>",
        bos_token="<|endoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>",
    )  # fmt: skip
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    stamps = [f"<|{0.02 * index:.2f}|>" for index in range(101)]
    tokenizer.add_tokens(stamps)
    return tokenizer


def make_adapter(
    base: Path,
    folder: Path,
    *,
    rank: int,
    seed: int,
    alpha: float = 8.0,
    targets: list[str] | None = None,
) -> Path:
    """Write a PEFT adapter with random A and B for the model in `base`."""
    from peft import LoraConfig, get_peft_model
    from transformers import WhisperForConditionalGeneration

    torch.manual_seed(seed)
    model = get_peft_model(
        WhisperForConditionalGeneration.from_pretrained(base),
        LoraConfig(
            r=rank,
            lora_alpha=alpha,
            target_modules=targets or ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
        ),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.15)
    model.save_pretrained(folder)
    return folder
