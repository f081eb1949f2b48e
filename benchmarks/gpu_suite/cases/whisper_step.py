"""A greedy step of Whisper large-v3 against transformers, with PEFT and with torch.compile."""

from __future__ import annotations

import torch

from ..case import Aim, Case, Contestant, absent, cannot
from ..whisper_models import RANK, Batch, models, our_step, peft_step, static_step

LARGE_V3 = {
    "width": 1280,
    "inner": 5120,
    "layers": 32,
    "heads": 20,
    "vocabulary": 51866,
    "positions": 448,
    "frames": 1500,
}
AIMS = (
    Aim("time_of_bytes", 1.4),
    Aim("time", 1 / 3, "peft"),
    Aim("time", 1 / 1.5, "static_compiled"),
)


def cases(dtype: torch.dtype) -> list[Case]:
    """INT8 and a live adapter on all projections, at the last of its positions."""
    return [
        Case(
            f"whisper-step-{rows}",
            {"rows": rows} | LARGE_V3,
            dtype,
            work,
            contestants,
            AIMS,
            arithmetic="int8",
            dry={"rows": rows, "layers": 2, "heads": 4},
            least_s=20.0,  # a billion weights are made and packed
        )
        for rows in (1, 4, 16)
    ]


def work(case: Case) -> tuple[float, float]:
    """Every weight and factor once, K and V of both attentions: 16 bits the own, INT8 the cross."""
    s = case.shape
    rows, d, inner, size = s["rows"], s["width"], s["inner"], case.dtype.itemsize
    square, wide = 6, 2  # q, k, v, out and of cross-attention q, out; fc1 and fc2
    weights = square * d * d + wide * d * inner
    factors = RANK * (square * 2 * d + wide * (d + inner))
    cached = 2 * rows * d * (s["positions"] * size + s["frames"])
    words = s["vocabulary"] * d
    moved = s["layers"] * (weights + factors * size + cached) + words
    attention = 2 * 2 * rows * d * (s["positions"] + s["frames"])
    # What is multiplied in 16 bits counts twice: it has half of INT8's rate.
    operations = 2 * rows * (weights + words / s["layers"] + 2 * factors) + 2 * attention
    return float(moved), float(s["layers"] * operations)


def contestants(case: Case, device: str) -> dict[str, Contestant]:
    """Ours by its graph, transformers and PEFT eager, and a static cache under torch.compile."""
    if absent("transformers"):  # whose model all of them are
        return {"ours": cannot(absent("transformers"))}
    made = models(case.shape, case.dtype, device)
    batch = Batch.of(case.shape, case.dtype, device)
    return {
        "ours": Contestant(lambda: our_step(made.ours, batch)),
        "peft": Contestant(lambda: peft_step(made.peft, batch), absent=absent("peft")),
        "static_compiled": Contestant(lambda: static_step(made.plain, batch), compiled=True),
    }


def every_kernel(dtypes: list[torch.dtype], device: str) -> None:
    """A step has no kernel of its own; this is how it calls the others."""
    if absent("transformers"):
        return
    for dtype in dtypes:
        shape = LARGE_V3 | {"rows": 3, "width": 64, "inner": 256, "layers": 1, "heads": 2}
        shape |= {"vocabulary": 1000, "positions": 20, "frames": 70}
        with torch.no_grad():
            our_step(models(shape, dtype, device).ours, Batch.of(shape, dtype, device))()
