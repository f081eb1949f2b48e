"""The lean greedy decode gives the tokens of transformers: plain, swapped, with adapters."""

from __future__ import annotations

import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tiny_whisper import make_adapter, tone

import lora_kernels as lk
from lora_kernels.nn import int8_rows
from lora_speech.data.features import extract_features
from lora_speech.decoding import recorded_parts
from lora_speech.decoding.adapter_rows import AdapterRows
from lora_speech.decoding.greedy import greedy_decode
from lora_speech.decoding.projections import joint_projection, projection
from lora_speech.decoding.prompts import TimestampRules, prompt_tokens, special_tokens
from lora_speech.decoding.whisper_decoder import WhisperDecoder
from lora_speech.errors import ModelError
from lora_speech.models.loading import SpeechModel, load_base, load_for_serving


@pytest.fixture
def speech(tiny_whisper_folder: Path) -> SpeechModel:
    """A fresh model: swapping and quantizing change it."""
    return load_base(tiny_whisper_folder)


@pytest.fixture
def features(speech: SpeechModel) -> torch.Tensor:
    tones = [tone(0.5 + 0.3 * i, frequency=200.0 * (i + 1)) for i in range(5)]
    return extract_features(speech, tones)["input_features"]


@torch.inference_mode()
def stepwise(
    speech: SpeechModel,
    features: torch.Tensor,
    *,
    language: str = "en",
    timestamps: bool = False,
    limit: int | None = None,
) -> list[list[int]]:
    """Greedy decoding by whole forward passes and transformers' own logits processors."""
    from transformers.generation.logits_process import (
        SuppressTokensAtBeginLogitsProcessor,
        SuppressTokensLogitsProcessor,
        WhisperTimeStampLogitsProcessor,
    )

    model, tokens = speech.model, special_tokens(speech.model)
    prompt = prompt_tokens(tokens, language, timestamps=timestamps)
    processors = [
        SuppressTokensLogitsProcessor(tokens.suppressed),
        SuppressTokensAtBeginLogitsProcessor(tokens.suppressed_first, len(prompt)),
    ]
    if timestamps:
        generation = model.generation_config
        processors.append(WhisperTimeStampLogitsProcessor(generation, begin_index=len(prompt)))
    limit = limit or tokens.max_positions - len(prompt)
    result = []
    for row in features:
        ids = torch.tensor([prompt])
        while ids.shape[1] < len(prompt) + limit:
            scores = model(row[None], decoder_input_ids=ids, use_cache=False).logits[:, -1]
            for process in processors:
                scores = process(ids, scores)
            chosen = scores.argmax(-1)
            if chosen.item() == tokens.end:
                break
            ids = torch.cat([ids, chosen[None]], dim=1)
        result.append(ids[0, len(prompt) :].tolist())
    return result


def test_same_tokens_as_generate(speech: SpeechModel, features: torch.Tensor) -> None:
    # generate() cuts its output at timestamps, which a random model emits unasked.
    tokens = special_tokens(speech.model)
    stamps = list(range(tokens.first_timestamp, speech.model.config.vocab_size))
    speech.model.generation_config.suppress_tokens = [*tokens.suppressed, *stamps]
    for language in ("en", "es"):
        ours = greedy_decode(speech.model, features, language=language)
        theirs = speech.model.generate(features, language=language, task="transcribe")
        trimmed = [[t for t in row.tolist() if t != tokens.end] for row in theirs]
        assert ours.tokens == trimmed
        assert ours.languages == [language] * 5
    assert len({len(row) for row in ours.tokens}) > 1  # rows end at different times


def test_same_tokens_as_whole_forward_passes(speech: SpeechModel, features: torch.Tensor) -> None:
    expected = stepwise(speech, features)
    assert greedy_decode(speech.model, features, language="en").tokens == expected
    lk.swap(speech.model)
    assert greedy_decode(speech.model, features, language="en").tokens == expected
    assert len({len(row) for row in expected}) > 1  # some rows end early: the batch shrinks


