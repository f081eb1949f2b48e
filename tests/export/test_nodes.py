"""Every node exported from a small module, run in ONNX Runtime, against the reference."""

from __future__ import annotations

import pytest
import torch
from single_calls import Call, bank, exported, run
from tolerances import assert_close

from lora_kernels import export, ops, reference
from lora_kernels.adapters.bank import in_blocks

pytest.importorskip("onnxruntime", reason="needs the extra `export`")
pytest.importorskip("onnxscript", reason="needs the extra `export`")


SLOW = pytest.mark.slow
ACTIVATIONS = ["none", *(pytest.param(name, marks=SLOW) for name in ("gelu", "silu"))]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=SLOW)])
def test_lora_linear(tmp_path, activation: str, dtype: torch.dtype) -> None:
    """Adapters and routing are inputs of the graph; the batch and the bank are dynamic."""
    k, n = 37, 53

    def operands(batch: int, ranks: list[int], rows: int = 7) -> dict:
        return (
            {"x": torch.randn(batch, rows, k).to(dtype)}
            | bank(ranks, k, n, batch, dtype)
            | {"residual": torch.randn(batch, rows, n).to(dtype)}
        )

    fixed = {"weight": (torch.randn(n, k) / k**0.5).to(dtype), "bias": torch.randn(n).to(dtype)}
    first = operands(3, [4, 2, 17])
    module = Call(ops.lora_linear, list(first), fixed, activation=activation)
    batch, rows, total = (torch.export.Dim(d) for d in ("batch", "rows", "total"))
    adapters = torch.export.Dim("adapters")
    shapes = {
        "inputs": (
            {0: batch, 1: rows},
            {0: total},
            {0: total},
            {0: adapters},
            {0: adapters + 1},
            {0: batch},
            {0: batch, 1: rows},
        )
    }
    model = exported(module, tuple(first.values()), tmp_path, dynamic_shapes=shapes)
    for case in (first, operands(2, [1, 0, 0, 5], 1), operands(5, [3])):
        got = run(model, tuple(case.values()))[0]
        exact = reference.lora_linear(**case, **fixed, activation=activation)
        plain = reference.lora_linear(**case, **fixed, activation=activation, compute_dtype=dtype)
        assert_close(got, exact, plain, what=f"{list(case['x'].shape)}")


