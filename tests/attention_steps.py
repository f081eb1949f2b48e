"""Arguments of ``kv_attention_step``, and the check of one call against the specification."""

from __future__ import annotations

import dataclasses

import torch
from tolerances import FOURTEEN_BITS, assert_close

from lora_kernels import ops, reference
from lora_kernels.reference import quantize_rows

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclasses.dataclass
class Step:
    """The arguments of one call."""

    q: torch.Tensor
    k: torch.Tensor | None
    v: torch.Tensor | None
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    lengths: torch.Tensor
    k_scales: torch.Tensor | None = None
    v_scales: torch.Tensor | None = None
    slots: torch.Tensor | None = None
    scale: float = 1.0
    heads: list[int] | None = None

    def clone(self) -> Step:
        return Step(
            **{
                name: value.clone() if isinstance(value, torch.Tensor) else value
                for name, value in vars(self).items()
            }
        )

    def to(self, device: str) -> Step:
        return Step(
            **{
                name: value.to(device) if isinstance(value, torch.Tensor) else value
                for name, value in vars(self).items()
            }
        )

    def caches(self) -> list[torch.Tensor]:
        tensors = (self.k_cache, self.v_cache, self.k_scales, self.v_scales)
        return [t for t in tensors if t is not None]

    def run(self, function=ops.kv_attention_step) -> tuple[torch.Tensor, torch.Tensor]:
        return function(**vars(self))


def int32(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def make_step(
    *,
    rows=3,
    tokens=1,
    heads=2,
    head_size=64,
    cache_rows=None,
    capacity=21,
    dtype=torch.float32,
    cache_dtype=None,
    per_channel=False,
    append=True,
    lengths=None,
    slots=None,
    chosen=None,
    seed=0,
) -> Step:
    """Random operands; what no row may read is NaN (or its scale is)."""
    g = torch.Generator().manual_seed(seed)
    cache_dtype = cache_dtype or dtype
    cache_rows = rows if cache_rows is None else cache_rows
    most = capacity - (tokens if append else 0)
    if lengths is None:
        lengths = torch.randint(0, most + 1, (rows,), generator=g, dtype=torch.int32)
    if isinstance(slots, str) and slots == "per position":
        slots = torch.randint(0, cache_rows, (rows, capacity), generator=g, dtype=torch.int32)
        if append:  # every row's new positions are its own
            for row in range(rows):
                slots[row, int(lengths[row]) :] = row

    def cache() -> tuple[torch.Tensor, torch.Tensor | None]:
        x = torch.randn(cache_rows, heads, capacity, head_size, generator=g)
        if cache_dtype != torch.int8:
            return x.to(cache_dtype), None
        if not per_channel:
            values, scales = quantize_rows(x)
            return values, scales.unsqueeze(-1)
        values, scales = quantize_rows(x.transpose(2, 3).contiguous())
        return values.transpose(2, 3).contiguous(), scales.unsqueeze(2)

    def new() -> torch.Tensor:
        return torch.randn(rows, tokens, heads, head_size, generator=g).to(dtype)

    (k_cache, k_scales), (v_cache, v_scales) = cache(), cache()
    step = Step(
        q=new(),
        k=new() if append else None,
        v=new() if append else None,
        k_cache=k_cache,
        v_cache=v_cache,
        k_scales=k_scales,
        v_scales=v_scales,
        lengths=lengths,
        slots=slots,
        scale=head_size**-0.5,
        heads=chosen,
    )
    poison_unread(step)
    return step


def make_blocked_step(
    *,
    rows=3,
    tokens=1,
    heads=2,
    head_size=64,
    cache_rows=None,
    positions=21,
    dtype=torch.float32,
    lengths=None,
    slots=None,
    chosen=None,
    seed=0,
) -> Step:
    """Cross-attention over blocked caches, with random operands."""
    g = torch.Generator().manual_seed(seed)
    cache_rows = rows if cache_rows is None else cache_rows
    if lengths is None:
        lengths = torch.randint(0, positions + 1, (rows,), generator=g, dtype=torch.int32)
    states = torch.randn(2, cache_rows, positions, heads * head_size, generator=g)
    k_cache, v_cache, k_scales, v_scales = reference.kv_pack(*states, heads)
    return Step(
        q=torch.randn(rows, tokens, heads, head_size, generator=g).to(dtype),
        k=None,
        v=None,
        k_cache=k_cache,
        v_cache=v_cache,
        k_scales=k_scales,
        v_scales=v_scales,
        lengths=lengths,
        slots=slots,
        scale=head_size**-0.5,
        heads=chosen,
    )


def poison_unread(step: Step) -> None:
    """NaN in every position that no row attends to before the append."""
    rows, capacity = step.q.shape[0], step.k_cache.shape[2]
    read = torch.zeros(step.k_cache.shape[0], capacity, dtype=torch.bool)
    for row in range(rows):
        for position in range(int(step.lengths[row])):
            slot = row
            if step.slots is not None:
                slot = int(step.slots[row] if step.slots.dim() == 1 else step.slots[row, position])
            read[slot, position] = True
    for values, scales in ((step.k_cache, step.k_scales), (step.v_cache, step.v_scales)):
        if scales is None:
            values.transpose(1, 2)[~read] = torch.nan
        elif scales.shape[2] == capacity and scales.shape[3] == 1:
            scales.transpose(1, 2)[~read] = torch.nan


def check(step: Step, function=ops.kv_attention_step) -> None:
    """Result, weights and what was written, against the specification; the same bits twice."""
    expected, again = step.clone(), step.clone()
    want, want_weights = expected.run(reference.kv_attention_step)
    out, weights = step.run(function)
    assert out.dtype == step.q.dtype
    assert out.shape == step.q.shape
    assert weights.dtype == torch.float32
    assert weights.shape == want_weights.shape
    blocked = step.k_cache.dim() == 6
    if blocked:
        # Rounded weights err in proportion to the values, which one channel may average to nothing.
        units = step.v_scales.nan_to_num(posinf=0).flatten().tolist() or [0.0]
        assert_close(out, want, extra=FOURTEEN_BITS, averaged=max(units) * 127 / 10)
    else:
        assert_close(out, want)
    atol = 1e-4 if blocked else 2e-6
    torch.testing.assert_close(weights.double(), want_weights, rtol=0, atol=atol)
    for ours, theirs in zip(step.caches(), expected.caches(), strict=True):
        assert torch.equal(ours.nan_to_num(nan=77), theirs.nan_to_num(nan=77))
    for ours, theirs in zip(again.run(function), (out, weights), strict=True):
        assert torch.equal(ours, theirs)