def test_timestamp_rules_are_those_of_transformers(
    speech: SpeechModel, features: torch.Tensor
) -> None:
    expected = stepwise(speech, features, timestamps=True)
    ours = greedy_decode(speech.model, features, language="en", timestamps=True)
    assert ours.tokens == expected
    first = special_tokens(speech.model).first_timestamp
    assert all(row[0] >= first for row in ours.tokens)


@torch.inference_mode()
def test_decoding_starts_from_the_encoders_output(
    speech: SpeechModel, features: torch.Tensor
) -> None:
    encoded = speech.model.get_encoder()(features).last_hidden_state
    expected = greedy_decode(speech.model, features, language="en")
    assert greedy_decode(speech.model, encoded=encoded, language="en") == expected
    with pytest.raises(ModelError, match=r"either features or encoded, got both"):
        greedy_decode(speech.model, features, encoded=encoded)
    with pytest.raises(ModelError, match=r"either features or encoded, got neither"):
        greedy_decode(speech.model)
    with pytest.raises(ModelError, match=r"encoded: expected.*positions, width.*got \[100, 64\]"):
        greedy_decode(speech.model, encoded=encoded[0])


def test_language_detection(speech: SpeechModel, features: torch.Tensor) -> None:
    detected = speech.model.detect_language(features).tolist()
    ours = greedy_decode(speech.model, features)
    tokens = special_tokens(speech.model)
    assert [tokens.languages[code] for code in ours.languages] == detected
    again = greedy_decode(speech.model, features, language=ours.languages)
    assert again.tokens == ours.tokens
    mixed = greedy_decode(speech.model, features, language=["es", None, "Spanish", None, "en"])
    assert mixed.languages[0] == mixed.languages[2] == "es"


def test_length_limits(speech: SpeechModel, features: torch.Tensor) -> None:
    exact = greedy_decode(speech.model, features, language="en", max_new_tokens=7, min_new_tokens=7)
    assert [len(row) for row in exact.tokens] == [7] * 5
    assert stepwise(speech, features, limit=3) == [
        row[:3] for row in greedy_decode(
            speech.model, features, language="en", max_new_tokens=3
        ).tokens
    ]  # fmt: skip
    with pytest.raises(ModelError, match=r"max_new_tokens: expected 1 to 44 .* got 45"):
        greedy_decode(speech.model, features, language="en", max_new_tokens=45)


def test_each_row_alone_gives_the_same(speech: SpeechModel, features: torch.Tensor) -> None:
    together = greedy_decode(speech.model, features, language="en").tokens
    for row in range(5):
        alone = greedy_decode(speech.model, features[row : row + 1], language="en").tokens
        assert alone == [together[row]]


@pytest.mark.parametrize("int8", [False, True])
def test_a_batch_mixes_adapters_and_the_base(
    tiny_whisper_folder: Path, features: torch.Tensor, tmp_path: Path, int8: bool
) -> None:
    folders = {
        "low": make_adapter(tiny_whisper_folder, tmp_path / "low", rank=3, seed=1),
        "high": make_adapter(
            tiny_whisper_folder, tmp_path / "high", rank=8, seed=2, targets=["q_proj", "fc1"]
        ),
    }
    speech = load_for_serving(tiny_whisper_folder, folders, int8=int8)
    names = ["low", None, "high", "low", "high"]
    mixed = greedy_decode(speech.model, features, adapters=names, language="en")
    for row, name in enumerate(names):
        alone = greedy_decode(speech.model, features[row : row + 1], adapters=[name], language="en")
        assert alone.tokens == [mixed.tokens[row]]
    base = greedy_decode(speech.model, features, language="en")
    assert base.tokens[1] == mixed.tokens[1]
    assert base.tokens != mixed.tokens
    with lk.use_adapters(names):
        assert greedy_decode(speech.model, features, language="en").tokens == mixed.tokens
    one = greedy_decode(speech.model, features, adapters="low", language="en")
    assert one.tokens[0] == mixed.tokens[0]


