"""kv_relative_step against the composition that streaming Conformers run in plain torch."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from lora_kernels import ops

from ..case import Aim, Case, Contestant

HEADS, HEAD_SIZE = 8, 128  # Parakeet
CHUNK, LEFT = 14, 70


def cases(dtype: torch.dtype) -> list[Case]:
    """A chunk of one stream, of a few and of many, all past the beginning."""

    def case(streams: int, aims: tuple[Aim, ...]) -> Case:
        shape = {
            "streams": streams,
            "heads": HEADS,
            "head_size": HEAD_SIZE,
            "chunk": CHUNK,
            "left": LEFT,
        }
        name = f"kv-relative-{streams}"
        return Case(name, shape, dtype, work, contestants, aims, graphs=True)

    faster = Aim("time", 0.5, "eager")
    return [case(1, (faster,)), case(16, (faster,)), case(64, (faster, Aim("bandwidth", 0.6)))]


def work(case: Case) -> tuple[float, float]:
    """Frames before the chunk, q, k, v, the result, what is appended; positions once."""
    s = case.shape
    width, chunk, left = s["heads"] * s["head_size"], s["chunk"], s["left"]
    vectors = s["streams"] * (2 * left + 6 * chunk) + left + 2 * chunk - 1
    operations = 6.0 * s["streams"] * chunk * width * (left + chunk)
    return float(vectors * width * case.dtype.itemsize), operations


def contestants(case: Case, device: str) -> dict[str, Contestant]:
    """Ours on a ring; two matmuls, a shift and a softmax on caches that move; SDPA with a bias."""
    s = case.shape
    streams, heads, size, chunk, left = (
        s[name] for name in ("streams", "heads", "head_size", "chunk", "left")
    )
    q, k, v = torch.randn(3, streams, chunk, heads, size, device=device).to(case.dtype)
    positions = torch.randn(left + 2 * chunk - 1, heads, size, device=device).to(case.dtype)
    bias_u, bias_v = torch.randn(2, heads, size, device=device).to(case.dtype)
    rings = torch.randn(2, streams, heads, left + chunk, size, device=device).to(case.dtype)
    # The sixth time around, the oldest frame in the first place: rings and caches are the same.
    heard = 5 * (left + chunk) + left
    lengths = torch.full((streams,), heard, dtype=torch.int32, device=device)
    past = rings[:, :, :, :left].clone()
    by_distance = positions.permute(1, 2, 0).contiguous()
    scale = size**-0.5

    def ours() -> torch.Tensor:
        return ops.kv_relative_step(
            q, k, v, *rings, positions, bias_u, bias_v, lengths, left=left, scale=scale
        )

    def operands() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, K and V by head, scores by distance; the caches take the chunk in."""
        keys = torch.cat([past[0], k.transpose(1, 2)], 2)
        values = torch.cat([past[1], v.transpose(1, 2)], 2)
        past[0].copy_(keys[:, :, chunk:])
        past[1].copy_(values[:, :, chunk:])
        shifted = F.pad((q + bias_v).transpose(1, 2) @ by_distance, (1, 0))
        shifted = shifted.reshape(streams, heads, -1, chunk)[:, :, 1:]
        shifted = shifted.reshape(streams, heads, chunk, -1)[..., : left + chunk]
        return (q + bias_u).transpose(1, 2), keys, values, shifted

    def eager() -> torch.Tensor:
        query, keys, values, shifted = operands()
        scores = (query @ keys.transpose(2, 3) + shifted) * scale
        return (scores.softmax(-1) @ values).transpose(1, 2)

    def sdpa() -> torch.Tensor:
        query, keys, values, shifted = operands()
        bias = shifted * scale
        out = F.scaled_dot_product_attention(query, keys, values, attn_mask=bias, scale=scale)
        return out.transpose(1, 2)

    return {
        "ours": Contestant(lambda: ours),
        "eager": Contestant(lambda: eager),
        "sdpa": Contestant(lambda: sdpa),
    }


def every_kernel(dtypes: list[torch.dtype], device: str) -> None:
    """The steps of the emulated tests: every type of cache, short chunks, rings in any order."""
    tests = Path(__file__).resolve().parents[3] / "tests"
    sys.path[:0] = [str(tests), str(tests / "cuda")]
    from test_emulated_kv_relative_step import steps

    for dtype in dtypes:
        for step in steps(dtype):
            step.to(device).run(ops.kv_relative_step)
