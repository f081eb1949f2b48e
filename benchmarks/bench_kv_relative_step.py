"""kv_relative_step against the same in torch: caches grown by cat, products, gather, softmax."""

from __future__ import annotations

import pytest
import torch

from lora_kernels import ops
from lora_kernels.benchmarking.cold import copies, cycling

from .conftest import Work

HEADS, HEAD_SIZE, CHUNK, LEFT = 8, 128, 14, 70  # Parakeet, chunks of 1.12 s


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_parakeet_chunk(compare, rows: int, dtype: torch.dtype) -> None:
    """A chunk in the middle of each stream; the peer keeps its caches in the order of frames."""
    frames, distances = LEFT + CHUNK, LEFT + 2 * CHUNK - 1
    size = torch.empty(0, dtype=dtype).element_size()
    cached = 2 * rows * HEADS * frames * HEAD_SIZE * size
    table = distances * HEADS * HEAD_SIZE * size
    layers = [
        (
            *(torch.randn(rows, HEADS, frames, HEAD_SIZE).to(dtype) for _ in range(2)),
            torch.randn(distances, HEADS, HEAD_SIZE).to(dtype),
        )
        for _ in range(copies(cached + table))
    ]
    q, k, v = (torch.randn(rows, CHUNK, HEADS, HEAD_SIZE).to(dtype) for _ in range(3))
    u, w = (torch.randn(HEADS, HEAD_SIZE).to(dtype) for _ in range(2))
    lengths = torch.full((rows,), 1000, dtype=torch.int32)
    scale = HEAD_SIZE**-0.5

    def ours(k_ring: torch.Tensor, v_ring: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return ops.kv_relative_step(
            *(q, k, v, k_ring, v_ring, positions, u, w, lengths), left=LEFT, scale=scale
        )

    query = torch.arange(CHUNK)[:, None]
    columns = (CHUNK - 1 - query + torch.arange(frames)).expand(rows, HEADS, -1, -1)

    def eager(k_ring: torch.Tensor, v_ring: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        keys = torch.cat([k_ring[:, :, CHUNK:], k.transpose(1, 2)], 2)
        values = torch.cat([v_ring[:, :, CHUNK:], v.transpose(1, 2)], 2)
        queries = q.transpose(1, 2)
        by_distance = (queries + w[:, None]) @ positions.permute(1, 2, 0)
        scores = (queries + u[:, None]) @ keys.transpose(-1, -2) + by_distance.gather(-1, columns)
        return ((scores * scale).softmax(-1) @ values).transpose(1, 2)

    element = rows * HEADS * HEAD_SIZE * size
    work = Work(
        cached + table + 4.0 * CHUNK * element,
        6.0 * rows * CHUNK * HEADS * HEAD_SIZE * frames,
        "float32",
    )
    compare(
        "kv_relative_step", cycling(ours, layers), {"torch_eager": cycling(eager, layers)}, work
    )
