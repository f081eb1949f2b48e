"""The errors that users of lora_kernels can catch.

Every text names the argument, what was expected, what came, and the fix.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LoraKernelsError(ValueError):
    """Base of every error that lora_kernels raises on purpose."""


class AdapterError(LoraKernelsError):
    """An adapter cannot be read, does not fit the model, or is not known by that name."""


class SwapError(LoraKernelsError):
    """A model cannot be swapped, unswapped or quantized as asked."""


class UnsupportedError(LoraKernelsError):
    """A feature that exists elsewhere (DoRA, a bias in LoRA, ...) but not here."""


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The known names most similar to ``name``, best first.

    Dotted module names are compared by their full text and by their last components, so that
    ``decoder.layers.0.attn.q`` finds ``model.decoder.layers.0.self_attn.q_proj``.
    """
    tail = name.rsplit(".", 1)[-1]

    def similarity(other: str) -> float:
        whole = difflib.SequenceMatcher(None, name, other).ratio()
        last = difflib.SequenceMatcher(None, tail, other.rsplit(".", 1)[-1]).ratio()
        return whole + last

    # Similarity of every pair would be slow on models with thousands of modules: one name per
    # distinct tail is compared first, then the names that share the best tails.
    by_tail: dict[str, list[str]] = {}
    for other in known:
        by_tail.setdefault(other.rsplit(".", 1)[-1], []).append(other)
    tails = sorted(by_tail, key=lambda t: -difflib.SequenceMatcher(None, tail, t).ratio())
    candidates = [other for t in tails[:count] for other in by_tail[t][:64]]
    return sorted(candidates, key=similarity, reverse=True)[:count]


def describe_nearest(name: str, known: Iterable[str]) -> str:
    """``the nearest are 'a', 'b'`` for an error text, or a word for an empty list."""
    names = nearest(name, known)
    return "the nearest are " + ", ".join(map(repr, names)) if names else "there are none"
