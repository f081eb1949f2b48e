"""Outputs of LayerNorms and activations that training makes again instead of keeping."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tiny_models import features, labels, peft_whisper
from torch import nn
from torch.nn import functional as F

import lora_kernels as lk
from lora_kernels.integrations import recomputed_layers
from lora_kernels.ops.recompute import origin


def _saved_bytes(model) -> int:
    """Bytes that a forward pass keeps for the backward pass, parameters aside."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(input_features=features(), labels=labels()).loss
    del loss
    return sum(kept.values())


def test_training_keeps_less_and_its_gradients_are_the_same_bits(monkeypatch):
    model = peft_whisper().train()
    with monkeypatch.context() as patch:
        patch.setattr(recomputed_layers, "is_recomputable", lambda module: False)
        lk.swap(model)
    kept = _saved_bytes(model)

    def gradients():
        model.zero_grad()
        model(input_features=features(), labels=labels()).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = gradients()
    report = lk.swap(model)
    assert any("made again in the backward pass" in note for note in report.notes)
    assert all(map(torch.equal, gradients(), expected))
    assert _saved_bytes(model) < 0.9 * kept
    assert not lk.swap(model).notes


@pytest.mark.parametrize("layer", [nn.GELU(), nn.SiLU(), nn.LayerNorm(24)], ids=lambda m: str(m))
def test_what_is_made_again_is_what_was_made(layer):
    assert recomputed_layers.is_recomputable(layer)
    recomputed_layers.swap_layer(layer)
    x = torch.randn(5, 24, requires_grad=True)
    made = layer(x)
    note = origin(made)
    assert note is not None and note.source is x
    assert torch.equal(note.make(x), made)


def test_a_note_ends_with_a_change_in_place():
    layer = nn.GELU()
    recomputed_layers.swap_layer(layer)
    x = torch.randn(7, 24, requires_grad=True)
    a = torch.randn(3, 24, requires_grad=True)
    operands = (torch.randn(9, 24), None, a, torch.randn(3, 9))
    made = layer(x)
    made *= 2  # GELU keeps its input alone, so autograd allows it
    assert origin(made) is None
    lk.ops.lora_linear(made, *operands).sum().backward()
    ours, a.grad = a.grad, None
    lk.ops.lora_linear(F.gelu(x) * 2, *operands).sum().backward()
    torch.testing.assert_close(ours, a.grad)


def test_no_note_without_gradients_or_under_autocast():
    layer = nn.GELU()
    recomputed_layers.swap_layer(layer)
    x = torch.randn(2, 24, requires_grad=True)
    with torch.no_grad():
        assert origin(layer(x)) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert origin(layer(x)) is None
    assert origin(layer(x.detach())) is None


def test_an_input_changed_before_the_backward_pass_is_an_error_not_a_wrong_gradient():
    layer = nn.LayerNorm(24)
    recomputed_layers.swap_layer(layer)
    x = torch.randn(4, 24, requires_grad=True) * 1
    a = torch.randn(3, 24, requires_grad=True)
    y = lk.ops.lora_linear(layer(x), torch.randn(9, 24), None, a, torch.randn(3, 9))
    x += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_unswap_copies_and_pickles_leave_nothing_behind():
    model = peft_whisper()
    lk.swap(model)
    norm = model.get_base_model().model.encoder.layers[0].final_layer_norm
    assert "forward" in norm.__dict__
    assert copy.deepcopy(norm).forward.__self__ is not norm
    x = torch.randn(2, norm.normalized_shape[0])
    assert torch.equal(pickle.loads(pickle.dumps(norm))(x), norm(x))
    lk.unswap(model)
    assert "forward" not in norm.__dict__
