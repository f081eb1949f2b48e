"""What ``kv_relative_step`` refuses, and how it behaves under torch's compilers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from relative_steps import Chunk, int32, make_chunk

from lora_kernels import ops

OP = torch.ops.lora_kernels.kv_relative_step.default


def changed(**arguments) -> Chunk:
    """A valid chunk of three rows (5 frames, 2 heads of 24, left 7, rings of 12) but for these."""
    return dataclasses.replace(make_chunk(), **arguments)


def rings(*sizes: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(sizes, dtype=dtype) for name in ("k_cache", "v_cache")}


BAD = {
    "rings that are too short": (
        lambda: changed(**rings(3, 2, 11, 24)),
        ["k_cache, v_cache", "left + T, 7 + 5, got 11", "rings of more frames"],
    ),
    "a negative left": (lambda: changed(left=-1), ["left: ", "at least 0", "got -1"]),
    "an enormous left": (lambda: changed(left=2**62), ["left + T", f"{2**62} + 5, got 12"]),
    "fewer rings than rows": (
        lambda: changed(**rings(2, 2, 12, 24)),
        ["k_cache, v_cache", "each of the 3 rows", "got 2"],
    ),
    "a negative length": (lambda: changed(lengths=int32(3, -1, 9)), ["lengths: entry 1 is -1"]),
    "lengths of another shape": (lambda: changed(lengths=int32(3, 0)), ["lengths", "[3]", "[2]"]),
    "lengths of another dtype": (
        lambda: changed(lengths=torch.tensor([3, 0, 9])),
        ["lengths", "int32", "convert"],
    ),
    "a count beyond the chunk": (
        lambda: changed(counts=int32(5, 0, 6)),
        ["counts: entry 2 is 6", "0 to 5"],
    ),
    "a negative count": (
        lambda: changed(counts=int32(-1, 0, 5)),
        ["counts: entry 0 is -1", "0 to 5"],
    ),
    "counts of another dtype": (
        lambda: changed(counts=torch.tensor([3, 0, 5])),
        ["counts", "int32", "convert"],
    ),
    "a slot that is no ring": (
        lambda: changed(slots=int32(0, 1, 3)),
        ["slots: entry 2 is 3", "0 to 2"],
    ),
    "a negative slot": (lambda: changed(slots=int32(0, -1, 2)), ["slots: entry 1 is -1", "0 to 2"]),
    "two rows in one ring": (
        lambda: changed(slots=int32(1, 2, 1)),
        ["slots: rows 0 and 2", "ring 1", "of its own"],
    ),
    "one memory for both caches": (
        lambda: changed(**dict.fromkeys(("k_cache", "v_cache"), torch.zeros(3, 2, 12, 24))),
        ["k_cache, v_cache: expected memory of their own"],
    ),
    "slots of another shape": (
        lambda: changed(slots=torch.zeros(3, 12, dtype=torch.int32)),
        ["slots", "[3]", "[3, 12]"],
    ),
    "q of three dimensions": (lambda: changed(q=torch.zeros(3, 2, 24)), ["q: ", "[3, 2, 24]"]),
    "q of no frames": (lambda: changed(q=torch.zeros(3, 0, 2, 24)), ["q: ", "at least 1 frame"]),
    "a head size of none": (
        lambda: changed(q=torch.zeros(3, 5, 2, 0), **rings(3, 2, 12, 0)),
        ["q: ", "head size of at least 1, got 0"],
    ),
    "q of int8": (
        lambda: changed(q=torch.zeros(3, 5, 2, 24, dtype=torch.int8)),
        ["q: ", "float32", "int8"],
    ),
    "q of fp64": (
        lambda: changed(q=torch.zeros(3, 5, 2, 24, dtype=torch.float64)),
        ["q: ", "float32", "convert"],
    ),
    "k of another shape": (
        lambda: changed(k=torch.zeros(3, 5, 2, 23)),
        ["k: ", "[3, 5, 2, 24]", "[3, 5, 2, 23]"],
    ),
    "v of another dtype": (
        lambda: changed(v=torch.zeros(3, 5, 2, 24).half()),
        ["v: ", "dtype of q, float32", "float16", "convert"],
    ),
    "positions of another length": (
        lambda: changed(positions=torch.zeros(17, 2, 24)),
        ["positions: ", "[16, 2, 24]", "[17, 2, 24]"],
    ),
    "positions of another dtype": (
        lambda: changed(positions=torch.zeros(16, 2, 24).bfloat16()),
        ["positions: ", "float32", "bfloat16"],
    ),
    "bias_u of another shape": (
        lambda: changed(bias_u=torch.zeros(48)),
        ["bias_u: ", "[2, 24]", "[48]"],
    ),
    "bias_v of another dtype": (
        lambda: changed(bias_v=torch.zeros(2, 24).half()),
        ["bias_v: ", "float32", "float16"],
    ),
    "a cache of other heads": (
        lambda: changed(k_cache=torch.zeros(3, 4, 12, 24)),
        ["k_cache: ", "2 heads", "[3, 4, 12, 24]"],
    ),
    "caches of two shapes": (
        lambda: changed(v_cache=torch.zeros(3, 2, 13, 24)),
        ["v_cache: ", "[3, 2, 12, 24]", "[3, 2, 13, 24]"],
    ),
    "caches of two dtypes": (
        lambda: changed(v_cache=torch.zeros(3, 2, 12, 24).half()),
        ["v_cache: ", "float32", "float16"],
    ),
    "caches of int8": (
        lambda: changed(**rings(3, 2, 12, 24, dtype=torch.int8)),
        ["k_cache, v_cache: ", "float32", "int8", "floating point"],
    ),
    "a cache with strides": (
        lambda: changed(v_cache=torch.zeros(3, 12, 2, 24).transpose(1, 2)),
        ["v_cache: ", "contiguous", "strides"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_and_changes_nothing(case):
    make, words = BAD[case]
    chunk = make()
    before = chunk.clone()
    with pytest.raises(RuntimeError) as error:
        chunk.run()
    assert str(error.value).startswith("kv_relative_step: ")
    for word in words:
        assert word in str(error.value)
    for cache, copy in zip(chunk.caches(), before.caches(), strict=True):
        assert torch.equal(cache, copy)


# ---------- torch's own checks


def samples() -> dict[str, Chunk]:
    return {
        "plain": make_chunk(),
        "streams": make_chunk(counts=int32(5, 0, 2), slots=int32(2, 3, 0), rings=4),
        "bfloat16": make_chunk(dtype=torch.bfloat16, cache_dtype=torch.float32),
    }


@pytest.mark.parametrize("name", samples())
def test_opcheck(name):
    torch.library.opcheck(OP, tuple(samples()[name].arguments()))


class Attention(torch.nn.Module):
    def __init__(self, left: int, scale: float) -> None:
        super().__init__()
        self.left, self.scale = left, scale

    def forward(self, q, k, v, k_cache, v_cache, positions, u, w, lengths, counts, slots):
        out = ops.kv_relative_step(
            *(q * 1.0, k, v, k_cache, v_cache, positions, u, w, lengths),
            left=self.left,
            counts=counts,
            slots=slots,
            scale=self.scale,
        )
        return out + 1, k_cache.sum()  # the sum sees what was appended


@pytest.mark.parametrize("how", ["compile", "export"])
@pytest.mark.parametrize("name", ["plain", "streams"])
def test_under_torchs_compilers(name, how):
    chunk = samples()[name]
    other, third = chunk.clone(), chunk.clone()
    model = Attention(chunk.left, chunk.scale)

    def tensors(of: Chunk) -> tuple:
        return (*of.arguments()[:9], of.counts, of.slots)

    want = model(*tensors(other))
    if how == "compile":
        run = torch.compile(model, fullgraph=True, backend="aot_eager")
    else:
        run = torch.export.export(model, tensors(third)).module()
    got = run(*tensors(chunk))
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    for ours, theirs in zip(chunk.caches(), other.caches(), strict=True):
        assert torch.equal(ours, theirs)
