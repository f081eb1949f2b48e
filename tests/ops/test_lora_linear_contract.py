"""lora_linear as torch sees it, and what it refuses, in which words."""

from __future__ import annotations

import pytest
import torch
from lora_operands import bank, base
from operator_calls import OperatorCalls

from lora_kernels import ops


@pytest.mark.parametrize("rows", [3, 20])
def test_opcheck(rows: int) -> None:
    x, weight, bias, residual = base(rows, 16, 12, torch.float32)
    operands = bank("bank", rows, 16, 12, torch.float32)
    a, b = operands["lora_a"].requires_grad_(), operands["lora_b"].requires_grad_()
    rest = (operands["scales"], operands["offsets"], operands["adapter_ids"])
    torch.library.opcheck(
        torch.ops.lora_kernels.lora_linear.default,
        (x, weight, bias, a, b, *rest, residual, "gelu", 0.0, None, 17),
    )
    torch.library.opcheck(
        torch.ops.lora_kernels.lora_linear_keeping_t.default,
        (x, weight, bias, a, b, *rest, residual, "none", 0.0, None, 17),
    )
    torch.library.opcheck(
        torch.ops.lora_kernels.lora_linear_backward.default,
        (residual, x, weight, a.detach(), b.detach(), *rest, 0.0, None, True, True, True, True),
        {"max_rank": 17},
    )


