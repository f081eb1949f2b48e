"""The base model that ships: its folder, its word error rate, language identification, timestamps.

Speech is synthesised afresh, so these tests hear what no training run ever stored.
"""

from __future__ import annotations

import jiwer
import numpy as np
import pytest
import torch
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from lora_speech.models.loading import shipped_model_path
from lora_speech.pretraining.evaluation import speak_all, transcribe
from lora_speech.synthetic import corpus, synthesis

FOLDER = shipped_model_path()
# Speakers and sentences drawn for these tests only.
SEED = 77

pytestmark = pytest.mark.skipif(
    not synthesis.is_available(), reason="espeak-ng is missing: pip install espeakng-loader"
)


@pytest.fixture(scope="module")
def whisper() -> WhisperForConditionalGeneration:
    return WhisperForConditionalGeneration.from_pretrained(FOLDER).eval()


@pytest.fixture(scope="module")
def processor() -> WhisperProcessor:
    return WhisperProcessor.from_pretrained(FOLDER)


def features(processor: WhisperProcessor, waves: list[np.ndarray]) -> torch.Tensor:
    batch = processor(waves, sampling_rate=synthesis.SAMPLING_RATE, return_tensors="pt")
    return batch.input_features


def voices(language: str, count: int) -> list[synthesis.Speaker]:
    speakers = synthesis.seen_speakers(SEED, language=language)
    return [speakers[i] for i in np.random.default_rng(SEED).permutation(len(speakers))[:count]]


def test_the_folder_is_small_and_complete(whisper: WhisperForConditionalGeneration) -> None:
    assert (FOLDER / "model.safetensors").stat().st_size <= 8_000_000
    for name in ("config.json", "generation_config.json", "preprocessor_config.json", "README.md"):
        assert (FOLDER / name).is_file(), name
    config = whisper.config
    assert config.d_model == 64 * config.encoder_attention_heads
    assert {p.dtype for p in whisper.parameters()} == {torch.float32}
    assert whisper.get_output_embeddings().weight is whisper.get_input_embeddings().weight


def test_special_tokens_stand_in_whispers_order(processor: WhisperProcessor) -> None:
    tokenizer = processor.tokenizer
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    names = ["<|startoftranscript|>", "<|en|>", "<|zh|>", "<|de|>", "<|es|>"]
    assert tokenizer.convert_tokens_to_ids(names) == [end + 1 + i for i in range(5)]
    names = ["<|translate|>", "<|transcribe|>", "<|startoflm|>", "<|startofprev|>"]
    names += ["<|nospeech|>", "<|notimestamps|>", "<|0.00|>", "<|0.02|>"]
    first = tokenizer.convert_tokens_to_ids(names[0])
    assert tokenizer.convert_tokens_to_ids(names) == [first + i for i in range(8)]
    assert tokenizer.convert_tokens_to_ids("<|30.00|>") == len(tokenizer) - 1


def test_the_tokenizer_gives_texts_back(processor: WhisperProcessor) -> None:
    tokenizer = processor.tokenizer
    for text in ("set a timer for ten minutes", "llama a maría mañana", "Ünseen, words!"):
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.normalize("The grey theatre!") == "the gray theater"


@pytest.mark.parametrize(("language", "count"), [("en", 120), ("es", 60)])
def test_word_error_rate_on_seen_voices(
    whisper: WhisperForConditionalGeneration,
    processor: WhisperProcessor,
    language: str,
    count: int,
) -> None:
    said = corpus.sentences(count, language=language, seed=SEED, split="held_out")
    waves = speak_all(said, voices(language, count))
    heard = transcribe(whisper, processor, waves, language=language)
    assert jiwer.wer(said, heard) <= 0.05


def test_unseen_accents_leave_something_to_adapt(
    whisper: WhisperForConditionalGeneration, processor: WhisperProcessor
) -> None:
    said = corpus.sentences(40, seed=SEED, split="held_out")
    for accent, least in zip(synthesis.HELD_OUT_ACCENTS[:2], (0.4, 0.1), strict=True):
        speakers = synthesis.accent_speakers(accent, 20, SEED)
        waves = speak_all(said, speakers, snr_db=10.0)
        heard = transcribe(whisper, processor, waves, language="en")
        assert least < jiwer.wer(said, heard) < 0.9


def test_languages_are_told_apart(
    whisper: WhisperForConditionalGeneration, processor: WhisperProcessor
) -> None:
    waves, truth = [], []
    for language in corpus.LANGUAGES:
        said = corpus.sentences(20, language=language, seed=SEED, split="held_out")
        waves += speak_all(said, voices(language, 20))
        truth += [processor.tokenizer.convert_tokens_to_ids(f"<|{language}|>")] * 20
    detected = whisper.detect_language(features(processor, waves)).tolist()
    assert np.mean(np.array(detected) == truth) >= 0.9


def test_timestamps_find_the_speech(
    whisper: WhisperForConditionalGeneration, processor: WhisperProcessor
) -> None:
    said = corpus.sentences(20, seed=SEED, split="held_out")
    rng = np.random.default_rng(SEED)
    waves, edges = [], []
    for samples in speak_all(said, voices("en", 20)):
        lead = int(rng.integers(0, synthesis.SAMPLING_RATE))
        waves.append(np.concatenate([np.zeros(lead, np.float32), samples]))
        edges.append((lead / synthesis.SAMPLING_RATE, len(waves[-1]) / synthesis.SAMPLING_RATE))
    tokens = whisper.generate(
        features(processor, waves), language="en", task="transcribe", return_timestamps=True
    )
    errors, texts = [], []
    for row, (start, end) in zip(tokens, edges, strict=True):
        segments = processor.tokenizer.decode(row, output_offsets=True)["offsets"]
        texts.append(" ".join(segment["text"].strip() for segment in segments))
        errors.append(abs(segments[0]["timestamp"][0] - start))
        errors.append(abs(segments[-1]["timestamp"][1] - end))
    assert np.median(errors) <= 0.1
    assert jiwer.wer(said, texts) <= 0.1


def test_silence_has_no_words(
    whisper: WhisperForConditionalGeneration, processor: WhisperProcessor
) -> None:
    silence = np.zeros(synthesis.SAMPLING_RATE, np.float32)
    noise = synthesis.coloured_noise(3 * synthesis.SAMPLING_RATE, np.random.default_rng(0)) * 0.05
    assert transcribe(whisper, processor, [silence, noise], language="en") == ["", ""]
