"""lora_linear and its gradients against the reference, every implementation in turn."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_operands import bank, base
from tolerances import assert_close

from lora_kernels import ops, reference
from lora_kernels.adapters.bank import in_blocks

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (rows, in, out): empty, one row, primes, both sides of every tile, path and panel boundary.
SHAPES = [
    (0, 5, 6),
    (1, 1, 1),
    (1, 64, 64),
    (1, 513, 77),
    (3, 37, 53),
    (7, 128, 130),
    (8, 100, 64),
    (9, 101, 67),
    (13, 96, 1),
    (31, 64, 200),
    (40, 30, 3),
    (129, 257, 191),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("mode", ["none", "peft", "bank", "dropout", "fp32"])
def test_forward(implementation: str, dtype: torch.dtype, mode: str) -> None:
    for (rows, k, n), activation in zip(
        SHAPES, itertools.cycle(["none", "gelu", "silu"]), strict=False
    ):
        x, weight, bias, residual = base(rows, k, n, dtype)
        operands = bank(mode, rows, k, n, dtype) | {"residual": residual, "activation": activation}
        got = ops.lora_linear(x, weight, bias, **operands)
        exact = reference.lora_linear(x, weight, bias, **operands)
        plain = exact
        if mode != "fp32":
            plain = reference.lora_linear(x, weight, bias, **operands, compute_dtype=dtype)
        assert_close(got, exact, plain.to(dtype), what=f"{rows}x{k}x{n} {activation}")


@pytest.mark.parametrize("factors", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "k", "n"), [(55, 61, 131), (150, 200, 70)])
def test_groups_of_many_rows_of_bf16(
    implementation: str, factors: torch.dtype, rows: int, k: int, n: int
) -> None:
    """What tiles compute: ranks about and beyond 16, and none; rows and sizes of no tile."""
    ranks = [16, 0, 41]
    operands = {
        "lora_a": (torch.randn(sum(ranks), k) / k**0.5).to(factors),
        "lora_b": torch.randn(sum(ranks), n).to(factors),
        "scales": torch.tensor([0.7, 1.0, 2.0]),
        "offsets": torch.tensor([0, *itertools.accumulate(ranks)], dtype=torch.int32),
        "adapter_ids": torch.tensor([2, 2, -1, 0, 1], dtype=torch.int32),
    }
    x, weight, bias, residual = base(5 * rows, k, n, torch.bfloat16)
    x, residual = x.unflatten(0, (5, rows)), residual.unflatten(0, (5, rows))
    for extras in ({}, {"dropout_p": 0.3, "dropout_seed": torch.tensor([7])}):
        given = operands | extras | {"residual": residual, "activation": "gelu"}
        got = ops.lora_linear(x, weight, bias, **given)
        assert_close(got, reference.lora_linear(x, weight, bias, **given))


@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_activations_over_their_whole_range(implementation: str, activation: str) -> None:
    special = [0.0, -0.0, 1e-30, -1e-30, 20.0, -20.0, 88.0, -88.0, 1e4, -1e4, 3e38, -3e38]
    values = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor(special)]).reshape(-1, 1)
    got = ops.lora_linear(values, torch.ones(1, 1), activation=activation)
    exact = reference.lora_linear(values, torch.ones(1, 1), activation=activation)
    error = (got.double() - exact).abs() / values.double().abs().clamp_min(1.0)
    assert error.max() < 4e-7
    infinite = torch.tensor([[float("inf")], [float("-inf")], [float("nan")]])
    y = ops.lora_linear(infinite, torch.ones(1, 1), activation=activation).flatten()
    assert y[0] == float("inf")
    assert y[1] == 0
    assert y[2].isnan()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("mode", ["peft", "bank", "dropout"])
def test_gradients(implementation: str, dtype: torch.dtype, mode: str) -> None:
    # Behind an activation the backward pass makes t again, else it has that of the forward pass.
    for (rows, k, n), activation in itertools.product(
        [(1, 64, 64), (3, 37, 53), (9, 101, 67), (300, 70, 130)], ["gelu", "none"]
    ):
        x, weight, bias, residual = base(rows, k, n, dtype)
        operands = bank(mode, rows, k, n, dtype)
        factors = [operands.pop("lora_a"), operands.pop("lora_b")]
        dy = torch.randn(rows, n).to(dtype)

        def gradients(function, leaves, dy=dy, operands=operands, act=activation, **extra):
            leaves = [leaf.clone().requires_grad_() for leaf in leaves]
            x, weight, bias, a, b, residual = leaves
            y = function(
                x,
                weight,
                bias,
                lora_a=a,
                lora_b=b,
                residual=residual,
                activation=act,
                **operands,
                **extra,
            )
            y.backward(dy.to(y.dtype))
            return [torch.zeros_like(v) if v.grad is None else v.grad for v in leaves]

        leaves = [x, weight, bias, *factors, residual]
        got = gradients(ops.lora_linear, leaves)
        exact = gradients(reference.lora_linear, [v.double() for v in leaves])
        plain = gradients(reference.lora_linear, leaves, compute_dtype=dtype)
        names = ["x", "weight", "bias", "lora_a", "lora_b", "residual"]
        for name, *values in zip(names, got, exact, plain, strict=True):
            assert_close(*values, what=f"d{name} at {rows}x{k}x{n}")


@pytest.mark.parametrize("rows", [5, 150])
@pytest.mark.parametrize("mode", ["peft", "bank", "dropout"])
def test_t_of_the_forward_pass_gives_the_same_bits(
    implementation: str, mode: str, rows: int
) -> None:
    x, weight, bias, dy = base(rows, 70, 130, torch.float32)
    operands = bank(mode, rows, 70, 130, torch.float32)
    names = ["lora_a", "lora_b", "scales", "offsets", "adapter_ids"]
    lora = [operands.get(name) for name in names]
    dropout = (operands.get("dropout_p", 0.0), operands.get("dropout_seed"))
    y, t = torch.ops.lora_kernels.lora_linear_keeping_t(
        x, weight, bias, *lora, None, "none", *dropout
    )
    assert torch.equal(y, ops.lora_linear(x, weight, bias, **operands))
    assert t.shape == (rows, (operands["lora_a"].shape[0] + 15) // 16 * 16)
    back = (dy, x, weight, *lora, *dropout, True, False, False, True)
    again = torch.ops.lora_kernels.lora_linear_backward(*back)
    handed_over = torch.ops.lora_kernels.lora_linear_backward(*back, t)
    assert all(map(torch.equal, again, handed_over))
    # It is read, not made again: dB follows what it says.
    doubled = torch.ops.lora_kernels.lora_linear_backward(*back, 2 * t)
    assert torch.equal(doubled[4], 2 * again[4])
    for wrong in (t[:, 1:], t.half(), t[1:]):
        with pytest.raises(RuntimeError, match=rf"t: expected what .*\[{rows}, {t.shape[1]}\]"):
            torch.ops.lora_kernels.lora_linear_backward(*back, wrong)


def test_what_is_kept_for_the_gradients_grows_by_rows_times_ranks_alone() -> None:
    x, weight, bias, _ = base(40, 64, 48, torch.float32)
    x.requires_grad_()

    def kept(a: torch.Tensor, b: torch.Tensor, **operands) -> list[torch.Tensor]:
        seen: list[torch.Tensor] = []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t)
        with hooks:
            ops.lora_linear(x, weight, bias, a, b, **operands)
        known = {t.data_ptr() for t in (x, weight, bias, a, b)}
        return [t for t in seen if t.is_floating_point() and t.data_ptr() not in known]

    a, b = torch.randn(5, 64), torch.randn(5, 48)
    assert kept(a, b) == []  # frozen factors
    trained = a.clone().requires_grad_(), b.clone().requires_grad_()
    assert [t.shape for t in kept(*trained)] == [(40, 16)]
    assert kept(*trained, activation="gelu") == []
    many = torch.randn(80, 64, requires_grad=True), torch.randn(80, 48)
    offsets = torch.arange(0, 81, 4, dtype=torch.int32)
    ids = torch.zeros(40, dtype=torch.int32)
    assert kept(*many, offsets=offsets, adapter_ids=ids) == []  # mostly other adapters' ranks


def test_only_wanted_gradients_are_computed(implementation: str) -> None:
    x, weight, bias, _ = base(6, 8, 10, torch.float32)
    a, b = torch.randn(2, 8, requires_grad=True), torch.randn(2, 10, requires_grad=True)
    y = ops.lora_linear(x, weight, bias, a, b)
    y.sum().backward()
    assert a.grad is not None
    assert b.grad is not None
    assert weight.grad is None
    y = ops.lora_linear(x.requires_grad_(), weight, bias)
    y.sum().backward()
    assert torch.allclose(x.grad, weight.sum(0).expand(6, 8), atol=1e-5)


@pytest.mark.filterwarnings("ignore:Input #.* requires gradient and is not a double precision")
def test_gradcheck(implementation: str) -> None:
    # The operator computes in fp32; it is linear in each input, so a wide quotient loses nothing.
    x, weight, bias, residual = base(5, 7, 6, torch.float32)
    a, b = torch.randn(3, 7), torch.randn(3, 6)
    inputs = [t.requires_grad_() for t in (x, weight, bias, a, b, residual)]

    def function(x, weight, bias, a, b, residual):
        return ops.lora_linear(x, weight, bias, a, b, residual=residual)

    assert torch.autograd.gradcheck(
        function, inputs, eps=1e-1, atol=2e-3, rtol=1e-3, nondet_tol=0.0
    )


@pytest.mark.parametrize("rows", [1, 5, 8, 9, 33])
def test_rows_do_not_see_each_other(implementation: str, rows: int) -> None:
    """A batch that mixes adapters gives every row what it gets alone."""
    x, weight, bias, _ = base(rows, 96, 70, torch.float32)
    operands = bank("bank", rows, 96, 70, torch.float32)
    together = ops.lora_linear(x, weight, bias, **operands)
    ids = operands.pop("adapter_ids")
    for row in range(rows):
        alone = ops.lora_linear(
            x[row : row + 1], weight, bias, adapter_ids=ids[row : row + 1], **operands
        )
        assert_close(alone[0], together[row].double(), what=f"row {row}")


def test_groups_name_whole_utterances(implementation: str) -> None:
    x = torch.randn(4, 11, 32)
    weight, a, b = torch.randn(20, 32), torch.randn(6, 32), torch.randn(6, 20)
    offsets = torch.tensor([0, 2, 6], dtype=torch.int32)
    ids = torch.tensor([1, -1, 0, 1], dtype=torch.int32)
    got = ops.lora_linear(x, weight, None, a, b, offsets=offsets, adapter_ids=ids)
    per_row = ops.lora_linear(
        x.reshape(-1, 32),
        weight,
        None,
        a,
        b,
        offsets=offsets,
        adapter_ids=ids.repeat_interleave(11),
    )
    # Another grouping is another order of sums: equal within rounding, not to the bit.
    assert_close(got.reshape(-1, 20), per_row.double())


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 40),
    k=st.integers(1, 90),
    n=st.integers(1, 90),
    rank=st.integers(0, 20),
    seed=st.integers(0, 2**31),
)
def test_zero_b_is_the_base_and_merged_is_unmerged(
    rows: int, k: int, n: int, rank: int, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(rows, k, generator=g), torch.randn(n, k, generator=g)
    a, b = torch.randn(rank, k, generator=g), torch.randn(rank, n, generator=g)
    scales = torch.tensor([0.5])
    plain = ops.lora_linear(x, weight)
    assert torch.equal(
        ops.lora_linear(x, weight, None, a, torch.zeros_like(b), scales=scales), plain
    )
    merged = weight.double() + 0.5 * (b.double().T @ a.double())
    got = ops.lora_linear(x, weight, None, a, b, scales=scales)
    assert_close(got, x.double() @ merged.T, x @ merged.float().T)


def test_memory_layouts(implementation: str) -> None:
    big = torch.randn(40, 203)
    x, weight = big[::2, 3:100], torch.randn(97, 150).t()[::2, :]
    assert not x.is_contiguous()
    got = ops.lora_linear(x, weight)
    assert_close(got, x.double() @ weight.double().T, x @ weight.T)
    narrow = torch.randn(9, 2, 4, dtype=torch.bfloat16)[:, :, 1:]  # rows at odd addresses
    weight = torch.randn(5, 3, dtype=torch.bfloat16)
    assert_close(ops.lora_linear(narrow, weight), narrow.double() @ weight.double().T)


@pytest.mark.parametrize("rows", [1, 8, 30])
def test_blocks_of_b_change_no_bit(implementation: str, rows: int) -> None:
    operands = bank("bank", rows, 50, 131, torch.bfloat16)
    x, weight, bias, _ = base(rows, 50, 131, torch.float32)
    expected = ops.lora_linear(x, weight, bias, **operands)
    operands["lora_b"] = in_blocks(operands["lora_b"])
    assert torch.equal(ops.lora_linear(x, weight, bias, **operands), expected)
    with pytest.raises(RuntimeError, match="where gradients are needed"):
        ops.lora_linear(x.requires_grad_(), weight, bias, **operands).sum().backward()


def test_same_bits_twice(implementation: str) -> None:
    x, weight, bias, residual = base(300, 200, 330, torch.float32)
    operands = bank("dropout", 300, 200, 330, torch.float32)
    a = operands["lora_a"].requires_grad_()
    results = []
    for _ in range(2):
        y = ops.lora_linear(x, weight, bias, residual=residual, **operands)
        results.append((y.detach(), *torch.autograd.grad(y.sin().sum(), [a])))
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_thread_count_does_not_change_a_bit(implementation: str) -> None:
    threads = torch.get_num_threads()
    x, weight, bias, _ = base(70, 300, 500, torch.float32)
    operands = bank("bank", 70, 300, 500, torch.float32)
    try:
        torch.set_num_threads(1)
        one = ops.lora_linear(x, weight, bias, **operands)
        torch.set_num_threads(2)
        two = ops.lora_linear(x, weight, bias, **operands)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, two)


def test_thread_count_does_not_change_a_bit_of_uneven_runs(implementation: str) -> None:
    """Adapters that change where tasks do not: no run of rows may be summed in another order."""
    threads = torch.get_num_threads()
    x, weight, bias, _ = base(100, 130, 70, torch.float32)
    operands = bank("bank", 100, 130, 70, torch.float32)
    operands["adapter_ids"] = torch.tensor([0] * 12 + [2] * 13, dtype=torch.int32)
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(ops.lora_linear(x, weight, bias, **operands))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


def test_dropout_keeps_the_right_share(implementation: str) -> None:
    x, eye = torch.ones(64, 256), torch.eye(256)
    y = ops.lora_linear(
        x, torch.zeros(256, 256), None, eye, eye, dropout_p=0.25, dropout_seed=torch.tensor([7])
    )
    assert y.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert abs((y == 0).float().mean().item() - 0.25) < 0.02


def test_autocast_casts_as_linear_does() -> None:
    x, weight, bias, _ = base(4, 16, 8, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.lora_linear(x, weight, bias)
    assert y.dtype == torch.bfloat16
