"""What ``kv_attention_step`` refuses, and how it behaves under torch's compilers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from attention_steps import Step, int32, make_step

from lora_kernels import ops

OP = torch.ops.lora_kernels.kv_attention_step.default


def changed(**arguments) -> Step:
    """A valid step of three rows (lengths 3, 0, 20 of 21 positions) with other arguments."""
    return dataclasses.replace(make_step(lengths=int32(3, 0, 20)), **arguments)


def quantized(per_channel=False, append=True, **arguments) -> Step:
    step = make_step(
        lengths=int32(3, 0, 20), cache_dtype=torch.int8, per_channel=per_channel, append=append
    )
    return dataclasses.replace(step, **arguments)


def scales(value=None) -> torch.Tensor:
    x = torch.rand(3, 2, 1, 64) + 0.5
    if value is not None:
        x[2, 1, 0, 5] = value
    return x


BAD = {
    "length beyond the cache": (
        lambda: changed(lengths=int32(3, 21, 20)),
        ["lengths: entry 1 is 21", "position 22", "cache of 21", "greater capacity"],
    ),
    "length beyond a fixed cache": (
        lambda: changed(k=None, v=None, lengths=int32(3, 0, 22)),
        ["lengths: entry 2 is 22", "21 positions"],
    ),
    "negative length": (
        lambda: changed(lengths=int32(3, -1, 20)),
        ["lengths: entry 1 is -1", "0 to 20"],
    ),
    "lengths of another dtype": (
        lambda: changed(lengths=torch.tensor([3, 0, 20])),
        ["lengths", "int32"],
    ),
    "lengths of another shape": (lambda: changed(lengths=int32(3, 0)), ["lengths", "[3]", "[2]"]),
    "slot out of range": (
        lambda: changed(slots=int32(0, 3, 1)),
        ["slots: entry [1] is 3", "0 to 2"],
    ),
    "negative slot": (
        lambda: changed(slots=int32(0, 2, -1)),
        ["slots: entry [2] is -1", "0 to 2"],
    ),
    "slot of a position out of range": (
        lambda: changed(slots=torch.full((3, 21), 9, dtype=torch.int32)),
        ["slots: entry [0, 0] is 9", "0 to 2"],
    ),
    "slots of another shape": (
        lambda: changed(slots=int32(0, 1)),
        ["slots", "[3]", "[3, 21]", "got [2]"],
    ),
    "slots of another dtype": (
        lambda: changed(slots=torch.tensor([0, 1, 2])),
        ["slots", "int32"],
    ),
    "more rows than cache rows": (
        lambda: changed(k_cache=torch.zeros(2, 2, 21, 64), v_cache=torch.zeros(2, 2, 21, 64)),
        ["slots", "3 rows", "2 in k_cache", "int32 [3]"],
    ),
    "two rows in one place": (
        lambda: changed(slots=int32(1, 2, 1), lengths=int32(4, 0, 4)),
        ["slots: rows 0 and 2", "position 4 of cache row 1"],
    ),
    "two rows in one place, per position": (
        lambda: changed(slots=torch.zeros(3, 21, dtype=torch.int32), lengths=int32(4, 0, 4)),
        ["slots: rows 0 and 2", "position 4 of cache row 0"],
    ),
    "k without v": (lambda: changed(v=None), ["v:", "None"]),
    "v without k": (lambda: changed(k=None), ["k:", "None"]),
    "k of another shape": (
        lambda: changed(k=torch.zeros(3, 1, 2, 63)),
        ["k:", "[3, 1, 2, 64]", "[3, 1, 2, 63]"],
    ),
    "v of another dtype": (
        lambda: changed(v=torch.zeros(3, 1, 2, 64).half()),
        ["v:", "float32", "float16"],
    ),
    "q without tokens": (lambda: changed(q=torch.zeros(3, 2, 64)), ["q:", "[3, 2, 64]"]),
    "q of int8": (
        lambda: changed(q=torch.zeros(3, 1, 2, 64, dtype=torch.int8), k=None, v=None),
        ["q:", "float32", "int8"],
    ),
    "q of fp64": (
        lambda: changed(q=torch.zeros(3, 1, 2, 64, dtype=torch.float64), k=None, v=None),
        ["q:", "float32"],
    ),
    "a cache of other heads": (
        lambda: changed(k_cache=torch.zeros(3, 4, 21, 64)),
        ["k_cache", "2 heads", "[3, 4, 21, 64]"],
    ),
    "caches of two shapes": (
        lambda: changed(v_cache=torch.zeros(3, 2, 20, 64)),
        ["v_cache", "[3, 2, 21, 64]", "[3, 2, 20, 64]"],
    ),
    "caches of two dtypes": (
        lambda: changed(v_cache=torch.zeros(3, 2, 21, 64).half()),
        ["v_cache", "float32", "float16"],
    ),
    "a cache with strides": (
        lambda: changed(k_cache=torch.zeros(3, 21, 2, 64).transpose(1, 2)),
        ["k_cache", "contiguous"],
    ),
    "int8 without scales": (
        lambda: quantized(k_scales=None, v_scales=None),
        ["k_scales, v_scales", "[3, 2, 21, 1]", "None"],
    ),
    "one scale tensor": (lambda: quantized(v_scales=None), ["v_scales", "None"]),
    "scales without int8": (
        lambda: changed(k_scales=torch.zeros(3, 2, 21, 1), v_scales=torch.zeros(3, 2, 21, 1)),
        ["k_scales, v_scales", "float32 caches", "int8"],
    ),
    "scales of another shape": (
        lambda: quantized(k_scales=torch.zeros(3, 2, 21)),
        ["k_scales", "[3, 2, 21, 1]", "[3, 2, 1, 64]", "[3, 2, 21]"],
    ),
    "scales of two shapes": (
        lambda: quantized(v_scales=scales()),
        ["v_scales", "[3, 2, 21, 1]", "[3, 2, 1, 64]"],
    ),
    "scales of another dtype": (
        lambda: quantized(k_scales=torch.zeros(3, 2, 21, 1).half()),
        ["k_scales", "float32"],
    ),
    "append with scales per channel": (
        lambda: quantized(k_scales=scales(), v_scales=scales()),
        ["k_scales, v_scales", "per position", "per channel"],
    ),
    "a table with scales per channel": (
        lambda: quantized(
            True, False, slots=torch.arange(3, dtype=torch.int32).unsqueeze(1).repeat(1, 21)
        ),
        ["slots", "[3]", "[3, 21]", "per channel"],
    ),
    "a zero scale": (
        lambda: quantized(True, False, k_scales=scales(0)),
        ["k_scales: entry [2, 1, 0, 5] is 0", "finite number above 0"],
    ),
    "a NaN scale": (
        lambda: quantized(True, False, v_scales=scales(torch.nan)),
        ["v_scales: entry [2, 1, 0, 5] is nan"],
    ),
    "an infinite scale": (
        lambda: quantized(True, False, v_scales=scales(torch.inf)),
        ["v_scales: entry [2, 1, 0, 5] is inf"],
    ),
    "a head that is none": (lambda: changed(heads=[0, 2]), ["heads: entry 1 is 2", "0 to 1"]),
    "a negative head": (lambda: changed(heads=[-1]), ["heads: entry 0 is -1", "0 to 1"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_and_changes_nothing(case):
    make, words = BAD[case]
    step = make()
    before = step.clone()
    with pytest.raises((RuntimeError, ValueError)) as error:
        step.run()
    text = str(error.value)
    assert "kv_attention_step: " in text
    for word in words:
        assert word in text
    for tensor, copy in zip(step.caches(), before.caches(), strict=True):
        assert torch.equal(tensor.nan_to_num(nan=77), copy.nan_to_num(nan=77))


def test_slots_of_positions_that_are_not_read_may_hold_anything():
    step = make_step(lengths=int32(3, 0, 20), slots="per position")
    for row, length in enumerate((3, 0, 20)):
        step.slots[row, length + 1 :] = 10**9
    step.run()


def test_an_unknown_implementation_is_an_error():
    with pytest.raises(
        RuntimeError, match="'sse2'; expected 'amx', 'avx512', 'avx2', 'generic', 'avx2_vnni'"
    ):
        torch.ops.lora_kernels.force_implementation("sse2")


# ---------- torch's own checks


def arguments(step: Step) -> tuple:
    s = step
    return (
        *(s.q, s.k, s.v, s.k_cache, s.v_cache, s.k_scales, s.v_scales),
        *(s.lengths, s.slots, s.scale, s.heads),
    )


def samples() -> dict[str, Step]:
    return {
        "self": make_step(tokens=2),
        "self int8": make_step(cache_dtype=torch.int8, chosen=[1, 0]),
        "beams": make_step(slots="per position", dtype=torch.bfloat16),
        "cross": make_step(append=False, slots=int32(0, 0, 1), chosen=[1]),
        "cross int8": make_step(append=False, cache_dtype=torch.int8, per_channel=True),
    }


def finite(step: Step) -> Step:
    """Without the NaN where nobody reads: opcheck compares the caches too."""
    for tensor in step.caches():
        if tensor.is_floating_point():
            tensor.nan_to_num_(nan=0.5)
    return step


@pytest.mark.parametrize("name", samples())
def test_opcheck(name):
    torch.library.opcheck(OP, arguments(finite(samples()[name])))


class Attention(torch.nn.Module):
    def __init__(self, scale: float, heads: list[int] | None) -> None:
        super().__init__()
        self.scale, self.heads = scale, heads

    def forward(self, q, k, v, k_cache, v_cache, k_scales, v_scales, lengths, slots):
        out, weights = ops.kv_attention_step(
            *(q * 1.0, k, v, k_cache, v_cache, lengths),
            k_scales=k_scales,
            v_scales=v_scales,
            slots=slots,
            scale=self.scale,
            heads=self.heads,
        )
        return out + 1, weights, k_cache.sum()  # the sum sees what was appended


@pytest.mark.parametrize("name", ["self int8", "cross"])
def test_compile(name):
    step = finite(samples()[name])
    other = step.clone()
    model = Attention(step.scale, step.heads)
    want = model(*arguments(other)[:9])
    got = torch.compile(model, fullgraph=True, backend="aot_eager")(*arguments(step)[:9])
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    for ours, theirs in zip(step.caches(), other.caches(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["self int8", "cross"])
def test_export(name):
    step = finite(samples()[name])
    other = step.clone()
    model = Attention(step.scale, step.heads)
    want = model(*arguments(other)[:9])
    program = torch.export.export(model, arguments(step.clone())[:9])
    got = program.module()(*arguments(step)[:9])
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    for ours, theirs in zip(step.caches(), other.caches(), strict=True):
        assert torch.equal(ours, theirs)
