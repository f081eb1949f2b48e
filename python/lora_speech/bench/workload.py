"""The models that are measured: Whisper in the released shapes with random weights, or real ones.

Speed depends on shapes, not on what the weights say, so nothing needs to be downloaded.
"""

from __future__ import annotations

import copy
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lora_speech.bench.settings import MIXED_RANKS, RANK, RELEASED, BenchSettings, model_key
from lora_speech.decoding.prompts import default_language, prompt_tokens, special_tokens
from lora_speech.errors import ModelError
from lora_speech.models.loading import load_base
from lora_speech.models.whisper import WHISPER

# The multilingual checkpoints' own numbers.
VOCABULARY, END, START, FIRST_LANGUAGE = 51865, 50257, 50258, 50259
TRANSLATE, TRANSCRIBE, NO_TIMESTAMPS = 50358, 50359, 50363


def build_model(model: str) -> Any:
    """A `WhisperForConditionalGeneration` in fp32 that suppresses nothing."""
    if model in RELEASED:
        whisper = _random_model(*RELEASED[model])
    else:
        loaded = load_base(model)
        if loaded.family is not WHISPER:
            raise ModelError(f"--models: expected a Whisper, got a {loaded.family.name}: {model}")
        whisper = loaded.model
    generation = whisper.generation_config
    # Lists of suppressed tokens cost each decoder something else; only the end is suppressed.
    generation.suppress_tokens = generation.begin_suppress_tokens = None
    generation.forced_decoder_ids = generation.max_length = None
    generation.return_timestamps = False
    return whisper.requires_grad_(False).eval()


def with_lora(model: Any) -> Any:
    """PEFT's LoRA on every projection of encoder and decoder, with random A and B, live."""
    from peft import get_peft_model

    torch.manual_seed(1)
    return get_peft_model(model, _lora(RANK)).eval()


def _lora(rank: int) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=list(WHISPER.lora_targets),
        init_lora_weights=False,
    )


class Workload:
    """One model with one adapter, as each contestant needs it.

    Parameters
    ----------
    model : str
        As in `BenchSettings.models`.
    settings : BenchSettings
        Of the run.
    scratch : Path
        Folder for adapters and conversions.
    """

    def __init__(self, model: str, settings: BenchSettings, scratch: Path) -> None:
        self.key = model_key(model)
        self.folder = scratch / self.key
        plain = build_model(model)
        self.config = plain.config
        self.tokens = special_tokens(plain)
        self.language = default_language(self.tokens)
        self.prompt = prompt_tokens(self.tokens, self.language)
        room = self.tokens.max_positions - len(self.prompt)
        self.new_tokens = min(settings.new_tokens, room)
        self.plain = copy.deepcopy(plain)
        self.adapted = with_lora(plain)
        self.adapter_folder = self.folder / "adapter"
        self.adapted.save_pretrained(self.adapter_folder)

    @cached_property
    def mixed(self) -> tuple[Any, dict[str, Path]]:
        """The model with an adapter of each of `MIXED_RANKS` and one of their mean rank.

        Returns
        -------
        model : PeftModel
            With all of them.
        folders : dict
            Of each by its name, the mean's last.
        """
        model = copy.deepcopy(self.adapted)
        ranks = {f"rank{rank}": rank for rank in MIXED_RANKS}
        ranks["mean"] = sum(MIXED_RANKS) // len(MIXED_RANKS)
        for name, rank in ranks.items():
            model.add_adapter(name, _lora(rank))
        model.save_pretrained(self.folder / "mixed", selected_adapters=list(ranks))
        return model.eval(), {name: self.folder / "mixed" / name for name in ranks}

    @cached_property
    def merged(self) -> Any:
        """The model with the adapter merged, for peers that can serve none."""
        return copy.deepcopy(self.adapted).merge_and_unload()

    def features(self, batch: int) -> torch.Tensor:
        """Input [batch, mel bands, frames] of one window, with the spread of real features."""
        shape = (batch, self.config.num_mel_bins, 2 * self.config.max_source_positions)
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.3

    def check(self, rows: list[int], batch: int) -> None:
        """Refuse a decoding that made more or fewer tokens than all have to."""
        if rows != [self.new_tokens] * batch:
            raise ModelError(
                f"expected {self.new_tokens} new tokens in each of {batch} rows, got {rows}: the "
                "comparison would not be fair"
            )

    def describe(self) -> dict[str, Any]:
        """What results are about."""
        config = self.config
        return {
            "width": config.d_model,
            "encoder_layers": config.encoder_layers,
            "decoder_layers": config.decoder_layers,
            "vocabulary": config.vocab_size,
            "window_seconds": round(config.max_source_positions * 0.02, 2),
            "prompt_tokens": len(self.prompt),
            "new_tokens": self.new_tokens,
            "rank": RANK,
        }


def _random_model(width: int, layers: int, heads: int) -> Any:
    from transformers import GenerationConfig, WhisperConfig, WhisperForConditionalGeneration
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    ends: dict[str, Any] = {"bos_token_id": END, "eos_token_id": END, "pad_token_id": END}
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=VOCABULARY,
            d_model=width,
            encoder_layers=layers,
            decoder_layers=layers,
            encoder_attention_heads=heads,
            decoder_attention_heads=heads,
            encoder_ffn_dim=4 * width,
            decoder_ffn_dim=4 * width,
            decoder_start_token_id=START,
            **ends,
        )
    )
    codes = list(LANGUAGES)[: TRANSLATE - FIRST_LANGUAGE]
    model.generation_config = GenerationConfig(
        decoder_start_token_id=START,
        is_multilingual=True,
        lang_to_id={f"<|{code}|>": FIRST_LANGUAGE + i for i, code in enumerate(codes)},
        task_to_id={"translate": TRANSLATE, "transcribe": TRANSCRIBE},
        no_timestamps_token_id=NO_TIMESTAMPS,
        **ends,
    )
    return model
