"""int8_lora_linear and its packing against the reference, every implementation in turn."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from int8_operands import quantized, ragged_bank
from tolerances import assert_close

from lora_kernels import ops, reference
from lora_kernels.adapters.bank import in_blocks

NAMES = ["generic", "avx2", "avx2_vnni", "avx512", "amx"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (rows, in, out): empty, one row, primes, and both sides of every boundary: steps of 4 k, vectors
# of up to 64 bytes, register tiles of 2, 4 and 6 rows, blocks of 64 channels, chunks of 96 rows.
SHAPES = [
    (0, 5, 7),
    (3, 5, 0),
    (1, 1, 1),
    (1, 512, 512),
    (2, 3, 65),
    (3, 37, 71),
    (4, 64, 64),
    (5, 63, 63),
    (6, 65, 129),
    (7, 130, 128),
    (13, 257, 66),
    (25, 129, 200),
    (48, 100, 96),
    (97, 61, 131),
    (199, 96, 67),
]


def check(
    x: torch.Tensor, n: int, operands: dict[str, Any], what: str, bias: torch.Tensor | None = None
) -> None:
    packed, q, scales = quantized(n, x.shape[-1])
    got = ops.int8_lora_linear(x, packed, n, bias, **operands)
    exact = reference.int8_lora_linear(x, q, scales, bias, **operands)
    assert got.dtype == x.dtype
    assert_close(got, exact, what=what)


# ---------- Packing


@pytest.mark.parametrize(
    ("n", "k"), [(1, 1), (64, 4), (65, 5), (128, 64), (7, 129), (0, 3), (3, 0)]
)
def test_pack_then_unpack_is_the_identity(n: int, k: int) -> None:
    q = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    scales = torch.rand(n)
    packed = ops.int8_pack(q, scales)
    assert packed.dtype == torch.uint8
    assert packed.numel() == (n + 63) // 64 * 64 * ((k + 3) // 4 * 4 + 8)
    back = ops.int8_unpack(packed, n, k)
    assert torch.equal(back[0], q) and torch.equal(back[1], scales)


def test_pack_of_a_strided_weight() -> None:
    q = torch.randint(-127, 128, (40, 66), dtype=torch.int8)
    scales = torch.rand(80)
    packed = ops.int8_pack(q.t()[::2], scales[:66][::2].contiguous())
    assert torch.equal(packed, ops.int8_pack(q.t()[::2].contiguous(), scales[:66:2]))


# ---------- Integers


@pytest.mark.parametrize("x_scale", [None, torch.ones(1)], ids=["dynamic", "static"])
def test_accumulators_are_exact(implementation: str, x_scale: torch.Tensor | None) -> None:
    # A row whose largest magnitude is 127 has scale 1 and is its own quantization; sums below 2**24
    # are exact in fp32.
    for rows, k, n in [
        (1, 4, 1),
        (1, 513, 70),
        (2, 64, 64),
        (3, 3, 65),
        (29, 130, 131),
        (100, 1000, 40),
    ]:
        x = torch.randint(-127, 128, (rows, k)).float()
        x[:, -1] = 127
        q = torch.randint(-127, 128, (n, k), dtype=torch.int8)
        got = ops.int8_lora_linear(x, ops.int8_pack(q, torch.ones(n)), n, x_scale=x_scale)
        assert torch.equal(got.long(), reference.int8_accumulators(x, q))


@pytest.mark.parametrize("k", [1, 5, 64, 5120])
def test_extreme_values_do_not_saturate(implementation: str, k: int) -> None:
    for signs in itertools.product([127, -127], [127, -127]):
        x = torch.full((7, k), float(signs[0]))
        q = torch.full((66, k), signs[1], dtype=torch.int8)
        got = ops.int8_lora_linear(x, ops.int8_pack(q, torch.ones(66)), 66)
        # Exact in fp32 even beyond 2**24: 127 * 127 times a k with enough factors of two.
        want = torch.full((7, 66), signs[0] * signs[1] * k, dtype=torch.int64)
        assert torch.equal(got.long(), want)


def test_accumulators_of_all_implementations_are_equal() -> None:
    x = torch.randn(37, 259) * torch.logspace(-30, 30, 37).unsqueeze(1)
    packed, _, _ = quantized(193, 259)
    outputs = []
    try:
        for name in available():
            torch.ops.lora_kernels.force_implementation(name)
            outputs.append(ops.int8_lora_linear(x, packed, 193))
    finally:
        torch.ops.lora_kernels.force_implementation("")
    # Without bias or LoRA an output is the accumulator times its scales: the same bits everywhere.
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


def available() -> list[str]:
    rows = [
        line.split("\t") for line in torch.ops.lora_kernels.describe_implementations().splitlines()
    ]
    return [row[1] for row in rows if row[0] == "int8_lora_linear" and row[2] == "1"]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_quantization_is_bit_identical(implementation: str, dtype: torch.dtype) -> None:
    # The identity as weight shows the quantized row itself: y = q * scale.
    k = 100
    x = (torch.randn(50, k) * torch.rand(50, 1) * 10).to(dtype)
    x[0], x[1, 3] = 0, 1e-45
    x[2] = torch.arange(k) + 0.5  # ties
    q, scale = reference.quantize_rows(x)
    packed = ops.int8_pack(torch.eye(k, dtype=torch.int8), torch.ones(k))
    got = ops.int8_lora_linear(x, packed, k)
    assert torch.equal(got, (q.float() * scale.unsqueeze(1)).to(dtype))
    x_scale = torch.tensor([0.05])
    q, scale = reference.quantize_static(x, x_scale)
    got = ops.int8_lora_linear(x, packed, k, x_scale=x_scale)
    assert torch.equal(got, (q.float() * scale.unsqueeze(1)).to(dtype))


# ---------- The whole operator


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("lora", ["none", "peft", "bank"])
def test_forward(implementation: str, dtype: torch.dtype, lora: str) -> None:
    choices = itertools.cycle(itertools.product(["none", "gelu", "silu"], [True, False]))
    for (rows, k, n), (activation, extras) in zip(SHAPES, choices, strict=False):
        x = torch.randn(rows, k).to(dtype)
        operands: dict[str, Any] = {"activation": activation}
        if lora == "peft":  # PEFT's own layout, B [N, r], through strides
            factors = dtype if extras else torch.float32
            operands["lora_a"] = (torch.randn(16, k) / k**0.5).to(factors)
            operands["lora_b"] = torch.randn(n, 16).to(factors).t()
            operands["scales"] = torch.tensor([0.5])
        if lora == "bank":
            operands |= ragged_bank(rows, k, n, dtype)
        bias = None
        if extras:
            bias = torch.randn(n).to(dtype if activation == "gelu" else torch.float32)
            operands["residual"] = torch.randn(rows, n).to(dtype)
        check(x, n, operands, f"{rows}x{k}x{n} {activation}", bias)


def has_fast_bf16_dots() -> bool:
    """AMD's cores with AVX512-BF16: what ``DeviceInfo.fast_bf16_dot`` says."""
    cpu = Path("/proc/cpuinfo").read_text()
    return "AuthenticAMD" in cpu and "avx512_bf16" in cpu


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [96, 61])
def test_bf16_adapters_at_many_rows(implementation: str, k: int, dtype: torch.dtype) -> None:
    """x, A and t may be rounded to bf16 on their way into products of pairs, and nothing else."""
    rows, n = 97, 131
    packed, _, _ = quantized(n, k)
    x = torch.randn(2 * rows, k).to(dtype)
    bank = ragged_bank(2, k, n, torch.bfloat16) | {"adapter_ids": torch.tensor([2, 3]).int()}
    base = ops.int8_lora_linear(x, packed, n).float()
    factors = {name: bank[name].double() for name in ("lora_a", "lora_b")}
    exact = reference.lora_branch(x.double(), **(bank | factors))
    lora_b = bank.pop("lora_b")
    results = []
    for b in (lora_b, in_blocks(lora_b), lora_b.t().contiguous().t()):
        results.append(ops.int8_lora_linear(x, packed, n, lora_b=b, **bank))
        # The branch is what comes beside the base, to the rounding of the sum.
        assert_close(
            results[-1].float() - base, exact, extra=8e-3 if dtype == torch.float32 else 5e-2
        )
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])

    # Few rows keep fp32: where pairs are as fast as promised, many rows must show another rounding.
    one = bank | {"adapter_ids": torch.tensor([2]).int()}
    few = ops.int8_lora_linear(x[:47], packed, n, lora_b=lora_b, **one)
    pairs = implementation == "avx512" and k % 2 == 0 and has_fast_bf16_dots()
    pairs = pairs or implementation == "amx"  # whose tiles are padded
    if dtype == torch.float32:
        assert torch.equal(few, results[0][:47]) != pairs


