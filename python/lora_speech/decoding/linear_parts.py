"""What linears consist of, whatever modules they came from, and several of them as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch

JOINT_WIDTH = 256
"""Up to this many outputs per projection, q, k and v become one product. It saves two calls of
about 5 us each and reads a block-diagonal B that is three times larger: at rank 16 and width 128
that is 50 KB more out of cache, about 2 us; at width 512, 200 KB, as long as the calls saved.
The joint bank is fp32 and by rank row."""

_joint_weights: WeakKeyDictionary[Any, tuple[list[tuple[torch.Tensor, int]], torch.Tensor]] = (
    WeakKeyDictionary()
)


@dataclass(frozen=True)
class LinearParts:
    """What one linear consists of, whatever module it came from.

    Attributes
    ----------
    weight : Tensor
        Floating point [N, K], or the packed bytes of an INT8 weight.
    packed : bool
        Which of the two.
    out_features : int
        N.
    bias : Tensor or None
        [N].
    lora : tuple or None
        A [R, K], B [R, N] by rank row or in blocks (`AdapterBank.lora_b`), scales [n], offsets
        [n + 1] or None (one adapter).
    routed : bool
        Whether each row chooses among the adapters; otherwise all rows use the only one.
    x_scale : Tensor or None
        Static scale of an INT8 linear's input.
    max_rank : int
        The largest rank of the adapters; 0 where there are none, or A itself tells.
    """

    weight: torch.Tensor
    packed: bool
    out_features: int
    bias: torch.Tensor | None
    lora: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None] | None = None
    routed: bool = False
    x_scale: torch.Tensor | None = None
    max_rank: int = 0

    def lora_of(self, ids: torch.Tensor | None) -> dict[str, Any]:
        """LoRA arguments of an operator for rows of these adapters; None: the base only."""
        if self.lora is None or (self.routed and ids is None):
            return {}
        a, b, scales, offsets = self.lora
        adapter_ids = ids if self.routed else None
        return {
            "lora_a": a,
            "lora_b": b,
            "scales": scales,
            "offsets": offsets,
            "adapter_ids": adapter_ids,
            "max_rank": self.max_rank,
        }


def linear_parts(module: Any) -> LinearParts | None:
    """Take a linear apart; None where only calling the module is right.

    Its adapters are those that an enclosing `AdapterRows.active` works with.
    """
    from lora_kernels.adapters.registry import ACTIVE_SELECTION
    from lora_kernels.integrations.peft_layers import may_be_read
    from lora_kernels.nn import Int8LoraLinear, LoraLinear

    if isinstance(module, (Int8LoraLinear, LoraLinear)):
        if module.activation != "none" or not may_be_read(module):
            return None
        selection = ACTIVE_SELECTION.get()
        bank = module.bank if selection is None else module.bank_for(selection)
        lora, max_rank = None, 0
        if bank is not None and bank.total_rank:
            lora = (bank.lora_a, bank.lora_b, bank.scales, bank.offsets)
            max_rank = bank.max_rank
        packed = isinstance(module, Int8LoraLinear)
        weight: Any = module.packed_weight if packed else module.weight
        x_scale: Any = module.x_scale if packed else None
        return LinearParts(
            weight, packed, module.out_features, module.bias, lora, True, x_scale, max_rank
        )
    if type(module) is torch.nn.Linear and may_be_read(module):
        return LinearParts(module.weight, False, module.out_features, module.bias)
    return _peft_parts(module)


def join_parts(modules: Sequence[Any], parts: list[LinearParts]) -> LinearParts | None:
    """One linear whose outputs are those of several, or None where that does not pay or fit."""
    first = parts[0] if parts else None
    if (
        first is None
        or len(parts) != len(modules)
        or first.out_features > JOINT_WIDTH
        or any(
            p.packed != first.packed
            or p.out_features != first.out_features
            or p.routed != first.routed
            or p.x_scale is not None
            for p in parts
        )
    ):
        return None
    biases = None
    like = next((p.bias for p in parts if p.bias is not None), None)
    if like is not None:
        zero = torch.zeros_like(like)
        biases = torch.cat([zero if p.bias is None else p.bias for p in parts])
    if first.packed:
        weight = _join_packed(modules, parts)
    else:
        weight = torch.cat([p.weight for p in parts])
    lora, max_rank = _join_lora(parts)
    return LinearParts(
        weight,
        first.packed,
        first.out_features * len(parts),
        biases,
        lora,
        first.routed,
        max_rank=max_rank,
    )


def _peft_parts(module: Any) -> LinearParts | None:
    """Parts of PEFT's LoRA linear in its usual state: one adapter, live, plain LoRA."""
    from lora_kernels.integrations.peft_layers import may_be_read

    base = getattr(module, "base_layer", None)
    names = list(getattr(module, "active_adapters", ()))
    if (
        type(base) is not torch.nn.Linear
        or getattr(module, "disable_adapters", False)
        or getattr(module, "merged", False)
        or module.training
        or len(names) > 1
        or not (may_be_read(module) and may_be_read(base))
    ):
        return None
    names = [name for name in names if name in module.lora_A]
    if not names:
        return LinearParts(base.weight, False, base.out_features, base.bias)
    [name] = names
    variant = getattr(module, "lora_variant", {})
    if name in variant or module.lora_B[name].bias is not None:
        return None
    if not (may_be_read(module.lora_A[name]) and may_be_read(module.lora_B[name])):
        return None
    a, b = module.lora_A[name].weight, module.lora_B[name].weight
    scales = torch.tensor([module.scaling[name]], dtype=torch.float32, device=a.device)
    lora = (a.detach(), b.detach().t(), scales, None)
    return LinearParts(base.weight, False, base.out_features, base.bias, lora)


