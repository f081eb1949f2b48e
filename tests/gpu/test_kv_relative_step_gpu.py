"""kv_relative_step on a GPU: against the reference, and in graphs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cuda"))

from attention_steps import int32
from test_emulated_kv_relative_step import RelativeStep, check_against, make_step, steps
from test_lora_linear_gpu import dtypes

from lora_kernels import ops


def _without() -> str:
    if not torch.cuda.is_available():
        return "no GPU"
    name = "lora_kernels::kv_relative_step"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"):
        return "the library was built without its CUDA kernels (LORA_KERNELS_CUDA=ON)"
    return ""


pytestmark = pytest.mark.skipif(bool(_without()), reason=_without())


def on_gpu(step: RelativeStep) -> tuple[RelativeStep, torch.Tensor]:
    """The step after a run on a GPU, with what was written to its rings; the result."""
    there = step.to("cuda")
    out = there.run(ops.kv_relative_step)
    return there.to("cpu"), out.cpu()


@pytest.mark.parametrize("dtype", dtypes(), ids=lambda d: str(d)[6:])
def test_steps(dtype: torch.dtype) -> None:
    parakeet = make_step(
        tokens=14, heads=8, head_size=128, left=70, lengths=tuple(range(0, 144, 9)), capacity=84,
        dtype=dtype,
    )  # fmt: skip
    for step in [*steps(dtype), parakeet]:
        ours, got = on_gpu(step)
        what = f"{list(step.q.shape)} {step.k_cache.dtype}"
        check_against(step, ours, got, what)


def test_twice_the_same_bits() -> None:
    for step in steps(torch.float16):
        seen = [on_gpu(step)[1] for _ in range(3)]
        assert all(torch.equal(seen[0], other) for other in seen[1:])


def test_a_captured_graph_follows_a_stream() -> None:
    """Lengths, counts and slots are what they are at replay."""
    step = make_step(
        lengths=(0, 0, 0), counts=int32(5, 5, 5), slots=int32(0, 1, 2), dtype=torch.float16
    )
    there = step.to("cuda")
    there.clone().run(ops.kv_relative_step)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = there.run(ops.kv_relative_step)
    assert there.slots is not None
    assert there.counts is not None
    for replay in range(8):  # around the ring
        there.counts.copy_(torch.randint(0, 6, (3,)) if replay else there.counts)
        again = there.clone()
        graph.replay()
        assert torch.equal(out, again.run(ops.kv_relative_step))
        for name in ("k_cache", "v_cache"):
            ring, other = getattr(there, name), getattr(again, name)
            assert torch.equal(ring.nan_to_num(nan=77), other.nan_to_num(nan=77))
        assert out.isfinite().all()
        there.lengths.add_(there.counts)


def test_bad_indices_make_their_row_nan() -> None:
    for bad in (-1, 2**31 - 1, -(2**31)):
        for name in ("lengths", "counts", "slots"):
            if name == "lengths" and bad > 0:  # a length like any other
                continue
            step = make_step(lengths=(31, 8, 20), counts=int32(5, 5, 5), slots=int32(1, 2, 0))
            getattr(step, name)[1] = bad
            after, out = on_gpu(step)
            for ring in (2, 3):  # the bad row's, and nobody's
                for cache in ("k_cache", "v_cache"):
                    now, then = getattr(after, cache)[ring], getattr(step, cache)[ring]
                    assert torch.equal(now.cpu().nan_to_num(), then.nan_to_num())
            assert out.isnan().flatten(1).all(1).tolist() == [False, True, False], (name, bad)