@pytest.mark.parametrize("factors", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("rows", "k", "n"), [(55, 61, 131), (300, 200, 70)])
def test_adapters_of_groups_of_many_rows(
    implementation: str, factors: torch.dtype, rows: int, k: int, n: int
) -> None:
    """Ranks about and beyond a tile of 16, and none; fp32's precision but for bf16 adapters."""
    ranks = [16, 0, 41, 3]
    operands = {
        "lora_a": (torch.randn(sum(ranks), k) / k**0.5).to(factors),
        "lora_b": torch.randn(sum(ranks), n).to(factors),
        "scales": torch.tensor([0.7, 1.0, 2.0, -0.3]),
        "offsets": torch.tensor([0, *itertools.accumulate(ranks)], dtype=torch.int32),
        "adapter_ids": torch.tensor([2, 2, -1, 0, 1, 3], dtype=torch.int32),
    }
    x, (packed, q, scales) = torch.randn(6, rows, k), quantized(n, k)
    got = ops.int8_lora_linear(x, packed, n, **operands)
    exact = reference.int8_lora_linear(x, q, scales, **operands)
    assert_close(got, exact, extra=8e-3 if factors == torch.bfloat16 else 0.0)
    plain = ops.int8_lora_linear(x, packed, n)
    assert torch.equal(got[[2, 4]], plain[[2, 4]]), "rows without an adapter"


