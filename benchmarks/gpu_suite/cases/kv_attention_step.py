"""kv_attention_step against torch's SDPA, and FlashAttention's cached step where installed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from lora_kernels import ops

from ..case import Aim, Case, Contestant, Function

HEADS, HEAD_SIZE = 20, 64  # Whisper large-v3
POSITIONS, FRAMES = 448, 1500


def cases(dtype: torch.dtype) -> list[Case]:
    """A decoder step of 16 utterances: self-attention at the end, cross-attention, five beams."""

    def case(name: str, beams: int, positions: int, packed: int, limit: float) -> Case:
        shape = {
            "utterances": 16,
            "beams": beams,
            "heads": HEADS,
            "head_size": HEAD_SIZE,
            "positions": positions,
            "packed": packed,
            "append": int(positions == POSITIONS),
        }
        aims = (Aim("bandwidth", limit),)
        return Case(f"kv-{name}", shape, dtype, work, contestants, aims, graphs=True)

    return [
        case("self", 1, POSITIONS, 0, 0.7),
        case("cross", 1, FRAMES, 0, 0.85),
        case("cross-int8", 1, FRAMES, 1, 0.85),
        case("cross-int8-beams5", 5, FRAMES, 1, 0.85),
        case("cross-beams5", 5, FRAMES, 0, 0.85),
    ]


def work(case: Case) -> tuple[float, float]:
    """One copy of each utterance's K and V, whatever the beams; q, k, v and the result."""
    s = case.shape
    values = s["utterances"] * s["heads"] * s["positions"] * s["head_size"]
    vectors = s["utterances"] * s["beams"] * s["heads"] * s["head_size"]
    size = 1 if s["packed"] else case.dtype.itemsize
    moved = 2 * values * size + (6 if s["append"] else 2) * vectors * case.dtype.itemsize
    return float(moved), 4.0 * values * s["beams"]


def contestants(case: Case, device: str) -> dict[str, Contestant]:
    """Ours; SDPA on the same 16-bit K and V, which beams share by a view; FlashAttention."""
    s = case.shape
    utterances, heads, positions, size = (
        s[name] for name in ("utterances", "heads", "positions", "head_size")
    )
    rows = utterances * s["beams"]
    append = bool(s["append"])
    k, v = torch.randn(2, utterances, heads, positions, size, device=device).to(case.dtype)
    q, new_k, new_v = torch.randn(3, rows, 1, heads, size, device=device).to(case.dtype)
    before = positions - 1 if append else positions
    lengths = torch.full((rows,), before, dtype=torch.int32, device=device)
    slots = torch.arange(rows, dtype=torch.int32, device=device) // s["beams"]
    own_slots = None if append else slots
    scale = size**-0.5

    def ours() -> torch.Tensor:
        tokens = (new_k, new_v) if append else (None, None)
        return ops.kv_attention_step(q, *tokens, k, v, lengths, slots=own_slots, scale=scale)[0]

    def packed() -> Function:
        states = [t.transpose(1, 2).flatten(2) for t in (k, v)]
        keys, values, k_scales, v_scales = ops.kv_pack(*states, heads)
        return lambda: ops.kv_attention_step(
            q, None, None, keys, values, lengths, k_scales=k_scales, v_scales=v_scales,
            slots=slots, scale=scale,
        )[0]  # fmt: skip

    # Beams as queries of one utterance: SDPA then reads one copy of K and V too.
    queries = q.view(utterances, s["beams"], heads, size).transpose(1, 2)

    def sdpa() -> torch.Tensor:
        if append:
            k[:, :, -1], v[:, :, -1] = new_k[:, 0], new_v[:, 0]
        return F.scaled_dot_product_attention(queries, k, v, scale=scale)

    def flash() -> Function:
        from flash_attn import flash_attn_with_kvcache

        by_position = [t.transpose(1, 2).contiguous() for t in (k, v)]
        together = q.view(utterances, s["beams"], heads, size)
        tokens = {"k": new_k, "v": new_v} if append else {}
        used = lengths[:: s["beams"]].contiguous()
        return lambda: flash_attn_with_kvcache(
            together, *by_position, cache_seqlens=used, softmax_scale=scale, **tokens
        )

    absent = "" if importlib.util.find_spec("flash_attn") else "flash_attn is not installed"
    return {
        "ours": Contestant(packed if s["packed"] else lambda: ours),
        "sdpa": Contestant(lambda: sdpa),
        "flash_attention": Contestant(flash, absent=absent),
    }


def every_kernel(dtypes: list[torch.dtype]) -> None:
    """The steps of the emulated tests: every type of cache, slots, weights, packing."""
    tests = Path(__file__).resolve().parents[3] / "tests"
    sys.path[:0] = [str(tests), str(tests / "cuda")]
    from test_emulated_kv_attention_step import SHAPES, blocked_steps, kinds, step_of

    for dtype in dtypes:
        steps = [
            step_of(shape, dtype, cached, append, slots)
            for shape in SHAPES
            for cached, append, slots in kinds(dtype)
        ]
        for step in [*steps, *blocked_steps(dtype)]:
            step.heads = [0]
            step.to("cuda").run()
        states = torch.randn(2, 2, 70, 3 * 37, device="cuda").to(dtype)
        ops.kv_pack(*states, 3)
