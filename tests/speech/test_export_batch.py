"""Batches through exported graphs in ONNX Runtime, as a server would run them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lora_speech.decoding.greedy import greedy_decode
from lora_speech.export.run import ExportReport, export_model

pytestmark = pytest.mark.slow

ROWS: list[tuple[str | None, str]] = [("some", "en"), (None, "es"), ("all", "en"), ("some", "es")]
"""Adapter and language of each row."""


@pytest.fixture(scope="module")
def live(
    tiny_whisper_folder: Path,
    adapters: dict[str, Path],
    tones: list[Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> ExportReport:
    """Two adapters as inputs of the graphs."""
    output = tmp_path_factory.mktemp("live") / "out"
    return export_model(tiny_whisper_folder, "onnx", output, adapters=adapters, check=tones)


@pytest.fixture(scope="module")
def features() -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(len(ROWS), 80, 200, generator=generator)


@pytest.fixture(scope="module")
def expected(live: ExportReport, features: torch.Tensor) -> list[list[int]]:
    """Torch's tokens, each row alone."""
    tokens = [
        greedy_decode(
            live.plan.model.model, row[None], adapters=[adapter], language=language
        ).tokens[0]
        for row, (adapter, language) in zip(features, ROWS, strict=True)
    ]
    # Rows that are alike, or end at once, would hide that they are mixed up.
    assert len({tuple(row) for row in tokens}) == len(ROWS) and len({*map(len, tokens)}) > 1
    return tokens


class Batch:
    """Rows that are decoded together: their caches, and how many positions of each are filled."""

    def __init__(self, recognizer: Any, features: np.ndarray, rows: list[int]) -> None:
        self.recognizer, self.decoding, self.rows = recognizer, recognizer.decoding, rows
        live, languages = self.decoding.live, self.decoding.languages
        chosen = [ROWS[row] for row in rows]
        ids = [-1 if adapter is None else live.index(adapter) for adapter, _ in chosen]
        self.extra = {**recognizer.adapters, "adapter_ids": np.array(ids, np.int32)}
        self.cross = recognizer.run("encode", {"features": features[rows], **self.extra})
        start, _, *task = self.decoding.prompt
        prompt = np.array([[start, languages[code], *task] for _, code in chosen], np.int64)
        outputs = recognizer.run("prefill", {"tokens": prompt, **self.cross, **self.extra})
        self.lengths = np.full(len(rows), prompt.shape[1], np.int32)
        self.emitted: list[list[int]] = [[] for _ in rows]
        self.ended = np.zeros(len(rows), bool)
        self._keep(outputs)

    def step(self) -> None:
        """Feed every row its next token; rows that have ended ride along and are not written."""
        outputs = self.recognizer.run(
            "step",
            {
                "tokens": self.following[:, None],
                "lengths": self.lengths,
                **self.caches,
                **self.cross,
                **self.extra,
            },
        )
        self.lengths = self.lengths + (~self.ended).astype(np.int32)
        self._keep(outputs)

    def join(self, other: Batch) -> None:
        """Rows that began later come to those that are here."""
        self.rows = self.rows + other.rows
        self.emitted = self.emitted + other.emitted
        both = [self.extra["adapter_ids"], other.extra["adapter_ids"]]
        self.extra = {**self.extra, "adapter_ids": np.concatenate(both)}
        for name in ("following", "lengths", "ended"):
            setattr(self, name, np.concatenate([getattr(self, name), getattr(other, name)]))
        for mine, theirs in ((self.cross, other.cross), (self.caches, other.caches)):
            for name in mine:
                mine[name] = np.concatenate([mine[name], theirs[name]])

    def _keep(self, outputs: Any) -> None:
        """Choose a token for each row, unless it ended before."""
        decoding = self.decoding
        logits = np.array(outputs["logits"], np.float32)
        logits[:, decoding.suppressed] = -np.inf
        for row, emitted in enumerate(self.emitted):
            if not emitted:
                logits[row, decoding.suppressed_first] = -np.inf
        self.following = logits.argmax(-1).astype(np.int64)
        self.ended |= self.following == decoding.end
        for emitted, token, ended in zip(self.emitted, self.following, self.ended, strict=True):
            if not ended:
                emitted.append(int(token))
        self.ended |= np.array([len(row) == decoding.max_new_tokens for row in self.emitted])
        self.caches = {
            name.replace("present", "past"): value
            for name, value in outputs.items()
            if name.startswith("present")
        }


def test_rows_of_a_batch_say_what_torch_says_of_each(
    live: ExportReport, features: torch.Tensor, expected: list[list[int]]
) -> None:
    """Two adapters and the base, two languages, in one batch."""
    recognizer = live.target.open(live.output)
    batch = Batch(recognizer, features.numpy(), list(range(len(ROWS))))
    while not batch.ended.all():
        batch.step()
    assert batch.emitted == expected
    chosen, languages = zip(*ROWS, strict=True)
    together = greedy_decode(
        live.plan.model.model, features, adapters=list(chosen), language=list(languages)
    )
    assert together.tokens == expected


def test_a_row_may_come_while_others_are_decoded(
    live: ExportReport, features: torch.Tensor, expected: list[list[int]]
) -> None:
    """Rows of one step may have caches of different lengths."""
    recognizer = live.target.open(live.output)
    batch = Batch(recognizer, features.numpy(), [0, 1])
    for _ in range(3):
        batch.step()
    batch.join(Batch(recognizer, features.numpy(), [2, 3]))
    assert len({*batch.lengths.tolist()}) > 1
    while not batch.ended.all():
        batch.step()
    assert [batch.emitted[batch.rows.index(row)] for row in range(len(ROWS))] == expected