def test_a_screened_vocabulary_gives_the_same_tokens(
    tiny_whisper_folder: Path, features: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = []
    for least in (0, math.inf):
        monkeypatch.setattr("lora_speech.decoding.recorded_parts.SCREENED_BYTES", least)
        speech = load_base(tiny_whisper_folder)
        torch.manual_seed(0)
        speech.model.resize_token_embeddings(20_000, mean_resizing=False)
        with torch.no_grad():  # as wide as those that were there
            speech.model.model.decoder.embed_tokens.weight[1000:].normal_(0.0, 0.04)
        lk.quantize(speech.model)
        decoder = WhisperDecoder(speech.model, AdapterRows.of(speech.model, None, 1))
        assert decoder.parts is not None
        assert (decoder.parts.screen is None) == (least == math.inf)
        for rows in (features[:1], features[:4], features):
            tokens.append(greedy_decode(speech.model, rows, language="en").tokens)
    assert tokens[:3] == tokens[3:]
    assert max(max(row) for row in tokens[0]) > 1000


def test_what_is_packed_follows_its_weight_to_another_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recorded_parts, "SCREENED_BYTES", 0)
    module = torch.nn.Linear(64, 256, bias=False)
    packed = recorded_parts.packed_once(module)
    assert recorded_parts.packed_once(module) is packed
    assert recorded_parts.screen_once(module, packed) is not None
    # As after a move: the parameter is the same, with other memory.
    elsewhere = packed.to("meta")
    recorded_parts._packed[module] = (*recorded_parts._packed[module][:2], elsewhere)
    assert torch.equal(recorded_parts.packed_once(module), packed)
    # Whose kernels read all of a vocabulary are not given a screen, half as large again.
    assert recorded_parts.screen_once(module, elsewhere) is None