@pytest.mark.parametrize("activation", ["silu", "none"])
def test_compile_and_export(activation: str) -> None:
    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(16, 12)
            self.a = torch.nn.Parameter(torch.randn(3, 16))
            self.b = torch.nn.Parameter(torch.randn(12, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = ops.lora_linear(
                x.relu(),
                self.linear.weight,
                self.linear.bias,
                self.a,
                self.b.t(),
                activation=activation,
            )
            return y + 1

    module, x = Module(), torch.randn(4, 16)
    eager = module(x)
    eager.sum().backward()
    grad = module.a.grad.clone()
    module.a.grad = None
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")(x)
    compiled.sum().backward()
    assert torch.equal(eager, compiled)
    assert torch.allclose(grad, module.a.grad)
    exported = torch.export.export(
        module, (x,), dynamic_shapes={"x": {0: torch.export.Dim("rows", min=2)}}
    )
    assert torch.ops.lora_kernels.lora_linear.default in {n.target for n in exported.graph.nodes}
    more = torch.randn(9, 16)
    assert torch.equal(exported.module()(more), module(more))


# ---------- Bad input


def _valid() -> dict:
    return {
        "x": torch.randn(4, 8),
        "weight": torch.randn(6, 8),
        "bias": torch.randn(6),
        "lora_a": torch.randn(5, 8),
        "lora_b": torch.randn(5, 6),
        "scales": torch.ones(2),
        "offsets": torch.tensor([0, 2, 5], dtype=torch.int32),
        "adapter_ids": torch.tensor([0, 1, -1, 0], dtype=torch.int32),
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weight": torch.randn(6, 9)}, ["weight", r"\[out_features, 8\]", r"\[6, 9\]"]),
        ({"weight": torch.randn(6, 8).double()}, ["weight", "float32"]),
        ({"weight": torch.randn(6, 8).bfloat16()}, ["weight", "dtype of x", "bfloat16"]),
        ({"bias": torch.randn(7)}, ["bias", r"\[6\]", r"\[7\]"]),
        (
            {"lora_a": torch.randn(5, 9)},
            ["lora_a", r"\[rank, 8\]", r"\[5, 9\]", "another layer or model"],
        ),
        ({"lora_b": torch.randn(6, 5)}, ["lora_b", r"\[5, 6\]", "B.t()"]),
        ({"lora_b": None}, ["lora_b", "None"]),
        ({"lora_b": torch.randn(5, 6).half()}, ["lora_b", "dtype of lora_a"]),
        ({"scales": torch.ones(3)}, ["scales", r"\[2\]", r"\[3\]"]),
        ({"scales": torch.tensor([1.0, float("nan")])}, ["scales", "entry 1", "not finite"]),
        ({"scales": torch.tensor([float("inf"), 1.0])}, ["scales", "entry 0", "not finite"]),
        (
            {"offsets": torch.tensor([0, 2, 4], dtype=torch.int32)},
            ["offsets", "5", "got 4", "ranks disagree"],
        ),
        ({"offsets": torch.tensor([0, 7, 5], dtype=torch.int32)}, ["offsets", "adapter", "rank"]),
        ({"offsets": torch.tensor([0, 2, 5])}, ["offsets", "int32"]),
        (
            {"adapter_ids": torch.tensor([0, 1, 2, 0], dtype=torch.int32)},
            ["adapter_ids", "entry 2 is 2", "to 1"],
        ),
        (
            {"adapter_ids": torch.tensor([0, 1, 1], dtype=torch.int32)},
            ["adapter_ids", "divide", "got 3"],
        ),
        ({"max_rank": -1}, ["max_rank", "largest rank", "got -1", "leave it out"]),
        ({"max_rank": 2}, ["max_rank", "at least 3", "of offsets", "got 2", "or 0"]),
        (
            {"max_rank": 4, "offsets": None, "scales": None, "adapter_ids": None},
            ["max_rank", "at least 5", "of lora_a", "got 4"],
        ),
        ({"residual": torch.randn(4, 7)}, ["residual", "6 columns", r"\[4, 7\]"]),
        ({"activation": "relu"}, ["activation", "'gelu'", "'relu'"]),
        ({"dropout_p": 0.1}, ["dropout_seed", "int64", "None"]),
        ({"dropout_p": 1.0, "dropout_seed": torch.tensor([1])}, ["dropout_p", r"\[0, 1\)", "1.0"]),
    ],
)
def test_bad_input_is_named(change: dict, words: list[str]) -> None:
    arguments = _valid() | change
    ops.lora_linear(**_valid())
    with pytest.raises(RuntimeError) as error:
        ops.lora_linear(
            arguments.pop("x"), arguments.pop("weight"), arguments.pop("bias"), **arguments
        )
    for word in words:
        error.match(word)
    assert "Exception raised from" not in str(error.value)


@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_the_largest_rank_goes_on_to_the_gradients(activation: str) -> None:
    x, weight, bias, dy = base(20, 16, 12, torch.float32)
    operands = bank("bank", 20, 16, 12, torch.float32)
    leaf = operands["lora_a"].requires_grad_()
    call = {"activation": activation} | operands
    (want,) = torch.autograd.grad(ops.lora_linear(x, weight, bias, **call), leaf, dy)
    # Straight to the kernels, and through the dispatcher; a bound on the rank is enough.
    (got,) = torch.autograd.grad(ops.lora_linear(x, weight, bias, **call, max_rank=19), leaf, dy)
    assert torch.equal(got, want)
    with OperatorCalls() as calls:
        y = ops.lora_linear(x, weight, bias, **call, max_rank=19)
        (got,) = torch.autograd.grad(y, leaf, dy)
    assert torch.equal(got, want)
    forward = ["lora_linear_keeping_t"]
    if activation != "none":
        forward = ["lora_linear", "lora_linear_keeping_t"]
    names = [*forward, "lora_linear_backward"]
    assert calls.values("max_rank") == [(name, 19) for name in names]


@pytest.mark.parametrize("name", ["weight", "bias", "lora_a", "lora_b", "scales", "adapter_ids"])
def test_operands_on_another_device_are_named(name: str) -> None:
    arguments = _valid()
    arguments[name] = arguments[name].to("meta")
    positional = [arguments.pop("x"), arguments.pop("weight"), arguments.pop("bias")]
    with torch.no_grad(), pytest.raises(RuntimeError, match=f"{name}: expected a CPU tensor"):
        ops.lora_linear(*positional, **arguments)


def test_other_devices_are_named() -> None:
    if torch._C._dispatch_has_kernel_for_dispatch_key("lora_kernels::lora_linear", "CUDA"):
        pytest.skip("this library has CUDA kernels")
    with pytest.raises(NotImplementedError, match=r"lora_kernels::lora_linear|meta"):
        torch.ops.lora_kernels.lora_linear.default.redispatch(
            torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA),
            *(torch.randn(2, 2), torch.randn(2, 2), *[None] * 7, "none", 0.0, None),
        )


def test_forcing_an_unknown_implementation_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"avx1024.*generic"):
        torch.ops.lora_kernels.force_implementation("avx1024")
    assert torch.ops.lora_kernels.forced_implementation() == ""


def test_a_trace_of_torchscript_holds_the_operator() -> None:
    """Calls that go around the dispatcher would leave their results in it as constants."""
    x, weight, a, b = torch.randn(2, 8), torch.randn(4, 8), torch.randn(3, 8), torch.randn(3, 4)
    with torch.no_grad():
        traced = torch.jit.trace(lambda x: ops.lora_linear(x, weight, None, a, b), (x,))
        other = torch.randn(5, 8)
        assert torch.equal(traced(other), ops.lora_linear(other, weight, None, a, b))
    assert "lora_kernels::lora_linear" in str(traced.graph)