@pytest.mark.parametrize(("rows", "k", "n"), [(48, 64, 64), (97, 61, 131), (290, 700, 130)])
def test_sums_of_many_rows_are_exact(implementation: str, rows: int, k: int, n: int) -> None:
    """Powers of two as scales: the result is the integer sum itself."""
    x = torch.randint(-127, 128, (rows, k)).float()
    x[:, 0] = 127  # the scale is 1
    weight = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    got = ops.int8_lora_linear(x, ops.int8_pack(weight, torch.full((n,), 2.0**-10)), n)
    assert torch.equal(got, (x.double() @ weight.double().t()).float() / 1024)


@pytest.mark.parametrize("activation", ["none", "gelu", "silu"])
def test_static_scale(implementation: str, activation: str) -> None:
    x = torch.randn(5, 66) * 4  # some of it beyond the range: clamped
    operands = ragged_bank(5, 66, 70, torch.float32)
    operands |= {"x_scale": torch.tensor([0.02]), "activation": activation}
    check(x, 70, operands, "static", torch.randn(70))


def test_batch_and_groups(implementation: str) -> None:
    x = torch.randn(4, 9, 33)
    operands = ragged_bank(0, 33, 70, torch.float32)
    operands["adapter_ids"] = torch.tensor([2, -1, 0, 3], dtype=torch.int32)
    check(x, 70, operands, "one id per utterance", torch.randn(70))
    packed, _, _ = quantized(70, 33)
    mixed = ops.int8_lora_linear(x, packed, 70, **operands)
    for i, adapter in enumerate([2, -1, 0, 3]):
        operands["adapter_ids"] = torch.tensor([adapter], dtype=torch.int32)
        alone = ops.int8_lora_linear(x[i : i + 1], packed, 70, **operands)
        torch.testing.assert_close(mixed[i : i + 1], alone, rtol=0, atol=2e-6)


@pytest.mark.parametrize("rows", [1, 8, 100])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_views_and_misaligned_inputs(implementation: str, rows: int, dtype: torch.dtype) -> None:
    packed, _, _ = quantized(71, 36)
    base = torch.randn(rows + 1, 80).to(dtype)
    for x in (
        base[1:, 3:39],
        base[1:, 4:76:2],
        base.t()[:36].t()[1:],
        base.flatten()[1 : 1 + rows * 36].view(rows, 36),
    ):
        lora = ragged_bank(rows, 40, 80, dtype)
        lora["lora_a"], lora["lora_b"] = lora["lora_a"][:, 1:37], lora["lora_b"][:, 5:76]
        copies = lora | {name: lora[name].contiguous() for name in ("lora_a", "lora_b")}
        shifted = torch.cat([packed.new_zeros(1), packed])[1:]
        got = ops.int8_lora_linear(x, shifted, 71, **lora)
        assert torch.equal(got, ops.int8_lora_linear(x.contiguous(), packed, 71, **copies))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5, 8, 13])
