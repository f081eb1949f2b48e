"""Live adapters by name: load, mix, replace, remove, save, and what is refused."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import (
    FRAMES,
    MELS,
    adapter,
    features,
    generate,
    labels,
    linear_names,
    peft_whisper,
    whisper,
)

import lora_kernels as lk
from lora_kernels.adapters import ACTIVE_SELECTION
from lora_kernels.integrations.whisper_generation import follow_rows

NAMES = ["a", "b", None]


def _logits(model, inputs, tokens):
    with torch.no_grad():
        return model(input_features=inputs, decoder_input_ids=tokens).logits


@pytest.fixture
def served():
    model = whisper()
    lk.add_adapter(model, adapter(model, 4, seed=1), "a")
    lk.add_adapter(model, adapter(model, 7, seed=2, names=_half(model)), "b")
    lk.swap(model)
    return model


def _half(model):
    return [f"model.{part}.layers.1.fc1" for part in ("encoder", "decoder")]


def test_mixed_batch_equals_each_row_alone(served):
    inputs, tokens = features(), labels()
    with lk.use_adapters(NAMES):
        mixed = _logits(served, inputs, tokens)
    for row, name in enumerate(NAMES):
        with lk.use_adapters(name):
            alone = _logits(served, inputs[row : row + 1], tokens[row : row + 1])
        torch.testing.assert_close(mixed[row : row + 1], alone, atol=2e-4, rtol=1e-4)
    with lk.use_adapters("a"):
        assert not torch.allclose(_logits(served, inputs, tokens), mixed, atol=1e-2)


@pytest.mark.parametrize("beams", [1, 5])
def test_generation_mixes_adapters_and_beams(served, beams):
    inputs = features()
    with lk.use_adapters(NAMES):
        mixed = generate(served, inputs, num_beams=beams)
    for row, name in enumerate(NAMES):
        with lk.use_adapters(name):
            alone = generate(served, inputs[row : row + 1], num_beams=beams)[0]
        assert torch.equal(mixed[row, : len(alone)], alone)


def test_outside_of_the_block_the_base_answers(served):
    inputs, tokens = features(), labels()
    expected = _logits(whisper(), inputs, tokens)
    torch.testing.assert_close(_logits(served, inputs, tokens), expected)
    with lk.use_adapters("a"), lk.use_adapters(None):
        torch.testing.assert_close(_logits(served, inputs, tokens), expected, atol=2e-4, rtol=1e-4)


def test_live_equals_peft_s_own_forward(tmp_path):
    model = peft_whisper(rank_pattern={"fc1": 6}, use_rslora=True).eval()
    inputs, tokens = features(), labels()
    expected = _logits(model, inputs, tokens)
    model.save_pretrained(tmp_path / "adapter")
    base = whisper()
    info = lk.load_adapter(base, tmp_path / "adapter")
    assert (info.name, info.index, info.ranks) == ("adapter", 0, (4, 6))
    with lk.use_adapters("adapter"):
        torch.testing.assert_close(_logits(base, inputs, tokens), expected, atol=2e-4, rtol=1e-4)
    lk.save_adapter(base, "adapter", tmp_path / "again")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        first, second = tmp_path / "adapter" / name, tmp_path / "again" / name
        assert first.read_bytes() == second.read_bytes()


def test_hot_swap_remove_and_reuse_of_indices(served):
    inputs, tokens = features(), labels()
    with lk.use_adapters("b"):
        b = _logits(served, inputs, tokens)
    lk.remove_adapter(served, "a")
    assert list(lk.list_adapters(served)) == ["b"]
    with lk.use_adapters("b"):
        torch.testing.assert_close(_logits(served, inputs, tokens), b)
        new = adapter(served, 2, seed=3)
        assert lk.add_adapter(served, new, "c").index == 0
        torch.testing.assert_close(_logits(served, inputs, tokens), b, atol=2e-4, rtol=1e-4)
        assert lk.add_adapter(served, new, "b").index == 1
        replaced = _logits(served, inputs, tokens)
        with lk.use_adapters("c"):
            torch.testing.assert_close(
                _logits(served, inputs, tokens), replaced, atol=2e-4, rtol=1e-4
            )
    lk.remove_adapter(served, "b")
    lk.remove_adapter(served, "c")
    assert lk.list_adapters(served) == {}
    fc1 = served.model.encoder.layers[0].fc1
    assert fc1.bank is None


@given(st.permutations(["a", "b", "c"]), st.integers(0, 2))
@settings(max_examples=10, deadline=None)
def test_order_of_loading_does_not_matter(order, removed):
    model = whisper(encoder_layers=1, decoder_layers=1)
    made = {name: adapter(model, i + 2, seed=i) for i, name in enumerate("abc")}
    for name in order:
        lk.add_adapter(model, made[name], name)
    lk.remove_adapter(model, order[removed])
    left = [name for name in "abc" if name != order[removed]]
    inputs, tokens = features(2), labels(2)
    with lk.use_adapters(left):
        mixed = _logits(model, inputs, tokens)
    fresh = whisper(encoder_layers=1, decoder_layers=1)
    for row, name in enumerate(left):
        lk.add_adapter(fresh, made[name], "only")
        with lk.use_adapters("only"):
            alone = _logits(fresh, inputs[row : row + 1], tokens[row : row + 1])
        torch.testing.assert_close(mixed[row : row + 1], alone, atol=2e-4, rtol=1e-4)


def test_a_shrinking_batch_keeps_each_utterance_s_adapter(served):
    """Utterances of different lengths, and a second temperature for some of them."""
    model, config = served, served.generation_config
    config.no_timestamps_token_id = 50
    config.lang_to_id, config.task_to_id, config.is_multilingual = {}, {}, False
    seen = []
    encoder = model.model.encoder

    def record(module, args, kwargs, output):
        features_in = args[0] if args else kwargs["input_features"]
        selection = ACTIVE_SELECTION.get()
        rows = [int(row[0, 0]) for row in features_in]
        names = selection.names if len(selection.names) > 1 else selection.names * len(rows)
        seen.append(list(zip(rows, names, strict=True)))

    encoder.register_forward_hook(record, with_kwargs=True)
    long = torch.randn(3, MELS, 3 * FRAMES)
    for row in range(3):
        long[row, 0] = row  # the first band tells which utterance a row is
    mask = torch.zeros(3, 3 * FRAMES, dtype=torch.long)
    for row, frames in enumerate((FRAMES, 3 * FRAMES, 2 * FRAMES)):
        mask[row, :frames] = 1
    with lk.use_adapters(["a", "b", None]) as selection, torch.no_grad():
        model.generate(
            long,
            attention_mask=mask,
            return_timestamps=True,
            max_new_tokens=4,
            temperature=(0.0, 0.2),
            logprob_threshold=-0.9,
        )
        assert ACTIVE_SELECTION.get() is selection
    expected = {0: "a", 1: "b", 2: None}
    assert all(expected[row] == name for call in seen for row, name in call)
    assert {len(call) for call in seen} >= {1, 3}
    lk.unswap(model)
    assert "generate_with_fallback" not in model.__dict__


def test_a_second_temperature_for_some_rows_keeps_their_adapters(served):
    decoded = []

    class Model(torch.nn.Module):
        """Decodes as Whisper does: again and again for the rows that are not good enough."""

        def generate_with_fallback(self, *, seek, batch_idx_map):
            rows = list(batch_idx_map)
            for attempt in range(3):
                decoded.append(list(zip(rows, ACTIVE_SELECTION.get().names, strict=True)))
                again = [self._need_fallback(row, attempt, i) for i, row in enumerate(rows)]
                rows = [row for row, (needed, _) in zip(rows, again, strict=True) if needed]

        def _need_fallback(self, seek_sequence, seek_outputs, index):
            return (seek_sequence, seek_outputs) in {(1, 0), (5, 0), (6, 0), (1, 1), (6, 1)}, False

    model = Model()
    follow_rows(model)
    names = ["a", "b", None, "b"]
    with lk.use_adapters(names) as selection:
        model.generate_with_fallback(seek=torch.zeros(8), batch_idx_map=[0, 1, 3, 5, 6])
        assert ACTIVE_SELECTION.get() is selection
    assert [[row for row, _ in call] for call in decoded] == [[0, 1, 3, 5, 6], [1, 5, 6], [1, 6]]
    assert all(names[row // 2] == name for call in decoded for row, name in call)


def test_unknown_names_list_the_known_ones(served):
    known = r"got 'nobody'; loaded: .*'a', .*'b'"
    with pytest.raises(lk.AdapterError, match=known), lk.use_adapters(["a", "nobody"]):
        pass
    with pytest.raises(lk.AdapterError, match="empty list"), lk.use_adapters([]):
        pass
    for function in (lk.remove_adapter, lk.merge, lk.get_adapter):
        with pytest.raises(lk.AdapterError, match="loaded: 'a', 'b'"):
            function(served, "zzz")
    with pytest.raises(lk.AdapterError, match="loaded: none"):
        lk.remove_adapter(whisper(), "a")


def test_a_batch_that_the_names_do_not_divide(served):
    with lk.use_adapters(["a", "b"]), pytest.raises(lk.AdapterError, match="multiple of the 2"):
        _logits(served, features(3), labels(3))


def test_an_adapter_of_another_model_names_the_nearest_modules():
    model, other = whisper(), whisper(d_model=16)
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(lk.AdapterError, match="another size"):
        lk.add_adapter(model, adapter(other, 4, seed=0), "wrong")
    layer = lk.AdapterLayer(torch.randn(2, 32), torch.randn(32, 2), 1.0)
    with pytest.raises(lk.AdapterError, match=r"nearest are .*self_attn\.q_proj"):
        lk.add_adapter(model, lk.Adapter({"model.encoder.layers.0.attn.query_proj": layer}), "x")
    with pytest.raises(lk.AdapterError, match="conv2"):
        lk.add_adapter(model, lk.Adapter({"model.encoder.conv2": layer}), "x")
    assert lk.list_adapters(model) == {}
    assert before == {name: type(module) for name, module in model.named_modules()}


def test_peft_models_are_refused():
    model = peft_whisper()
    plain = whisper()
    with pytest.raises(lk.UnsupportedError, match="unload"):
        lk.add_adapter(model, adapter(plain, 2, seed=0), "a")


def test_copies_and_dtypes_keep_their_adapters(served):
    inputs, tokens = features(), labels()
    with lk.use_adapters(NAMES):
        expected = _logits(served, inputs, tokens)
        copied = copy.deepcopy(served)
        lk.remove_adapter(served, "a")
        torch.testing.assert_close(_logits(copied, inputs, tokens), expected)
        low = copied.bfloat16()
        fc1 = low.model.encoder.layers[0].fc1
        assert fc1.bank.lora_a.dtype == torch.bfloat16
        assert fc1.bank.scales.dtype == torch.float32
        assert torch.isfinite(_logits(low, inputs.bfloat16(), tokens)).all()


def test_a_pickled_model_keeps_its_adapters(served):
    inputs, tokens = features(), labels()
    loaded = pickle.loads(pickle.dumps(served))
    with lk.use_adapters(NAMES):
        torch.testing.assert_close(_logits(loaded, inputs, tokens), _logits(served, inputs, tokens))
    lk.add_adapter(loaded, lk.get_adapter(loaded, "a"), "again")
    assert list(lk.list_adapters(loaded)) == ["a", "b", "again"]
    assert list(lk.list_adapters(served)) == ["a", "b"]


def test_selections_do_not_leak_into_other_threads(served):
    inputs, tokens = features(), labels()
    base = _logits(served, inputs, tokens)
    results = []
    with lk.use_adapters("a"):
        thread = threading.Thread(target=lambda: results.append(_logits(served, inputs, tokens)))
        thread.start()
        thread.join()
    torch.testing.assert_close(results[0], base)


def test_state_dict_holds_the_base_alone(served):
    assert list(served.state_dict()) == list(whisper().state_dict())


@pytest.mark.slow
def test_hundreds_of_adapters_take_memory_by_their_ranks_alone():
    model = whisper(encoder_layers=1, decoder_layers=1)
    ranks = [1 + (7 * index) % 16 for index in range(300)]
    half = _halves(model)

    def check(resident):
        for name, module in model.named_modules():
            bank = getattr(module, "bank", None)
            if bank is None:
                continue
            total = sum(rank for index, rank in resident if name in half[index % 2])
            features = sum(module.adapter_features)
            assert bank.total_rank == total
            # fp32 A and B; and 4 bytes per index for the offset and for the scale.
            tensors = (bank.lora_a, bank.lora_b, bank.offsets, bank.scales)
            stored = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
            exact = 4 * total * features + 4 * (2 * len(ranks) + 1)
            # Room for the next adapters is at most half of what is there.
            assert exact <= stored <= 1.5 * exact

    for index, rank in enumerate(ranks):
        made = adapter(model, rank, seed=index, names=half[index % 2])
        lk.add_adapter(model, made, f"adapter {index}")
    resident = list(enumerate(ranks))
    check(resident)
    chosen = [3, 150, 299]
    with lk.use_adapters([f"adapter {index}" for index in chosen]):
        mixed = _logits(model, features(), labels())
    fresh = whisper(encoder_layers=1, decoder_layers=1)
    for row, index in enumerate(chosen):
        lk.add_adapter(fresh, lk.get_adapter(model, f"adapter {index}"), "only")
        with lk.use_adapters("only"):
            alone = _logits(fresh, features()[row : row + 1], labels()[row : row + 1])
        torch.testing.assert_close(mixed[row : row + 1], alone, atol=2e-4, rtol=1e-4)
    for index, _ in resident[1::3]:
        lk.remove_adapter(model, f"adapter {index}")
    check([entry for entry in resident if entry[0] % 3 != 1])


def _halves(model):
    """Names of the modules that adapters of even and of odd numbers change; they overlap."""
    names = linear_names(model)
    return names[: 2 * len(names) // 3], names[len(names) // 3 :]
