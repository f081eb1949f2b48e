"""The base model's parts: tokenizer, feature extractor, an untrained Whisper, and its CTC head."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import nn
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from lora_speech.pretraining.data import CHARACTERS, IGNORED, Batch, token_id
from lora_speech.synthetic import corpus

CHUNK_SECONDS = 5
MELS = 80
POSITIONS = CHUNK_SECONDS * 50
TEXT_POSITIONS = 128
WORD_PIECES = 512

# British to American, for tokenizer.normalize().
SPELLINGS = {"colour": "color", "grey": "gray", "neighbour": "neighbor", "theatre": "theater"}


def build_tokenizer(seed: int = 0) -> WhisperTokenizer:
    """Train word pieces on the corpus and add Whisper's multilingual tokens in Whisper's order.

    Parameters
    ----------
    seed : int
        Draws the texts that the word pieces are counted on.
    """
    texts = [
        text
        for language, count in (("en", 20000), ("es", 8000))
        for text in corpus.sentences(count, language=language, seed=seed)
    ]
    pieces = ByteLevelBPETokenizer()
    pieces.train_from_iterator(texts, vocab_size=WORD_PIECES, show_progress=False)
    specials = [
        "<|endoftext|>",
        "<|startoftranscript|>",
        *(f"<|{code}|>" for code in LANGUAGES),
        *("<|translate|>", "<|transcribe|>", "<|startoflm|>", "<|startofprev|>"),
        *("<|nospeech|>", "<|notimestamps|>"),
    ]
    stamps = [f"<|{index * 0.02:.2f}|>" for index in range(1501)]
    with tempfile.TemporaryDirectory() as folder:
        pieces.save_model(folder)
        path = Path(folder)
        vocabulary = json.loads((path / "vocab.json").read_text(encoding="utf-8"))
        lines = (path / "merges.txt").read_text(encoding="utf-8").splitlines()
        (path / "normalizer.json").write_text(json.dumps(SPELLINGS), encoding="utf-8")
        tokenizer = WhisperTokenizer(
            vocab=vocabulary,
            merges=[tuple(line.split()) for line in lines if not line.startswith("#version")],
            normalizer_file=str(path / "normalizer.json"),
            additional_special_tokens=specials[1:],
            pad_token="<|endoftext|>",
            model_max_length=TEXT_POSITIONS,
        )
    # Timestamps are ordinary added tokens, as in OpenAI's models: decode() shows them on request.
    tokenizer.add_tokens(stamps)
    return tokenizer


def build_extractor() -> WhisperFeatureExtractor:
    """Log-mel features at 16 kHz in windows of CHUNK_SECONDS."""
    return WhisperFeatureExtractor(feature_size=MELS, chunk_length=CHUNK_SECONDS)


def build_model(
    tokenizer: WhisperTokenizer, *, width: int, encoder_layers: int, decoder_layers: int
) -> WhisperForConditionalGeneration:
    """An untrained Whisper of heads of 64 channels, with a complete generation configuration.

    Parameters
    ----------
    tokenizer : WhisperTokenizer
        From :func:`build_tokenizer`.
    width : int
        Channels; a multiple of 64.
    encoder_layers, decoder_layers : int
        Depths.
    """
    end = token_id(tokenizer, "<|endoftext|>")
    start = token_id(tokenizer, "<|startoftranscript|>")
    config = WhisperConfig(
        vocab_size=len(tokenizer),
        num_mel_bins=MELS,
        d_model=width,
        encoder_layers=encoder_layers,
        decoder_layers=decoder_layers,
        encoder_attention_heads=width // 64,
        decoder_attention_heads=width // 64,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        max_source_positions=POSITIONS,
        max_target_positions=TEXT_POSITIONS,
        decoder_start_token_id=start,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        use_cache=True,
        tie_word_embeddings=True,
        # Whisper's 0.02 suits its widths; here the positions' sinusoids would drown the sounds.
        init_std=0.05,
    )
    model = WhisperForConditionalGeneration(config)
    model.generation_config = _generation_config(tokenizer, start, end)
    return model


def _generation_config(tokenizer: WhisperTokenizer, start: int, end: int) -> GenerationConfig:
    def identifier(token: str) -> int:
        return token_id(tokenizer, token)

    return GenerationConfig(
        decoder_start_token_id=start,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        max_length=TEXT_POSITIONS,
        is_multilingual=True,
        lang_to_id={f"<|{code}|>": identifier(f"<|{code}|>") for code in LANGUAGES},
        task_to_id={task: identifier(f"<|{task}|>") for task in ("transcribe", "translate")},
        no_timestamps_token_id=identifier("<|notimestamps|>"),
        prev_sot_token_id=identifier("<|startofprev|>"),
        # A segment may start anywhere in the window.
        max_initial_timestamp_index=POSITIONS,
        suppress_tokens=[
            identifier(f"<|{name}|>")
            for name in ("startoftranscript", "translate", "transcribe", "startoflm")
        ]
        + [identifier(f"<|{name}|>") for name in ("startofprev", "nospeech")],
        return_timestamps=False,
    )


class Trainee(nn.Module):
    """Whisper with a CTC head on its encoder, which finds the alignment early and is not shipped.

    Parameters
    ----------
    whisper : WhisperForConditionalGeneration
        Trained in place.
    """

    def __init__(self, whisper: WhisperForConditionalGeneration) -> None:
        super().__init__()
        self.whisper = whisper
        self.ctc = nn.Linear(whisper.config.d_model, len(CHARACTERS) + 1)

    def encode(self, features: torch.Tensor) -> torch.Tensor:
        """Encoder states [batch, frames / 2, width] of features [batch, mels, frames].

        The same layers as WhisperEncoder.forward, which insists on full windows.
        """
        encoder = self.whisper.model.encoder
        states = nn.functional.gelu(encoder.conv1(features))
        states = nn.functional.gelu(encoder.conv2(states)).transpose(1, 2)
        states = states + encoder.embed_positions.weight[: states.shape[1]]
        for layer in encoder.layers:
            states = layer(states, None)
            if isinstance(states, tuple):
                states = states[0]
        return encoder.layer_norm(states)

    def forward(
        self, features: torch.Tensor, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of the decoder [batch, length, words] and of CTC [batch, time, characters]."""
        states = self.encode(features)
        decoded = self.whisper.model.decoder(
            input_ids=tokens, encoder_hidden_states=states, use_cache=False
        ).last_hidden_state
        return self.whisper.proj_out(decoded), self.ctc(states)


def losses(
    logits: torch.Tensor, characters: torch.Tensor, batch: Batch
) -> tuple[torch.Tensor, torch.Tensor]:
    """The decoder's cross-entropy and the encoder's CTC loss, both per target."""
    decoder = nn.functional.cross_entropy(
        logits.float().flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED
    )
    log_probabilities = characters.float().log_softmax(-1).transpose(0, 1)
    steps, count = log_probabilities.shape[:2]
    encoder = nn.functional.ctc_loss(
        log_probabilities,
        batch.characters,
        torch.full((count,), steps),
        batch.character_lengths,
        zero_infinity=True,
    )
    return decoder, encoder
