"""kv_attention_step and kv_pack on a GPU: against the reference and the CPU, and in graphs."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cuda"))

from attention_steps import Step, int32, make_blocked_step, make_step
from test_emulated_kv_attention_step import SHAPES, blocked_steps, check_against, kinds, step_of
from test_lora_linear_gpu import dtypes

from lora_kernels import ops


def _without() -> str:
    if not torch.cuda.is_available():
        return "no GPU"
    for name in ("kv_attention_step", "kv_pack"):
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"lora_kernels::{name}", "CUDA"):
            return "the library was built without its CUDA kernels (LORA_KERNELS_CUDA=ON)"
    return ""


pytestmark = pytest.mark.skipif(bool(_without()), reason=_without())


def on_gpu(step: Step) -> tuple[Step, torch.Tensor, torch.Tensor]:
    """The step after a run on a GPU, with what was written to its caches; result and weights."""
    there = step.to("cuda")
    out, weights = there.run()
    return there.to("cpu"), out.cpu(), weights.cpu()


def check(step: Step, what: str = "") -> None:
    check_against(step, *on_gpu(step), what)


@pytest.mark.parametrize("dtype", dtypes(), ids=lambda d: str(d)[6:])
def test_steps(dtype: torch.dtype) -> None:
    larger = {"rows": 9, "tokens": 1, "heads": 20, "head_size": 64, "capacity": 448}
    for shape, (cached, append, slots) in itertools.product([*SHAPES, larger], kinds(dtype)):
        check(step_of(shape, dtype, cached, append, slots), f"{shape} {cached} {append} {slots}")


@pytest.mark.parametrize("dtype", dtypes(), ids=lambda d: str(d)[6:])
def test_blocked(dtype: torch.dtype) -> None:
    beams = torch.arange(4, dtype=torch.int32).repeat_interleave(5)
    cross = make_blocked_step(
        rows=20, cache_rows=4, heads=20, positions=1500, dtype=dtype, slots=beams,
        lengths=torch.full((20,), 1500, dtype=torch.int32),
    )  # fmt: skip
    for step in [*blocked_steps(dtype), cross]:
        check(step, "blocked")


@pytest.mark.parametrize("dtype", dtypes(), ids=lambda d: str(d)[6:])
def test_pack_gives_the_bits_of_the_cpu(dtype: torch.dtype) -> None:
    for rows, positions, heads, size in [(2, 1500, 20, 64), (3, 129, 3, 37), (1, 1, 1, 1)]:
        k, v = torch.randn(2, rows, positions, heads * size).to(dtype)
        got = ops.kv_pack(k.cuda(), v.cuda(), heads)
        for mine, cpu in zip(got, ops.kv_pack(k, v, heads), strict=True):
            assert torch.equal(mine.cpu(), cpu)


def test_twice_the_same_bits() -> None:
    for step in (
        make_step(rows=4, capacity=1500, append=False, dtype=torch.float16),
        blocked_steps(torch.float16)[1],
    ):
        seen = [on_gpu(step)[1] for _ in range(3)]
        assert all(torch.equal(seen[0].nan_to_num(), other.nan_to_num()) for other in seen[1:])


def test_a_captured_graph_follows_lengths_and_slots() -> None:
    step = make_step(rows=3, capacity=40, dtype=torch.float16, slots=int32(0, 1, 2))
    step.k_cache.nan_to_num_()
    step.v_cache.nan_to_num_()
    there = step.to("cuda")
    there.clone().run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = there.run()
    assert there.slots is not None
    for _ in range(3):
        there.slots.copy_(torch.randperm(3))
        there.lengths.copy_(torch.randint(0, 40, (3,)))
        again = there.clone()
        graph.replay()
        assert torch.equal(out, again.run()[0])
        assert torch.equal(there.k_cache, again.k_cache)


def test_bad_indices_make_their_row_nan() -> None:
    for bad in (-1, 50, 2**31 - 1, -(2**31)):
        for append in (True, False):
            step = make_step(
                rows=3, capacity=50, lengths=int32(9, 9, 8), slots=int32(1, 2, 0), append=append,
                dtype=torch.float16,
            )  # fmt: skip
            for name in ("slots", "lengths"):
                spoiled = step.clone()
                getattr(spoiled, name)[1] = bad
                _, out, _ = on_gpu(spoiled)
                assert out.isnan().flatten(1).all(1).tolist() == [False, True, False]


def test_a_recorded_step_is_captured() -> None:
    """Packing, projections, both attentions and the choice of a token, by one replay."""
    assert ops.Composite.runs_on(torch.device("cuda"))
    rows, heads, width, frames = 4, 2, 128, 150
    weight = torch.randint(-127, 128, (width, width), dtype=torch.int8)
    packed = ops.int8_pack(weight, torch.full((width,), 1e-3)).cuda()

    def new(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
        return torch.randn(*shape).to(dtype).cuda()

    x, q, k, v, out = (new(rows, width) for _ in range(5))
    encoded = new(rows, frames, width)
    caches = torch.zeros(2, rows, heads, 20, width // heads).half().cuda()
    lengths = torch.full((rows,), 3, dtype=torch.int32, device="cuda")
    seen = torch.full((rows,), frames, dtype=torch.int32, device="cuda")
    keys, values, k_scales, v_scales = ops.kv_pack(encoded, encoded, heads)
    step = ops.Composite()
    shape = (rows, 1, heads, width // heads)
    step.kv_pack(encoded, encoded, heads, out=(keys, values, k_scales, v_scales))
    for to in (q, k, v):
        step.int8_lora_linear(x, packed, width, out=to)
    step.kv_attention_step(
        q.view(shape), k.view(shape), v.view(shape), *caches, lengths, scale=0.1,
        out=out.view(shape),
    )  # fmt: skip
    step.kv_attention_step(
        out.view(shape), None, None, keys, values, seen, k_scales=k_scales, v_scales=v_scales,
        scale=0.1, out=q.view(shape),
    )  # fmt: skip
    step.run()
    want = q.clone()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.run()
    q.fill_(float("nan"))
    graph.replay()
    assert torch.equal(q, want)
