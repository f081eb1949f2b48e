"""CTranslate2's folder where it is used: faster-whisper's `transcribe`, on windows of 30 s."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from tiny_whisper import make_adapter, tone

from lora_speech.data.audio import load_audio
from lora_speech.data.features import extract_features
from lora_speech.decoding.greedy import greedy_decode
from lora_speech.export.run import export_model
from lora_speech.models.loading import load_base
from lora_speech.transcription import decode_text

pytest.importorskip("ctranslate2")
pytest.importorskip("faster_whisper")

TEXT, STAMPS = 50_257, 1501
"""Tokens before the special ones, and timestamps, of the released multilingual Whispers."""

NEW = 24
"""Tokens per recording: a random model would go on for long."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens, window and features of released multilingual Whispers; tiny random weights."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import (
        GenerationConfig,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperProcessor,
        WhisperTokenizer,
    )
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    folder = tmp_path_factory.mktemp("released") / "base"
    folder.mkdir()
    letters = sorted(ByteLevel.alphabet())
    texts = [*letters, *(a + b for a in letters for b in letters)][: TEXT - 1]
    texts.append("")  # by which CTranslate2 tells who knows several languages
    languages = [f"<|{code}|>" for code in list(LANGUAGES)[:99]]
    special = ["<|endoftext|>", "<|startoftranscript|>", *languages, "<|translate|>"]
    special += ["<|transcribe|>", "<|startoflm|>", "<|startofprev|>", "<|nospeech|>"]
    special += ["<|notimestamps|>"]
    ids = {token: index for index, token in enumerate([*texts, *special])}
    (folder / "vocab.json").write_text(json.dumps(ids))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    end = "<|endoftext|>"
    tokenizer = WhisperTokenizer(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"),
        unk_token=end, bos_token=end, eos_token=end, pad_token=end,
    )  # fmt: skip
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    tokenizer.add_tokens([f"<|{0.02 * index:.2f}|>" for index in range(STAMPS)])
    assert len(tokenizer) == 51_865
    config = WhisperConfig(
        vocab_size=len(tokenizer), num_mel_bins=128, d_model=64, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=128,
        decoder_ffn_dim=128, decoder_start_token_id=ids["<|startoftranscript|>"],
        eos_token_id=ids[end], pad_token_id=ids[end], bos_token_id=ids[end],
    )  # fmt: skip
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():  # weights this wide make outputs vary with the audio
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "encoder.embed_positions" not in name:
                parameter.normal_(0.0, 0.04 if "embed" in name else 0.3)
        rows = model.model.decoder.embed_tokens.weight
        rows[len(letters) : TEXT] = 0.0  # with fewer that are likely, they are not as near
        rows[len(ids) :] = 0.0
    model.generation_config = GenerationConfig(
        decoder_start_token_id=config.decoder_start_token_id, eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id, bos_token_id=config.bos_token_id, max_length=448,
        is_multilingual=True, lang_to_id={token: ids[token] for token in languages},
        task_to_id={"transcribe": ids["<|transcribe|>"], "translate": ids["<|translate|>"]},
        no_timestamps_token_id=ids["<|notimestamps|>"],
        suppress_tokens=list(range(ids["<|startoftranscript|>"], len(ids))),
        begin_suppress_tokens=[220, config.eos_token_id],
    )  # fmt: skip
    model.save_pretrained(folder, safe_serialization=True)
    WhisperProcessor(WhisperFeatureExtractor(feature_size=128), tokenizer).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_transcribe_says_what_torch_says(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder by itself: tokenizer, features, languages and the merged adapter."""
    from faster_whisper import WhisperModel

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # what is missing must not come from elsewhere
    # A whole window: faster-whisper fills a shorter one up with features of its own.
    noise = np.random.default_rng(0).normal(0.0, 0.2, 480_000)
    recordings = {tmp_path / "tone.wav": tone(30.0), tmp_path / "noise.wav": noise}
    for path, samples in recordings.items():
        soundfile.write(path, samples, 16_000)
    me = make_adapter(base, tmp_path / "me", rank=3, seed=3)
    report = export_model(
        base,
        "ctranslate2",
        tmp_path / "out",
        adapters={"me": me},
        check=list(recordings)[:1],
        max_wer=9.0,
    )
    whisper = WhisperModel(str(report.output), device="cpu", cpu_threads=1)
    assert whisper.model.is_multilingual
    model, heard, plain = report.plan.model, [], load_base(base).model
    # By default faster-whisper has a list of its own, of symbols that nobody says.
    suppressed = list(model.model.generation_config.suppress_tokens)
    for path in recordings:
        for language in ("en", "es"):
            segments, info = whisper.transcribe(
                str(path), language=language, beam_size=1, temperature=0.0,
                max_new_tokens=2 * NEW,  # CTranslate2 makes about half as many
                without_timestamps=True, suppress_tokens=suppressed,
                condition_on_previous_text=False,
                compression_ratio_threshold=None, log_prob_threshold=None, no_speech_threshold=None,
            )  # fmt: skip
            first = next(iter(segments))
            features = extract_features(model, [load_audio(path)])["input_features"]
            [expected] = greedy_decode(
                model.model, features, language=language, max_new_tokens=NEW
            ).tokens
            assert info.language == language and info.duration == pytest.approx(30.0)
            assert first.tokens[:NEW] == expected
            assert first.text.strip() == decode_text(model, first.tokens)
            heard.append(expected)
            without = greedy_decode(plain, features, language=language, max_new_tokens=NEW).tokens
            assert without != [expected]
    assert all(len(tokens) > 3 for tokens in heard) and len({*map(tuple, heard)}) == len(heard)
