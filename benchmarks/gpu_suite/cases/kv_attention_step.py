"""kv_attention_step against torch's SDPA, and FlashAttention's cached steps where installed."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from lora_kernels import ops

from ..case import Aim, Case, Contestant, Function, absent

HEADS, HEAD_SIZE = 20, 64  # Whisper large-v3
POSITIONS, FRAMES = 448, 1500


def cases(dtype: torch.dtype) -> list[Case]:
    """A decoder step of 16 utterances: self-attention at the end, cross-attention, five beams.

    And of one, which is too few bytes for an aim: what it waits for.
    """

    def case(
        name: str, beams: int, positions: int, packed: int, limit: float, utterances: int = 16
    ) -> Case:
        shape = {
            "utterances": utterances,
            "beams": beams,
            "heads": HEADS,
            "head_size": HEAD_SIZE,
            "positions": positions,
            "packed": packed,
            "append": int(positions == POSITIONS),
        }
        aims = (Aim("bandwidth", limit),) if limit else ()
        return Case(f"kv-{name}", shape, dtype, work, contestants, aims, graphs=True)

    packing = {
        "utterances": 16,
        "positions": FRAMES,
        "heads": HEADS,
        "head_size": HEAD_SIZE,
    }
    return [
        case("self", 1, POSITIONS, 0, 0.7),
        case("cross", 1, FRAMES, 0, 0.85),
        case("cross-int8", 1, FRAMES, 1, 0.85),
        case("cross-int8-beams5", 5, FRAMES, 1, 0.85),
        case("cross-beams5", 5, FRAMES, 0, 0.85),
        case("self-alone", 1, POSITIONS, 0, 0, utterances=1),
        case("cross-int8-alone", 1, FRAMES, 1, 0, utterances=1),
        Case("kv-pack", packing, dtype, work_of_packing, packing_contestants, graphs=True),
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

    def flash(package: str) -> Function:
        step = importlib.import_module(package).flash_attn_with_kvcache
        by_position = [t.transpose(1, 2).contiguous() for t in (k, v)]
        together = q.view(utterances, s["beams"], heads, size)
        tokens = {"k": new_k, "v": new_v} if append else {}
        used = lengths[:: s["beams"]].contiguous()
        return lambda: step(
            together, *by_position, cache_seqlens=used, softmax_scale=scale, **tokens
        )

    def installed(package: str) -> Contestant:
        return Contestant(lambda: flash(package), absent=absent(package))

    return {
        "ours": Contestant(packed if s["packed"] else lambda: ours),
        "sdpa": Contestant(lambda: sdpa),
        "flash_attention": installed("flash_attn"),
        "flash_attention_3": installed("flash_attn_interface"),
    }


def work_of_packing(case: Case) -> tuple[float, float]:
    """K and V are read once at best, and written in INT8."""
    s = case.shape
    values = 2 * s["utterances"] * s["heads"] * s["positions"] * s["head_size"]
    return float(values * (case.dtype.itemsize + 1)), 2.0 * values


def packing_contestants(case: Case, device: str) -> dict[str, Contestant]:
    """Ours; rounding per channel in plain torch, which leaves positions where they are."""
    s = case.shape
    width = s["heads"] * s["head_size"]
    k, v = torch.randn(2, s["utterances"], s["positions"], width, device=device).to(case.dtype)

    def eager() -> list[tuple[torch.Tensor, torch.Tensor]]:
        found = []
        for states in (k, v):
            scales = states.abs().amax(1, keepdim=True).float() / 127
            found.append(((states / scales).round().to(torch.int8), scales))
        return found

    return {
        "ours": Contestant(lambda: lambda: ops.kv_pack(k, v, s["heads"])),
        "eager": Contestant(lambda: eager),
    }


def every_kernel(dtypes: list[torch.dtype], device: str) -> None:
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
            step.to(device).run()
        states = torch.randn(2, 2, 70, 3 * 37, device=device).to(dtype)
        ops.kv_pack(*states, 3)
