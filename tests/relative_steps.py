"""Arguments of ``kv_relative_step``."""

from __future__ import annotations

import dataclasses

import torch

from lora_kernels import ops

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@dataclasses.dataclass
class Chunk:
    """The arguments of one call, in the order of the operator's schema."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    positions: torch.Tensor
    bias_u: torch.Tensor
    bias_v: torch.Tensor
    lengths: torch.Tensor
    left: int
    counts: torch.Tensor | None
    slots: torch.Tensor | None
    scale: float

    def arguments(self) -> list:
        return [getattr(self, field.name) for field in dataclasses.fields(self)]

    def run(self, function=ops.kv_relative_step, **more) -> torch.Tensor:
        *tensors, left, counts, slots, scale = self.arguments()
        return function(*tensors, left=left, counts=counts, slots=slots, scale=scale, **more)

    def clone(self) -> Chunk:
        copies = (x.clone() if torch.is_tensor(x) else x for x in self.arguments())
        return Chunk(*copies)

    def caches(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.k_cache, self.v_cache

    def poison(self) -> Chunk:
        """NaN wherever nobody may look: frames not in use, and k and v beyond counts."""
        rows = self.q.shape[0]
        used = torch.zeros(self.k_cache.shape[0], self.k_cache.shape[2], dtype=torch.bool)
        for row in range(rows):
            ring = row if self.slots is None else int(self.slots[row])
            length = int(self.lengths[row])
            used[ring, torch.arange(max(0, length - self.left), length) % used.shape[1]] = True
            if self.counts is not None:
                for new in (self.k, self.v):
                    new[row, int(self.counts[row]) :] = torch.nan
        for cache in self.caches():
            cache.masked_fill_(~used[:, None, :, None], torch.nan)
        return self


def make_chunk(
    rows: int = 3,
    tokens: int = 5,
    heads: int = 2,
    head_size: int = 24,
    left: int = 7,
    extra: int = 0,
    lengths: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
    rings: int | None = None,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
) -> Chunk:
    torch.manual_seed(tokens * 1000 + head_size)
    new = [torch.randn(rows, tokens, heads, head_size).to(dtype) for _ in range(3)]
    sizes = (rings or rows, heads, left + tokens + extra, head_size)
    caches = [torch.randn(sizes).to(cache_dtype or dtype) for _ in range(2)]
    positions = torch.randn(left + 2 * tokens - 1, heads, head_size).to(dtype)
    biases = [torch.randn(heads, head_size).to(dtype) for _ in range(2)]
    if lengths is None:
        lengths = int32(*(0, 3, 1000, 12, 7)[:rows])
    scale = head_size**-0.5
    return Chunk(*new, *caches, positions, *biases, lengths, left, counts, slots, scale)
