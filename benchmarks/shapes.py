"""Real layer shapes: (in_features, out_features) of Whisper's and Conformer's projections."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """One projection of one model, and how many rows meet it at once."""

    model: str
    layer: str
    rows: int
    in_features: int
    out_features: int

    @property
    def label(self) -> str:
        return f"{self.model}-{self.layer}-{self.rows}x{self.in_features}x{self.out_features}"


# d_model of Whisper's sizes (Radford et al., 2022, table 1) and of two Conformers: Parakeet
# (FastConformer, 0.6 B parameters) and wav2vec2-conformer-large.
_WIDTHS = {"whisper-tiny": 384, "whisper-base": 512, "whisper-small": 768}
_CONFORMERS = {"parakeet-0.6b": 1024}

DECODING = [
    Shape(model, layer, rows, k, n)
    for model, width in _WIDTHS.items()
    for layer, (k, n) in {
        "q_proj": (width, width),
        "fc1": (width, 4 * width),
        "fc2": (4 * width, width),
    }.items()
    for rows in (1, 8)
]
"""One decoding step: a row per hypothesis."""

ENCODING = [
    Shape("whisper-base", "q_proj", 1500, 512, 512),
    Shape("whisper-base", "fc1", 1500, 512, 2048),
    Shape("whisper-base", "fc2", 1500, 2048, 512),
    *[
        Shape(model, "feed_forward1.linear1", 375, width, 4 * width)
        for model, width in _CONFORMERS.items()
    ],
]
"""A window of 30 s: 1,500 frames after Whisper's convolutions, 375 after FastConformer's."""

RANK = 16

QUICK = [shape for shape in DECODING + ENCODING if shape.model == "whisper-base"]
"""The shapes that the README quotes."""
