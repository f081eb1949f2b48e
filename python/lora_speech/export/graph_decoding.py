"""Greedy decoding over exported graphs, whatever runs them; numpy alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from lora_speech.errors import ModelError
from lora_speech.export.folder import Decoding

Arrays = Mapping[str, np.ndarray]
Run = Callable[[str, Arrays], Arrays]
"""Runs ``encode``, ``prefill`` or ``step`` over named inputs and gives its named outputs."""


def adapter_index(live: Sequence[str], adapter: str | None) -> dict[str, np.ndarray]:
    """The input that names the adapter of one utterance; none where none is live.

    Raises
    ------
    ModelError
        The adapter is not among the live ones.
    """
    if adapter is not None and adapter not in live:
        raise ModelError(
            f"adapter: expected {'one of ' if live else ''}{', '.join(live) or 'None'}, got "
            f"{adapter!r}; export it with --adapter NAME=FOLDER"
        )
    if not live:
        return {}
    return {"adapter_ids": np.array([-1 if adapter is None else live.index(adapter)], np.int32)}


class GraphRecognizer:
    """A `target.Recognizer` over the three graphs.

    Parameters
    ----------
    decoding : Decoding
        Of the folder that the graphs lie in.
    run : callable
        Runs a graph.
    adapters : mapping
        The inputs of the live adapters (`folder.banks`), without ``adapter_ids``; a runner passes
        each graph those that it has.
    """

    def __init__(self, decoding: Decoding, run: Run, adapters: Arrays | None = None) -> None:
        self.decoding, self.run, self.adapters = decoding, run, dict(adapters or {})

    def decode(
        self, features: np.ndarray, prompt: Sequence[int], limit: int, adapter: str | None
    ) -> list[int]:
        """See `target.Recognizer`."""
        decoding = self.decoding
        extra = {**self.adapters, **adapter_index(decoding.live, adapter)}
        cross = self.run("encode", {"features": features, **extra})
        tokens = np.array([list(prompt)], np.int64)
        outputs = self.run("prefill", {"tokens": tokens, **cross, **extra})
        emitted: list[int] = []
        for count in range(limit):
            logits = np.array(outputs["logits"][0], np.float32)
            logits[decoding.suppressed] = -np.inf
            if count == 0:
                logits[decoding.suppressed_first] = -np.inf
            best = int(logits.argmax())
            if best == decoding.end:
                break
            emitted.append(best)
            if count + 1 == limit:
                break
            lengths = np.array([tokens.shape[1] + count], np.int32)
            caches = {
                name.replace("present", "past"): value
                for name, value in outputs.items()
                if name.startswith("present")
            }
            outputs = self.run(
                "step",
                {
                    "tokens": np.array([[best]], np.int64),
                    "lengths": lengths,
                    **caches,
                    **cross,
                    **extra,
                },
            )
        return emitted
