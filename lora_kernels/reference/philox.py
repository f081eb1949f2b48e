"""Philox4x32-10, the counter-based generator behind the dropout of the LoRA branch.

A counter-based generator needs no stored mask: the backward pass draws the same numbers again
from the same seed. The algorithm and its constants are those of Salmon, Moraes, Dror and Shaw,
"Parallel random numbers: as easy as 1, 2, 3" (SC 2011), as published in Random123.
"""

from __future__ import annotations

import math

import torch

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_LOW_32_BITS = 0xFFFFFFFF


def _multiply_32(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of ``a * b`` for 32-bit unsigned values held in int64.

    The full product needs 64 unsigned bits and int64 holds 63, so ``a`` is split into 16-bit
    halves, whose products with a 32-bit value stay below 2**48.
    """
    low = (a & 0xFFFF) * b
    high = (a >> 16) * b
    middle = high + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def philox4x32_10(key: int, counters: torch.Tensor) -> torch.Tensor:
    """Four 32-bit words for each counter.

    Parameters
    ----------
    key
        64-bit seed; its low 32 bits are the first key word, its high 32 bits the second.
        A negative int64 seed stands for its two's complement bits.
    counters
        int64 [...], the low 64 bits of the 128-bit counter (the high 64 bits are zero).

    Returns
    -------
    torch.Tensor
        int64 [..., 4] with values in [0, 2**32).
    """
    key &= (1 << 64) - 1
    key_0, key_1 = key & _LOW_32_BITS, key >> 32
    counters = counters.to(torch.int64)
    word_0 = counters & _LOW_32_BITS
    word_1 = (counters >> 32) & _LOW_32_BITS
    word_2 = torch.zeros_like(word_0)
    word_3 = torch.zeros_like(word_0)
    for _ in range(_ROUNDS):
        high_0, low_0 = _multiply_32(_MULTIPLIERS[0], word_0)
        high_1, low_1 = _multiply_32(_MULTIPLIERS[1], word_2)
        word_0, word_1, word_2, word_3 = (
            high_1 ^ word_1 ^ key_0,
            low_1,
            high_0 ^ word_3 ^ key_1,
            low_0,
        )
        key_0 = (key_0 + _KEY_INCREMENTS[0]) & _LOW_32_BITS
        key_1 = (key_1 + _KEY_INCREMENTS[1]) & _LOW_32_BITS
    return torch.stack((word_0, word_1, word_2, word_3), dim=-1)


def dropout_keep_mask(rows: int, columns: int, p: float, seed: int) -> torch.Tensor:
    """Which elements of a row-major [rows, columns] matrix survive dropout.

    Element (m, k) has index ``i = m * columns + k`` and is kept iff
    ``philox4x32_10(seed, i // 4)[i % 4] >= floor(p * 2**32)``.

    Parameters
    ----------
    rows, columns
        Sizes of the matrix.
    p
        Probability of dropping an element, in [0, 1).
    seed
        64-bit seed.

    Returns
    -------
    torch.Tensor
        bool [rows, columns].
    """
    elements = rows * columns
    words = philox4x32_10(seed, torch.arange((elements + 3) // 4, dtype=torch.int64))
    threshold = math.floor(p * 2.0**32)
    return (words.reshape(-1)[:elements] >= threshold).reshape(rows, columns)
