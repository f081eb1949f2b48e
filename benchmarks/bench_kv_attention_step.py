"""kv_attention_step against scaled_dot_product_attention on the same caches, and kv_pack."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lora_kernels import ops, reference
from lora_kernels.benchmarking.cold import copies, cycling

from .conftest import Work

HEADS, HEAD_SIZE = 8, 64  # Whisper base


def work_of(rows: int, positions: int, element: int, share: int = 1) -> Work:
    values = rows * HEADS * positions * HEAD_SIZE
    kind = "float32" if element == 4 else "bfloat16"
    return Work(2.0 * values * element / share, 4.0 * values, kind)


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_cross_attention(compare, rows: int, dtype: torch.dtype) -> None:
    """1,500 frames of a 30 s window, fixed K/V."""
    frames = 1500
    size = torch.empty(0, dtype=dtype).element_size()
    caches = [
        tuple(torch.randn(rows, HEADS, frames, HEAD_SIZE).to(dtype) for _ in range(2))
        for _ in range(copies(2 * rows * HEADS * frames * HEAD_SIZE * size))
    ]
    q = torch.randn(rows, 1, HEADS, HEAD_SIZE).to(dtype)
    q_torch = q.transpose(1, 2).contiguous()
    lengths = torch.full((rows,), frames, dtype=torch.int32)

    ours = cycling(lambda k, v: ops.kv_attention_step(q, None, None, k, v, lengths), caches)
    peers = {"sdpa": cycling(lambda k, v: F.scaled_dot_product_attention(q_torch, k, v), caches)}
    compare("kv_attention_step", ours, peers, work_of(rows, frames, size))


@pytest.mark.parametrize("heads", [6, 8, 12])  # Whisper tiny, base, small
@pytest.mark.parametrize("beams", [1, 5])
def test_cross_attention_int8(compare, beams: int, heads: int) -> None:
    """Blocked INT8 K/V of one utterance; the peers are ours too: INT8 in rows, and fp32."""
    frames = 1500
    values = heads * frames * HEAD_SIZE
    k, v = torch.randn(2, 1, frames, heads * HEAD_SIZE)
    packed = ops.kv_pack(k, v, heads)
    in_rows = reference.kv_unpack(*packed[:2], HEAD_SIZE)
    floats = (t.unflatten(-1, (heads, -1)).transpose(1, 2).contiguous() for t in (k, v))
    q = torch.randn(beams, 1, heads, HEAD_SIZE)
    lengths = torch.full((beams,), frames, dtype=torch.int32)
    slots = torch.zeros(beams, dtype=torch.int32)

    def attend(k, v, k_scales=None, v_scales=None):
        return ops.kv_attention_step(
            *(q, None, None, k, v, lengths), k_scales=k_scales, v_scales=v_scales, slots=slots
        )

    ours = cycling(attend, [packed] * copies(2 * values))
    peers = {
        "int8_in_rows": cycling(
            attend, [(*(t.contiguous() for t in in_rows), *packed[2:])] * copies(2 * values)
        ),
        "float32": cycling(attend, [tuple(floats)] * copies(8 * values)),
    }
    work = Work(2.0 * values, 4.0 * beams * values, "int8")
    compare("kv_attention_step", ours, peers, work)


@pytest.mark.parametrize("heads", [6, 8, 12, 20])
def test_packing(compare, heads: int) -> None:
    """Once per utterance and layer; the peer is the projection that comes before it, in fp32."""
    frames, width = 1500, heads * HEAD_SIZE
    states = [
        tuple(torch.randn(1, frames, width) for _ in range(2))
        for _ in range(copies(8 * frames * width))
    ]
    x, weight = torch.randn(1, frames, width), torch.randn(2 * width, width)
    ours = cycling(lambda k, v: ops.kv_pack(k, v, heads), states)
    work = Work(8.0 * frames * width, 0.0, "float32")
    compare("kv_pack", ours, {"projection": lambda: F.linear(x, weight)}, work)


@pytest.mark.parametrize("rows", [1, 8])
def test_self_attention(compare, rows: int) -> None:
    """The 448th token: append, and attend over 447 positions; the peer grows its cache by cat."""
    length, capacity = 447, 448
    caches = [
        tuple(torch.randn(rows, HEADS, capacity, HEAD_SIZE) for _ in range(2))
        for _ in range(copies(2 * rows * HEADS * capacity * HEAD_SIZE * 4))
    ]
    q, k_new, v_new = (torch.randn(rows, 1, HEADS, HEAD_SIZE) for _ in range(3))
    q_torch, k_torch, v_torch = (t.transpose(1, 2).contiguous() for t in (q, k_new, v_new))
    lengths = torch.full((rows,), length, dtype=torch.int32)

    def growing(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k = torch.cat([k[:, :, :length], k_torch], 2)
        v = torch.cat([v[:, :, :length], v_torch], 2)
        return F.scaled_dot_product_attention(q_torch, k, v)

    def static(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k[:, :, length:] = k_torch
        v[:, :, length:] = v_torch
        return F.scaled_dot_product_attention(q_torch, k, v)

    ours = cycling(lambda k, v: ops.kv_attention_step(q, k_new, v_new, k, v, lengths), caches)
    peers = {"sdpa_growing_cache": cycling(growing, caches), "sdpa_static": cycling(static, caches)}
    compare("kv_attention_step", ours, peers, work_of(rows, length + 1, 4))