def test_threads_that_pack_at_once_get_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that are kept know each other's weights by the tensors."""
    quantize_weight = int8_rows.quantize_weight

    def slowly(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        time.sleep(0.05)
        return quantize_weight(weight)

    monkeypatch.setattr(int8_rows, "quantize_weight", slowly)
    module = torch.nn.Linear(64, 256, bias=False)
    with ThreadPoolExecutor(3) as threads:
        packed = list(threads.map(recorded_parts.packed_once, [module] * 3))
    assert packed[0] is packed[1] is packed[2]


def test_same_tokens_as_peft(
    tiny_whisper_folder: Path, features: torch.Tensor, tmp_path: Path
) -> None:
    from peft import PeftModel

    folder = make_adapter(tiny_whisper_folder, tmp_path / "a", rank=4, seed=3)
    plain = load_base(tiny_whisper_folder)
    expected = stepwise(
        SpeechModel(
            PeftModel.from_pretrained(plain.model, str(folder)).eval(),
            plain.processor,
            plain.family,
            "peft",
        ),
        features,
    )
    served = load_for_serving(tiny_whisper_folder, {"a": folder})
    assert greedy_decode(served.model, features, adapters="a", language="en").tokens == expected
    trained = PeftModel.from_pretrained(load_base(tiny_whisper_folder).model, str(folder)).eval()
    assert greedy_decode(trained, features, language="en").tokens == expected
    lk.swap(trained)
    assert greedy_decode(trained, features, language="en").tokens == expected


def test_bad_requests(speech: SpeechModel, features: torch.Tensor) -> None:
    with pytest.raises(ModelError, match=r"\(en, es\), got 'xx'"):
        greedy_decode(speech.model, features, language="xx")
    with pytest.raises(ModelError, match=r"one per row \(5\), got 2"):
        greedy_decode(speech.model, features, language=["en", "es"])
    with pytest.raises(ModelError, match="task: expected one of transcribe, translate"):
        greedy_decode(speech.model, features, task="sing")
    with pytest.raises(ModelError, match="features: expected a tensor"):
        greedy_decode(speech.model, features[0])
    with pytest.raises(ModelError, match=r"one \(or None\) per row \(5\), got 2"):
        greedy_decode(speech.model, features, adapters=["a", None])
    with pytest.raises(lk.AdapterError, match="'nobody'"):
        greedy_decode(speech.model, features, adapters="nobody")
    with pytest.raises(ModelError, match="expected a WhisperForConditionalGeneration"):
        greedy_decode(torch.nn.Linear(2, 2), features)


def test_timestamp_rules_alone(speech: SpeechModel) -> None:
    tokens = special_tokens(speech.model)
    rules = TimestampRules(tokens)
    begin = tokens.first_timestamp
    logits = torch.zeros(3, speech.model.config.vocab_size)
    rules(logits, [[], [begin, 5], [begin, 5, begin + 3]])
    assert torch.isinf(logits[0, :begin]).all()
    assert math.isinf(logits[0, begin + 51])  # beyond the largest first timestamp
    assert torch.isinf(logits[1, begin : begin + 1]).all()
    assert not math.isinf(logits[2, begin + 3])  # the pair's second may repeat
    assert torch.isinf(logits[2, begin : begin + 3]).all()


@pytest.mark.parametrize("int8", [False, True])
def test_joint_projection_equals_the_separate_ones(
    tiny_whisper_folder: Path, tmp_path: Path, int8: bool
) -> None:
    folders = {
        "a": make_adapter(tiny_whisper_folder, tmp_path / "a", rank=2, seed=1, alpha=3.0),
        "q": make_adapter(tiny_whisper_folder, tmp_path / "q", rank=5, seed=2, targets=["q_proj"]),
    }
    speech = load_for_serving(tiny_whisper_folder, folders, int8=int8)
    attention = speech.model.model.decoder.layers[0].self_attn
    modules = [attention.q_proj, attention.k_proj, attention.v_proj]
    for batch, tokens in ((1, 1), (3, 1), (3, 4)):
        names = ["a", None, "q"][:batch]
        rows = AdapterRows.of(speech.model, names, batch)
        x = torch.randn(batch, tokens, 64)
        with torch.inference_mode():
            joint = joint_projection(modules, rows, 2)(x)
            for module, got in zip(modules, joint, strict=True):
                assert got.is_contiguous()
                expected = projection(module, rows)(x, None)
                torch.testing.assert_close(got.reshape(expected.shape), expected)


def test_hooks_and_replaced_forwards_are_called(
    speech: SpeechModel, features: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = speech.model.model.decoder.layers[0].fc1
    calls: list[str] = []
    handle = layer.register_forward_pre_hook(lambda module, inputs: calls.append("hook"))
    greedy_decode(speech.model, features, language="en", max_new_tokens=2)
    handle.remove()
    assert "hook" in calls
    forward = layer.forward

    def replaced(x: torch.Tensor) -> torch.Tensor:
        calls.append("forward")
        return forward(x)

    monkeypatch.setattr(layer, "forward", replaced)
    greedy_decode(speech.model, features, language="en", max_new_tokens=2)
    assert "forward" in calls


def test_an_adapter_of_another_model_is_not_taken_for_the_base(
    tiny_whisper_folder: Path, tmp_path: Path, features: torch.Tensor
) -> None:
    folder = make_adapter(tiny_whisper_folder, tmp_path / "med", rank=2, seed=3)
    other = load_for_serving(tiny_whisper_folder, {"med": folder})
    plain = load_base(tiny_whisper_folder)
    greedy_decode(other.model, features, adapters="med", language="en", max_new_tokens=2)
    with pytest.raises(ModelError, match=r"adapters.*med.*load_adapter"):
        greedy_decode(plain.model, features, adapters="med", language="en", max_new_tokens=2)


def test_an_adapter_of_the_vocabulary_is_not_left_out(
    tiny_whisper_folder: Path, features: torch.Tensor, tmp_path: Path
) -> None:
    """A recorded step has the vocabulary's product without LoRA, so it must not be taken then."""
    folder = make_adapter(
        tiny_whisper_folder, tmp_path / "a", rank=4, seed=3, targets=["q_proj", "proj_out"]
    )
    served = load_for_serving(tiny_whisper_folder, {"a": folder}, int8=True)
    decoder = WhisperDecoder(served.model, AdapterRows.of(served.model, ["a"], 1))
    assert decoder.parts is None
    plain = load_for_serving(tiny_whisper_folder, {}, int8=True)
    assert WhisperDecoder(plain.model, AdapterRows.of(plain.model, None, 1)).parts is not None
    with_it = greedy_decode(served.model, features, adapters="a", language="en").tokens
    assert (
        with_it != greedy_decode(served.model, features, adapters=[None] * 5, language="en").tokens
    )
