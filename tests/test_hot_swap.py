"""Adapters that change while another thread computes: a block goes on with those it began with."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from tiny_models import adapter, features, generate, labels, whisper

import lora_kernels as lk


def _logits(model):
    with torch.no_grad():
        return model(input_features=features(), decoder_input_ids=labels()).logits


def elsewhere(change, *arguments):
    """Run something in another thread, to its end."""
    failures = []

    def run():
        try:
            change(*arguments)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]


@pytest.fixture(params=[False, True], ids=["fp32", "int8"])
def served(request):
    model = whisper()
    if request.param:
        lk.quantize(model)
    lk.swap(model)
    lk.add_adapter(model, adapter(model, 4, seed=1), "a")
    lk.add_adapter(model, adapter(model, 7, seed=2), "b")
    return model


def _replace(model):
    lk.add_adapter(model, adapter(model, 6, seed=9), "a")


def _remove(model):
    lk.remove_adapter(model, "a")


def _reuse_the_index(model):
    lk.remove_adapter(model, "a")
    assert lk.add_adapter(model, adapter(model, 6, seed=9), "c").index == 0


def _remove_all(model):
    lk.remove_adapter(model, "a")
    lk.remove_adapter(model, "b")


def _add(model):
    lk.add_adapter(model, adapter(model, 12, seed=9), "c")


@pytest.mark.parametrize("change", [_replace, _remove, _reuse_the_index, _remove_all, _add])
def test_a_pass_under_way_and_its_block_see_no_change(served, change):
    with lk.use_adapters(["a", "b", "a"]):
        expected = _logits(served)
    todo = [change]

    def in_the_middle(module, arguments):
        if todo:
            elsewhere(todo.pop(), served)

    served.model.decoder.layers[0].fc1.register_forward_pre_hook(in_the_middle)
    with lk.use_adapters(["a", "b", "a"]):
        assert torch.equal(_logits(served), expected)
        assert not todo
        assert torch.equal(_logits(served), expected)
    names = lk.list_adapters(served)
    if "a" not in names:
        with pytest.raises(lk.AdapterError, match="got 'a'"), lk.use_adapters("a"):
            _logits(served)
        return
    with lk.use_adapters(["a", "b", "a"]):
        after = _logits(served)
    assert torch.equal(after, expected) == (change is _add)
    assert torch.equal(after[1], expected[1])


def test_a_generation_under_way_keeps_its_adapter(served):
    with lk.use_adapters("a"):
        expected = generate(served, features())
    steps = []

    def at_the_third_step(module, arguments):
        steps.append(1)
        if len(steps) == 3:
            elsewhere(_replace, served)

    handle = served.model.decoder.layer_norm.register_forward_pre_hook(at_the_third_step)
    with lk.use_adapters("a"):
        assert torch.equal(generate(served, features()), expected)
    handle.remove()
    assert len(steps) > 3
    with lk.use_adapters("a"):
        assert not torch.equal(generate(served, features()), expected)


def test_the_block_s_own_thread_sees_its_changes_at_once(served):
    with lk.use_adapters("a"):
        before = _logits(served)
        _replace(served)
        replaced = _logits(served)
        assert not torch.equal(replaced, before)
        with lk.use_adapters("b"):
            _remove(served)
        with pytest.raises(lk.AdapterError, match="got 'a'"):
            _logits(served)


def test_old_banks_live_as_long_as_the_block(served):
    fc1 = served.model.encoder.layers[0].fc1
    old = weakref.ref(fc1.bank)
    with lk.use_adapters("a"):
        _logits(served)
        elsewhere(_replace, served)
        gc.collect()
        assert old() is not None
    gc.collect()
    assert old() is None


def test_many_changes_under_many_passes(served):
    versions = [adapter(served, 4, seed=1), adapter(served, 9, seed=3)]
    expected = []
    for version in versions:
        lk.add_adapter(served, version, "a")
        with lk.use_adapters("a"):
            expected.append(_logits(served))
    done, seen, wrong = threading.Event(), set(), []

    def compute():
        while not done.is_set():
            with lk.use_adapters("a"):
                got = _logits(served)
            which = [i for i, logits in enumerate(expected) if torch.equal(got, logits)]
            seen.update(which)
            if not which:
                wrong.append(got)

    threads = [threading.Thread(target=compute) for _ in range(2)]
    for thread in threads:
        thread.start()
    for turn in range(60):
        lk.add_adapter(served, versions[turn % 2], "a")
    done.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert seen == {0, 1}
