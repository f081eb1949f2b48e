"""Greedy CTC decoding over exported graphs, whole or in steps; numpy alone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np

from lora_speech.export.folder import CtcDecoding
from lora_speech.export.graph_decoding import Arrays, Run, adapter_index


def collapse(best: Sequence[int], blank: int) -> list[int]:
    """Tokens of a path: repetitions once, blanks left out (Graves et al. 2006)."""
    return [token for token, _ in groupby(best) if token != blank]


class CtcRecognizer:
    """A `target.Recognizer` over `recognize`, and over `step` where there is one."""

    def __init__(self, decoding: CtcDecoding, run: Run, adapters: Arrays | None = None) -> None:
        self.decoding, self.run, self.adapters = decoding, run, dict(adapters or {})

    def decode(
        self, features: np.ndarray, prompt: Sequence[int], limit: int, adapter: str | None
    ) -> list[int]:
        """See `target.Recognizer`; there is no prompt and no limit."""
        extra = {**self.adapters, **adapter_index(self.decoding.live, adapter)}
        mask = np.ones(features.shape[:2], bool)
        found = self.run("recognize", {"features": features, "mask": mask, **extra})
        return collapse(found["logits"][0].argmax(-1).tolist(), self.decoding.blank)

    def stream(self, features: np.ndarray, adapter: str | None) -> list[int]:
        """Decode in steps, as the frames would come.

        Parameters
        ----------
        features : numpy.ndarray
            float32 [1, frames, mel bands].
        adapter : str or None
            One of the live adapters; None: the base.

        Returns
        -------
        list of int
            Tokens.
        """
        decoding = self.decoding
        extra = {**self.adapters, **adapter_index(decoding.live, adapter)}
        caches = {name: np.zeros(shape, np.float32) for name, shape in decoding.caches.items()}
        behind = decoding.subsampling
        size = decoding.subsampling * decoding.chunk
        padded = np.pad(features, ((0, 0), (behind, size), (0, 0)))
        best: list[int] = []
        for begin in range(0, features.shape[1], size):
            frames = min(size, features.shape[1] - begin)
            found = self.run(
                "step",
                {
                    "features": padded[:, begin : begin + behind + size],
                    "frames": np.array([frames], np.int32),
                    "lengths": np.array([len(best)], np.int32),
                    **caches,
                    **extra,
                },
            )
            positions = -(-frames // decoding.subsampling)
            best += found["logits"][0, :positions].argmax(-1).tolist()
            caches = {name: found[name.replace("past", "present")] for name in caches}
        return collapse(best, decoding.blank)
