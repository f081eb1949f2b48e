"""A model's linears as functions of (x, residual), bound straight to the fused operators.

Module calls, keyword handling and attribute look-ups cost more than a small projection at one row.
Here each linear is looked at once; what remains per call is one operator call whose epilogue does
bias, LoRA, activation and residual.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F

from lora_speech.errors import ModelError

Projection = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
"""`y = f(x, residual)`: x [rows, tokens, K], residual and y [rows, tokens, N]."""

JOINT_WIDTH = 256
"""Up to this many outputs per projection, q, k and v become one product. It saves two calls of
about 5 us each and reads a block-diagonal B that is three times larger: at rank 16 and width 128
that is 50 KB more out of cache, about 2 us; at width 512, 200 KB, as long as the calls saved."""

_joint_weights: WeakKeyDictionary[Any, tuple[list[tuple[torch.Tensor, int]], torch.Tensor]] = (
    WeakKeyDictionary()
)


class AdapterRows:
    """Which adapter each row of the batch uses.

    Attributes
    ----------
    names : list of (str or None), or None
        One per row, or one for all; None where nobody chose adapters.
    ids : Tensor or None
        The same as int32 [rows] or [1], -1 for the base; None where no row has an adapter.
        Projections read it at every call.
    """

    def __init__(self, names: list[str | None] | None, ids: torch.Tensor | None) -> None:
        self.names, self.ids = names, ids

    @classmethod
    def of(cls, model: Any, adapters: str | Sequence[str | None] | None, batch: int) -> AdapterRows:
        """Rows for one call: `adapters` as `greedy_decode` takes them.

        None keeps what an enclosing `lora_kernels.use_adapters` chose.
        """
        import lora_kernels as lk
        from lora_kernels.adapters.registry import ACTIVE_SELECTION, AdapterSelection

        if adapters is None:
            ambient = ACTIVE_SELECTION.get()
            names = None if ambient is None else list(ambient.names)
        else:
            names = [adapters] if isinstance(adapters, str) else list(adapters)
        if names is None:
            return cls(None, None)
        if (
            not names
            or batch % len(names)
            or (adapters is not None and len(names) not in (1, batch))
        ):
            raise ModelError(
                f"adapters: expected one for all rows or one (or None) per row ({batch}), got "
                f"{len(names)}; give as many as there are recordings"
            )
        with lk.use_adapters(names):  # refuses names that nobody loaded
            pass
        if len(names) > 1:
            names = [name for name in names for _ in range(batch // len(names))]
        registry = next(
            (r for m in model.modules() if (r := getattr(m, "_registry", None)) is not None), None
        )
        ids = None
        if registry is None and any(names):
            raise ModelError(
                f"adapters: expected adapters of this model, got {names} and it has none; load "
                "them with lora_kernels.load_adapter(model, folder, name=...)"
            )
        if registry is not None:
            ids = AdapterSelection(names).ids(registry, next(model.parameters()), batch)
        return cls(names, ids)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Choose the same adapters for what runs as modules."""
        import lora_kernels as lk

        if self.names is None:
            yield
            return
        with lk.use_adapters(self.names):
            yield

    def of_row(self, row: int) -> tuple[list[str | None] | None, torch.Tensor | None]:
        """Names and ids of one row alone."""
        names, ids = self.names, self.ids
        if names is not None and len(names) > 1:
            names = [names[row]]
        if ids is not None and ids.numel() > 1:
            ids = ids[row : row + 1]
        return names, ids

    def keep(self, index: torch.Tensor) -> None:
        """Go on with some of the rows only."""
        if self.names is not None and len(self.names) > 1:
            self.names = [self.names[i] for i in index.tolist()]
        if self.ids is not None and self.ids.numel() > 1:
            self.ids = self.ids[index]


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
        A [R, K], B [R, N] by rank row, scales [n], offsets [n + 1] or None (one adapter).
    routed : bool
        Whether each row chooses among the adapters; otherwise all rows use the only one.
    x_scale : Tensor or None
        Static scale of an INT8 linear's input.
    """

    weight: torch.Tensor
    packed: bool
    out_features: int
    bias: torch.Tensor | None
    lora: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None] | None = None
    routed: bool = False
    x_scale: torch.Tensor | None = None


def linear_parts(module: Any) -> LinearParts | None:
    """Take a linear apart; None where only calling the module is right."""
    from lora_kernels.integrations.peft_layers import may_be_read
    from lora_kernels.nn import Int8LoraLinear, LoraLinear

    if isinstance(module, (Int8LoraLinear, LoraLinear)):
        if module.activation != "none" or not may_be_read(module):
            return None
        bank = module.bank
        lora = None
        if bank is not None and bank.total_rank:
            lora = (bank.lora_a, bank.lora_b, bank.scales, bank.offsets)
        packed = isinstance(module, Int8LoraLinear)
        weight: Any = module.packed_weight if packed else module.weight
        x_scale: Any = module.x_scale if packed else None
        return LinearParts(
            weight, packed, module.out_features, module.bias, lora, routed=True, x_scale=x_scale
        )
    if type(module) is torch.nn.Linear and may_be_read(module):
        return LinearParts(module.weight, False, module.out_features, module.bias)
    return _peft_parts(module)


def projection(
    module: Any,
    rows: AdapterRows,
    *,
    activation: str = "none",
    extra_bias: torch.Tensor | None = None,
) -> Projection:
    """Bind one linear.

    Parameters
    ----------
    module : torch.nn.Module
        `nn.Linear`, a `lora_kernels` linear, PEFT's LoRA linear, or anything callable.
    rows : AdapterRows
        Read at every call.
    activation : {"none", "gelu"}
        Applied before the residual is added.
    extra_bias : Tensor, optional
        [N], added to the module's own.

    Returns
    -------
    callable
        `y = f(x, residual)`.
    """
    parts = linear_parts(module)
    if parts is None:
        return _module_call(module, rows, activation, extra_bias)
    if extra_bias is not None:
        bias = extra_bias if parts.bias is None else parts.bias + extra_bias
        parts = replace(parts, bias=bias)
    return _operator_call(parts, rows, activation)


def joint_projection(
    modules: Sequence[Any], rows: AdapterRows, heads: int
) -> Callable[[torch.Tensor], tuple[torch.Tensor, ...]]:
    """Bind linears over the same input, e.g. q, k and v.

    Returns
    -------
    callable
        x [rows, tokens, K] to one contiguous [rows, tokens, heads, head size] per module.
    """
    all_parts = [linear_parts(module) for module in modules]
    joined = _join(modules, [p for p in all_parts if p is not None])
    if joined is None:
        calls = [projection(module, rows) for module in modules]

        def separate(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            batch, tokens = x.shape[0], x.shape[1]
            return tuple(call(x, None).view(batch, tokens, heads, -1) for call in calls)

        return separate

    call = _operator_call(joined, rows, "none")
    count = len(modules)
    size = joined.out_features // count // heads

    def joint(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        batch, tokens = x.shape[0], x.shape[1]
        y = call(x, None)
        if batch == tokens == 1:
            return y.view(count, 1, 1, heads, size).unbind(0)
        y = y.view(batch, tokens, count, heads, size).permute(2, 0, 1, 3, 4)
        return y.contiguous().unbind(0)

    return joint


def _operator_call(parts: LinearParts, rows: AdapterRows, activation: str) -> Projection:
    weight, bias, count, x_scale = parts.weight, parts.bias, parts.out_features, parts.x_scale
    a, b, scales, offsets = parts.lora or (None, None, None, None)
    routed = parts.routed
    if parts.packed:
        int8 = torch.ops.lora_kernels.int8_lora_linear.default

        def int8_call(x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
            ids = rows.ids
            if a is None or ids is None:
                return int8(
                    x, weight, count, bias, None, None, None, None, None, residual, activation,
                    x_scale,
                )  # fmt: skip
            return int8(
                x, weight, count, bias, a, b, scales, offsets, ids, residual, activation, x_scale
            )

        return int8_call

    # Also without LoRA: torch's own product rounds differently for one row and for several. Ours
    # does so only between at most 8 rows and more, where it changes its way through memory.
    fused = torch.ops.lora_kernels.lora_linear.default

    def call(x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        ids = rows.ids if routed else None
        if a is None or (routed and ids is None):
            return fused(
                x, weight, bias, None, None, None, None, None, residual, activation, 0.0, None
            )
        return fused(x, weight, bias, a, b, scales, offsets, ids, residual, activation, 0.0, None)

    return call


def _module_call(
    module: Any, rows: AdapterRows, activation: str, extra_bias: torch.Tensor | None
) -> Projection:
    def call(x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        with rows.active():
            y = module(x)
        if extra_bias is not None:
            y = y + extra_bias
        if activation == "gelu":
            y = F.gelu(y)
        return y if residual is None else y + residual

    return call


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


def _join(modules: Sequence[Any], parts: list[LinearParts]) -> LinearParts | None:
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
    return LinearParts(
        weight,
        first.packed,
        first.out_features * len(parts),
        biases,
        _join_lora(parts),
        first.routed,
    )


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


def _join_lora(parts: list[LinearParts]) -> Any:
    """Banks of several linears as one: A rows adapter by adapter, B block-diagonal, scales in B."""
    banks = [part.lora for part in parts]
    if not any(banks):
        return None
    width = parts[0].out_features
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
            scaled = bank[1][begin:end] * bank[2][adapter].to(bank[1].dtype)
            rows[:, block * width : (block + 1) * width] = scaled
            b_rows.append(rows)
        offsets.append(sum(a.shape[0] for a in a_rows))
    if not a_rows:
        return None
    one = torch.ones(counts, dtype=torch.float32, device=found[0].device)
    bounds_tensor = torch.tensor(offsets, dtype=torch.int32, device=found[0].device)
    return torch.cat(a_rows), torch.cat(b_rows), one, bounds_tensor