def _join_packed(modules: Sequence[Any], parts: list[LinearParts]) -> torch.Tensor:
    """Repack INT8 weights as one; kept beside the first module for as long as it lives."""
    import lora_kernels as lk

    # The tensors themselves, held, and how often each was written in place: an address could be
    # that of another checkpoint by now.
    key = [(p.weight, -1 if p.weight.is_inference() else p.weight._version) for p in parts]
    known = _joint_weights.get(modules[0])
    if known is not None and all(
        old is new and before == now
        for (old, before), (new, now) in zip(known[0], key, strict=True)
    ):
        return known[1]
    unpacked = [
        lk.ops.int8_unpack(part.weight, part.out_features, module.in_features)
        for module, part in zip(modules, parts, strict=True)
    ]
    packed = lk.ops.int8_pack(
        torch.cat([q for q, _ in unpacked]), torch.cat([scales for _, scales in unpacked])
    )
    _joint_weights[modules[0]] = (key, packed)
    return packed


def _join_lora(parts: list[LinearParts]) -> tuple[Any, int]:
    """Banks of several linears as one, and its largest rank.

    A rows adapter by adapter, B block-diagonal, scales in B.
    """
    from lora_kernels.adapters.bank import by_rank

    width = parts[0].out_features
    # In fp32, since scales that differ between the parts go into B.
    banks = [
        (part.lora[0].float(), by_rank(part.lora[1], width).float(), *part.lora[2:])
        if part.lora
        else None
        for part in parts
    ]
    if not any(banks):
        return None, 0
    found = next(bank for bank in banks if bank)
    counts = max(bank[2].numel() for bank in banks if bank)
    a_rows, b_rows, offsets = [], [], [0]
    bounds = [
        None if bank is None
        else ([0, bank[0].shape[0]] if bank[3] is None else bank[3].tolist())
        for bank in banks
    ]  # fmt: skip
    for adapter in range(counts):
        for block, (bank, bound) in enumerate(zip(banks, bounds, strict=True)):
            if bank is None or bound is None or adapter + 1 >= len(bound):
                continue
            begin, end = bound[adapter], bound[adapter + 1]
            if begin == end:
                continue
            a_rows.append(bank[0][begin:end])
            rows = bank[1].new_zeros(end - begin, width * len(parts))
            scaled = bank[1][begin:end] * bank[2][adapter]
            rows[:, block * width : (block + 1) * width] = scaled
            b_rows.append(rows)
        offsets.append(sum(a.shape[0] for a in a_rows))
    if not a_rows:
        return None, 0
    one = torch.ones(counts, dtype=torch.float32, device=found[0].device)
    bounds_tensor = torch.tensor(offsets, dtype=torch.int32, device=found[0].device)
    max_rank = max(end - begin for begin, end in pairwise(offsets))
    return (torch.cat(a_rows), torch.cat(b_rows), one, bounds_tensor), max_rank