def quantized(k: int, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, scales = reference.quantize_weight(torch.randn(n, k) / k**0.5)
    return q, scales, ops.int8_pack(q, scales)


def int8_call(packed: torch.Tensor, n: int):
    def call(x: torch.Tensor, packed_weight: torch.Tensor, **operands) -> torch.Tensor:
        return ops.int8_lora_linear(x, packed_weight, n, **operands)

    return call


@pytest.mark.parametrize("static", [False, pytest.param(True, marks=SLOW)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_int8_lora_linear(tmp_path, activation: str, static: bool) -> None:
    """Rows of zeros, of tiny values and with a NaN included."""
    k, n = 70, 131
    q, weight_scales, packed = quantized(k, n)
    x = torch.randn(2, 9, k)
    x[0, 1] = 0
    x[0, 2] = 1e-38
    x[1, 3, 5] = float("nan")
    x[1, 4, 6] = float("inf")
    case = {"x": x} | bank([4, 0, 9], k, n, 2) | {"residual": torch.randn(2, 9, n)}
    fixed = {"packed_weight": packed, "bias": torch.randn(n)}
    if static:
        fixed["x_scale"] = torch.tensor([0.03])
    module = Call(int8_call(packed, n), list(case), fixed, activation=activation)
    model = exported(module, tuple(case.values()), tmp_path)
    got = run(model, tuple(case.values()))[0]
    del fixed["packed_weight"]
    exact = reference.int8_lora_linear(
        q_weight=q, weight_scales=weight_scales, **case, **fixed, activation=activation
    )
    broken = exact.isnan().any(-1)
    assert got.isnan().all(-1).equal(broken) and int(broken.sum()) == 2
    assert_close(got[~broken], exact[~broken])


def test_int8_sums_are_exact(tmp_path) -> None:
    """The largest sums that there are: signed products summed in 16 bits would saturate."""
    k, n = 512, 65
    q = torch.full((n, k), 127, dtype=torch.int8)
    q[1::2] = -127
    scales = torch.ones(n)
    packed = ops.int8_pack(q, scales)
    x = torch.ones(3, k) * torch.tensor([[127.0], [-127.0], [127.0]])
    x[2, ::2] = -127.0
    model = exported(Call(int8_call(packed, n), ["x"], {"packed_weight": packed}), (x,), tmp_path)
    got = run(model, (x,))[0]
    assert got.equal((x.double() @ q.double().T).float())


@pytest.mark.slow
def test_a_bank_as_modules_keep_it(tmp_path) -> None:
    """bf16 and in blocks, with LayerNorm before the layer; and one adapter as PEFT has it."""
    k, n = 40, 70
    q, weight_scales, packed = quantized(k, n)
    norm = (torch.randn(k), torch.randn(k), 1e-5)
    fixed = bank([3, 5], k, n, 2, torch.bfloat16)
    case = {"x": torch.randn(2, 3, k), "adapter_ids": torch.tensor([1, 0], dtype=torch.int32)}
    del fixed["adapter_ids"]
    held = fixed | {"packed_weight": packed, "lora_b": in_blocks(fixed["lora_b"])}
    module = Call(int8_call(packed, n), list(case), held, norm=norm)
    got = run(exported(module, tuple(case.values()), tmp_path), tuple(case.values()))[0]
    exact = reference.int8_lora_linear(
        q_weight=q, weight_scales=weight_scales, norm=norm, **case, **fixed
    )
    # A LayerNorm rounded otherwise moves a value that stood between two integers.
    assert_close(got, exact, extra=1e-2)

    factors = {"lora_a": torch.randn(4, k), "lora_b": torch.randn(n, 4).t()}
    weight = torch.randn(n, k)
    module = Call(ops.lora_linear, ["x"], factors | {"weight": weight})
    got = run(exported(module, (case["x"],), tmp_path), (case["x"],))[0]
    assert_close(got, reference.lora_linear(case["x"], weight, **factors))


@pytest.mark.slow
def test_what_cannot_be_exported_is_named(tmp_path) -> None:
    x, weight = torch.randn(3, 8), torch.randn(6, 8)
    factors = {"lora_a": torch.randn(2, 8), "lora_b": torch.randn(2, 6)}
    seed = torch.tensor([1])
    module = Call(
        ops.lora_linear, ["x"], factors | {"weight": weight, "dropout_seed": seed}, dropout_p=0.5
    )
    with pytest.raises(Exception, match=r"model\.eval\(\)"):
        exported(module, (x,), tmp_path)
    q, k = torch.randn(1, 1, 2, 8), torch.randn(1, 5, 16)
    packed = dict(
        zip(("k_cache", "v_cache", "k_scales", "v_scales"), ops.kv_pack(k, k, 2), strict=True)
    )
    case = {"q": q} | packed | {"lengths": torch.tensor([5], dtype=torch.int32)}

    def attend(**operands):
        return export.kv_attention_step(k=None, v=None, **operands)

    with pytest.raises(Exception, match="kv_pack has not packed"):
        exported(Call(attend, list(case), {}), tuple(case.values()), tmp_path)


@pytest.mark.parametrize(
    "cache_dtype",
    [torch.float32, *(pytest.param(t, marks=SLOW) for t in (torch.int8, torch.float16))],
)
@pytest.mark.parametrize(
    "slots", ["position", *(pytest.param(s, marks=SLOW) for s in ("none", "row"))]
)
def test_kv_attention_step(tmp_path, cache_dtype: torch.dtype, slots: str) -> None:
    rows, tokens, heads, size, capacity, cache_rows = 3, 2, 5, 12, 11, 4
    dtype = torch.float32 if cache_dtype == torch.int8 else cache_dtype
    new = [torch.randn(rows, tokens, heads, size).to(dtype) for _ in range(3)]
    case = dict(zip(("q", "k", "v"), new, strict=True))
    for name in ("k", "v"):
        content = torch.randn(cache_rows, heads, capacity, size)
        if cache_dtype == torch.int8:
            case[f"{name}_cache"], scale = reference.quantize_rows(content)
            case[f"{name}_scales"] = scale.unsqueeze(-1)
        else:
            content[:, :, -1] = float("nan")  # nobody attends to it
            case[f"{name}_cache"] = content.to(cache_dtype)
    case["lengths"] = torch.tensor([0, 7, 3], dtype=torch.int32)
    if slots == "row":
        case["slots"] = torch.tensor([2, 0, 3], dtype=torch.int32)
    elif slots == "position":
        table = torch.randint(0, cache_rows, (rows, capacity), dtype=torch.int32)
        table[torch.arange(rows)[:, None], case["lengths"].long()[:, None] + torch.arange(2)] = (
            torch.tensor([[3], [1], [2]], dtype=torch.int32)
        )
        case["slots"] = table
    module = Call(export.kv_attention_step, list(case), {}, scale=0.3)
    model = exported(module, tuple(case.values()), tmp_path)
    before = {name: value.clone() for name, value in case.items()}
    got = run(model, tuple(case.values()))
    exact, _ = reference.kv_attention_step(**case, scale=0.3)
    plain, _ = reference.kv_attention_step(**before, scale=0.3, compute_dtype=dtype)
    assert_close(got[0], exact, plain)
    names = [name for name in case if name.endswith(("_cache", "_scales"))]
    names.sort(key=lambda name: name.endswith("_scales"))
    for name, value in zip(names, got[1:], strict=True):
        assert torch.equal(value.nan_to_num(7.0), case[name].nan_to_num(7.0)), name


@pytest.mark.parametrize(
    "cache", ["per_channel", *(pytest.param(c, marks=SLOW) for c in ("float32", "per_position"))]
)
@pytest.mark.parametrize("slots", [[1, 0, 1], pytest.param(None, marks=SLOW)])
def test_kv_attention_over_a_fixed_cache(tmp_path, cache: str, slots: list[int] | None) -> None:
    """Cross-attention: beams of an utterance share a cache row, one utterance has no frames."""
    rows, heads, size, capacity = 3, 5, 12, 11
    cache_rows = rows if slots is None else 2
    case = {"q": torch.randn(rows, 2, heads, size)}
    for name in ("k", "v"):
        content = torch.randn(cache_rows, heads, capacity, size)
        if cache == "float32":
            case[f"{name}_cache"] = content
        elif cache == "per_position":
            case[f"{name}_cache"], scale = reference.quantize_rows(content)
            case[f"{name}_scales"] = scale.unsqueeze(-1)
        else:
            q, scale = reference.quantize_rows(content.transpose(2, 3))
            case[f"{name}_cache"] = q.transpose(2, 3).contiguous()
            case[f"{name}_scales"] = scale.unsqueeze(2)
    case["lengths"] = torch.tensor([11, 0, 4], dtype=torch.int32)
    if slots is not None:
        case["slots"] = torch.tensor(slots, dtype=torch.int32)

    def attend(**operands):
        return export.kv_attention_step(k=None, v=None, scale=0.3, **operands)

    model = exported(Call(attend, list(case), {}), tuple(case.values()), tmp_path)
    (got,) = run(model, tuple(case.values()))
    exact, _ = reference.kv_attention_step(k=None, v=None, scale=0.3, **case)
    assert_close(got, exact)
    assert (got[1] == 0).all()
