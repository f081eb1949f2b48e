"""LoraLinear, LoraPointwiseConv1d and Int8LoraLinear as modules."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_calls import OperatorCalls
from torch import nn

import lora_kernels as lk
from lora_kernels import reference
from lora_kernels.adapters import AdapterRegistry
from lora_kernels.nn.int8_lora_linear import Int8LoraPointwiseConv1d
from lora_kernels.nn.lora_linear import generalise, specialise

K, N = 24, 17


def _bank(module, ranks=(3, 5), seed=0, zero_b=False):
    """A module with one adapter per rank, named "0", "1", ..."""
    generator = torch.Generator().manual_seed(seed)
    k, n = module.adapter_features
    registry = AdapterRegistry()
    layers = []
    for index, rank in enumerate(ranks):
        a = torch.randn(rank, k, generator=generator)
        b = torch.randn(n, rank, generator=generator) * (0 if zero_b else 1)
        layers.append(lk.AdapterLayer(a, b, 0.5 + index))
        registry.put(str(index), lk.Adapter({"m": layers[-1]}))
    module.set_bank(lk.AdapterBank.pack(layers, k, n), registry)
    return layers, registry


def test_lora_linear_shares_parameters_and_is_a_linear():
    linear = nn.Linear(K, N)
    module = lk.LoraLinear.from_linear(linear)
    assert module.weight is linear.weight
    assert isinstance(module, nn.Linear)
    assert list(module.state_dict()) == ["weight", "bias"]
    x = torch.randn(4, 6, K)
    assert torch.equal(module(x), linear(x))


def test_specialise_keeps_the_object_and_can_be_undone():
    linear, conv = nn.Linear(K, N), nn.Conv1d(K, N, 1)
    calls = []
    linear.register_forward_hook(lambda *_: calls.append(1))
    weight = linear.weight
    assert specialise(linear)
    assert specialise(conv)
    assert type(linear) is lk.LoraLinear
    assert type(conv) is lk.LoraPointwiseConv1d
    assert linear.weight is weight
    linear(torch.randn(2, K))
    assert calls == [1]
    assert generalise(linear)
    assert generalise(conv)
    assert type(linear) is nn.Linear
    assert type(conv) is nn.Conv1d
    assert not generalise(lk.LoraLinear(K, N)), "what was built as LoraLinear stays so"
    for other in (nn.Conv1d(K, N, 3), nn.Conv1d(K, N, 1, stride=2), nn.Conv1d(4, 4, 1, groups=2)):
        assert not specialise(other)


@pytest.mark.parametrize("activation", ["none", "gelu", "silu"])
def test_lora_linear_equals_the_reference(activation):
    module = lk.LoraLinear.from_linear(nn.Linear(K, N), activation=activation)
    layers, _ = _bank(module)
    x, residual = torch.randn(4, 6, K), torch.randn(4, 6, N)
    with lk.use_adapters(["1", "0"]), torch.no_grad():
        y = module(x, residual)
    expected = reference.lora_linear(
        x,
        module.weight,
        module.bias,
        lora_a=torch.cat([layer.lora_a for layer in layers]),
        lora_b=torch.cat([layer.lora_b.t() for layer in layers]),
        scales=torch.tensor([0.5, 1.5]),
        offsets=torch.tensor([0, 3, 8]),
        adapter_ids=torch.tensor([1, 0]),
        residual=residual,
        activation=activation,
    )
    torch.testing.assert_close(y.double(), expected, atol=1e-4, rtol=1e-4)
    y = module(x, residual)
    expected = reference.lora_linear(
        x, module.weight, module.bias, residual=residual, activation=activation
    )
    torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-5)


@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_zero_b_equals_the_base(batch, frames, seed):
    module = lk.LoraLinear(K, N)
    _bank(module, seed=seed, zero_b=True)
    x = torch.randn(batch, frames, K)
    with lk.use_adapters("1"), torch.no_grad():
        torch.testing.assert_close(module(x), nn.functional.linear(x, module.weight, module.bias))


@given(
    st.lists(st.sampled_from(["0", "1", None]), min_size=1, max_size=5),
    st.integers(1, 3),
    st.sampled_from(["linear", "conv", "int8", "int8 conv"]),
)
@settings(max_examples=40, deadline=None)
def test_a_mixed_batch_equals_each_sequence_alone(names, beams, kind):
    torch.manual_seed(0)
    base = nn.Conv1d(K, N, 1) if "conv" in kind else nn.Linear(K, N)
    module = copy.deepcopy(base)
    if kind.startswith("int8"):
        cls = Int8LoraPointwiseConv1d if "conv" in kind else lk.Int8LoraLinear
        module = cls.from_linear(base)
    else:
        specialise(module)
    _bank(module)
    shape = (K, 3) if "conv" in kind else (3, K)
    x = torch.randn(len(names) * beams, *shape)
    with torch.no_grad():
        with lk.use_adapters(names):
            mixed = module(x)
        for row in range(len(x)):
            with lk.use_adapters(names[row // beams]):
                alone = module(x[row : row + 1])
            torch.testing.assert_close(mixed[row : row + 1], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["linear", "conv", "int8", "int8 conv"])
def test_the_operator_hears_of_the_largest_rank(kind):
    """A CUDA device cannot ask the offsets in time."""
    module = nn.Conv1d(K, N, 1) if "conv" in kind else nn.Linear(K, N)
    if kind.startswith("int8"):
        cls = Int8LoraPointwiseConv1d if "conv" in kind else lk.Int8LoraLinear
        module = cls.from_linear(module)
    else:
        specialise(module)
    _bank(module, ranks=(3, 7, 5))
    x = torch.randn(2, *((K, 3) if "conv" in kind else (3, K)))
    for on_another in (module, copy.deepcopy(module).to(torch.float64).float()):
        with lk.use_adapters(["0", None]), torch.no_grad(), OperatorCalls() as calls:
            on_another(x)
        name = "int8_lora_linear" if kind.startswith("int8") else "lora_linear"
        assert calls.values("max_rank") == [(name, 7)]


def test_pointwise_convolution_without_a_batch_dimension():
    conv = nn.Conv1d(K, N, 1)
    expected_base = conv(torch.ones(K, 5))
    specialise(conv)
    layers, _ = _bank(conv)
    x = torch.ones(K, 5)
    assert torch.equal(conv(x), expected_base)
    with lk.use_adapters("0"):
        y = conv(x)
    torch.testing.assert_close(
        y - expected_base, layers[0].delta_weight() @ x, atol=1e-4, rtol=1e-4
    )


def test_gradients_reach_the_input_and_the_base():
    module = lk.LoraLinear(K, N)
    layers, _ = _bank(module)
    x = torch.randn(2, 3, K, requires_grad=True)
    with lk.use_adapters("0"):
        module(x).square().sum().backward()
    weight = (module.weight + layers[0].delta_weight()).detach()
    plain = x.detach().clone().requires_grad_()
    nn.functional.linear(plain, weight, module.bias.detach()).square().sum().backward()
    torch.testing.assert_close(x.grad, plain.grad, atol=1e-3, rtol=1e-3)
    assert module.weight.grad is not None


def test_banks_of_another_size_are_refused():
    module = lk.LoraLinear(K, N)
    bank = lk.AdapterBank.pack([lk.AdapterLayer(torch.randn(2, K), torch.randn(N, 2), 1.0)], K, N)
    with pytest.raises(lk.AdapterError, match="bank: expected"):
        lk.LoraLinear(K, N + 1).set_bank(bank, None)
    module.set_bank(bank, AdapterRegistry())
    assert "ranks=[2]" in repr(module)
    module.set_bank(None, None)
    assert "ranks" not in repr(module)


def test_int8_equals_its_reference_and_shares_the_bias():
    torch.manual_seed(0)
    linear = nn.Linear(K, N)
    module = lk.Int8LoraLinear.from_linear(linear)
    assert module.bias is linear.bias
    q, scales = reference.quantize_weight(linear.weight)
    assert all(map(torch.equal, module.quantized_weight(), (q, scales)))
    x = torch.randn(5, K)
    expected = reference.int8_lora_linear(x, q, scales, linear.bias)
    with torch.no_grad():
        torch.testing.assert_close(module(x).double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(module.weight, linear.weight, atol=2e-3, rtol=0)
    assert "dynamic" in repr(module)


def test_int8_state_dict_is_portable():
    module = lk.Int8LoraLinear.from_linear(nn.Linear(K, N))
    state = module.state_dict()
    assert {k: v.dtype for k, v in state.items()} == {
        "bias": torch.float32,
        "weight": torch.int8,
        "weight_scales": torch.float32,
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    other = lk.Int8LoraLinear.from_linear(nn.Linear(K, N))
    x = torch.randn(3, K)
    assert not torch.equal(other(x), module(x))
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(x), module(x))
    with pytest.raises(RuntimeError, match="weight_scales"):
        other.load_state_dict({k: v for k, v in state.items() if k != "weight_scales"})
    with pytest.raises(RuntimeError, match="saved after quantize"):
        other.load_state_dict({**state, "weight": torch.randn(N, K)})


def test_int8_in_half_precision_and_copies():
    module = lk.Int8LoraLinear.from_linear(nn.Linear(K, N))
    _bank(module)
    x = torch.randn(2, K)
    with lk.use_adapters("0"), torch.no_grad():
        expected = module(x)
        low = copy.deepcopy(module).bfloat16()
        assert low.bank.scales.dtype == torch.float32
        y = low(x.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, atol=0.3, rtol=0.05)


def test_int8_refuses_what_it_cannot_hold():
    with pytest.raises(lk.LoraKernelsError, match="kernel size 1"):
        lk.Int8LoraLinear.from_linear(nn.Conv1d(K, N, 3))
    linear = nn.Linear(K, N)
    linear.weight.data[3, 2] = torch.nan
    with pytest.raises(ValueError, match="output channel 3"):
        lk.Int8LoraLinear.from_linear(linear)


@pytest.mark.parametrize("kind", ["linear", "conv", "int8"])
def test_compiled_modules(kind):
    torch.manual_seed(0)
    module = nn.Conv1d(K, N, 1) if kind == "conv" else nn.Linear(K, N)
    if kind == "int8":
        module = lk.Int8LoraLinear.from_linear(module)
    else:
        specialise(module)
    x = torch.randn(2, K, 3) if kind == "conv" else torch.randn(2, 3, K)
    with torch.no_grad():
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), module(x))
        _bank(module)
        # With adapters the choice of the current call is read between two graphs.
        compiled = torch.compile(module, backend="eager")
        for names in (["0", "1"], [None, "0"], "1"):
            with lk.use_adapters(names):
                torch.testing.assert_close(compiled(x), module(x))