def test_blocks_of_b_change_no_bit(implementation: str, rows: int, dtype: torch.dtype) -> None:
    """However B lies: by rank row, in blocks of 64 outputs, or as PEFT has it."""
    k, n = 100, 131
    packed, _, _ = quantized(n, k)
    x = torch.randn(rows, k)
    bank = ragged_bank(rows, k, n, dtype)
    lora_b = bank.pop("lora_b")
    results = [
        ops.int8_lora_linear(x, packed, n, lora_b=b, **bank)
        for b in (lora_b, in_blocks(lora_b), lora_b.t().contiguous().t())
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_same_bits_twice(implementation: str) -> None:
    for rows in (1, 7, 150):
        x = torch.randn(rows, 200)
        packed, _, _ = quantized(300, 200)
        operands = ragged_bank(rows, 200, 300, torch.float32)
        first = ops.int8_lora_linear(x, packed, 300, **operands)
        for _ in range(3):
            assert torch.equal(first, ops.int8_lora_linear(x, packed, 300, **operands))


def test_threads_do_not_change_a_bit(implementation: str) -> None:
    packed, _, _ = quantized(700, 600)
    threads = torch.get_num_threads()
    try:
        for rows in (1, 40, 300):
            x = torch.randn(rows, 600)
            operands = ragged_bank(rows, 600, 700, torch.float32) | {"activation": "gelu"}
            outputs = []
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                outputs.append(ops.int8_lora_linear(x, packed, 700, **operands))
            assert all(torch.equal(outputs[0], other) for other in outputs[1:])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("static", [False, True])
def test_non_finite_rows_stay_alone(
    implementation: str, dtype: torch.dtype, poison: float, static: bool
) -> None:
    x = torch.randn(20, 70).to(dtype)
    packed, _, _ = quantized(66, 70)
    operands = ragged_bank(20, 70, 66, dtype) | {"activation": "gelu"}
    operands["x_scale"] = torch.tensor([0.03]) if static else None
    clean = ops.int8_lora_linear(x, packed, 66, **operands)
    for row, column in [(3, 0), (11, 69), (19, 33)]:
        x[row, column] = poison
        clean[row] = float("nan")
    got = ops.int8_lora_linear(x, packed, 66, **operands)
    assert torch.equal(got.isnan(), clean.isnan())
    assert torch.equal(got.nan_to_num(), clean.nan_to_num())


def test_rows_of_zeros(implementation: str) -> None:
    x = torch.zeros(3, 65)
    packed, _, _ = quantized(40, 65)
    bias = torch.randn(40)
    assert torch.equal(ops.int8_lora_linear(x, packed, 40), torch.zeros(3, 40))
    assert torch.equal(ops.int8_lora_linear(x, packed, 40, bias), bias.expand(3, 40))


def test_nothing_to_multiply(implementation: str) -> None:
    bias, residual = torch.randn(70), torch.randn(3, 70)
    packed = ops.int8_pack(torch.zeros(70, 0, dtype=torch.int8), torch.ones(70))
    got = ops.int8_lora_linear(torch.zeros(3, 0), packed, 70, bias, residual=residual)
    assert torch.equal(got, bias + residual)
    # Adapters whose ranks are all 0 leave the base alone.
    x = torch.randn(3, 33)
    packed, _, _ = quantized(70, 33)
    empty = {"lora_a": torch.zeros(0, 33), "lora_b": torch.zeros(0, 70), "scales": torch.ones(2)}
    offsets, ids = torch.zeros(3, dtype=torch.int32), torch.tensor([1, -1, 0], dtype=torch.int32)
    got = ops.int8_lora_linear(x, packed, 70, **empty, offsets=offsets, adapter_ids=ids)
    assert torch.equal(got, ops.int8_lora_linear(x, packed, 70))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 60),
    k=st.integers(1, 200),
    n=st.integers(1, 150),
    ranks=st.lists(st.integers(0, 20), min_size=1, max_size=5),
    name=st.sampled_from(NAMES),
    seed=st.integers(0, 2**16),
)
def test_any_shape_and_bank(
    rows: int, k: int, n: int, ranks: list[int], name: str, seed: int
) -> None:
    if name not in available():
        return
    torch.manual_seed(seed)
    total = sum(ranks)
    operands = {
        "lora_a": torch.randn(total, k) / k**0.5,
        "lora_b": torch.randn(total, n),
        "scales": torch.randn(len(ranks)),
        "offsets": torch.tensor([0, *itertools.accumulate(ranks)], dtype=torch.int32),
        "adapter_ids": torch.randint(-1, len(ranks), (rows,), dtype=torch.int32),
    }
    torch.ops.lora_kernels.force_implementation(name)
    try:
        check(torch.randn(rows, k), n, operands, f"{rows}x{k}x{n} {ranks} {name}")
    finally:
        torch.ops.lora_kernels.force_implementation("")
