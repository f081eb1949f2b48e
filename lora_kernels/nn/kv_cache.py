"""A preallocated key-value cache, read and written by ``kv_attention_step``."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import ops
from ..errors import LoraKernelsError
from .int8_rows import quantize_rows

MINIMUM_CAPACITY = 32  # Whisper's prompts fit, and doubling reaches its 448 positions in 4 steps


def _quantized(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 of [S, H, C, D] with one fp32 scale per position, [S, H, C, 1]."""
    q, scale = quantize_rows(states)
    return q, scale.unsqueeze(-1)


class KVCache:
    """Keys and values of one attention layer, written in place and never copied per step.

    A *row* is one hypothesis (utterance times beam). Beam search permutes a small table of
    indices instead of the cache: position p of row i lives in cache row ``slots[i, p]``. For a
    fixed cache (cross-attention) the table has one entry per row, and several rows may share one
    cache row: the beams of an utterance share its keys and values.

    Parameters
    ----------
    rows, heads, head_size
        Sizes; ``rows`` is the number of cache rows.
    capacity
        Positions to allocate now; the cache doubles when it is full.
    dtype
        Storage: fp32, fp16, bf16, or int8 (one scale per position).
    device
        Where the cache lives.
    max_positions
        A length beyond which growing is an error (the model's number of positions), or None.
    """

    def __init__(
        self,
        rows: int,
        heads: int,
        head_size: int,
        *,
        capacity: int = MINIMUM_CAPACITY,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        max_positions: int | None = None,
    ) -> None:
        shape = (rows, heads, max(capacity, 1), head_size)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.key_scales: torch.Tensor | None = None
        self.value_scales: torch.Tensor | None = None
        if dtype == torch.int8:
            self.key_scales = torch.zeros((*shape[:3], 1), device=device)
            self.value_scales = torch.zeros((*shape[:3], 1), device=device)
        self.lengths = torch.zeros(rows, dtype=torch.int32, device=device)
        self.length = 0
        self.slots: torch.Tensor | None = None
        self.fixed = False
        self.packed = False
        self.max_positions = max_positions

    @classmethod
    def from_states(
        cls,
        keys: torch.Tensor,
        values: torch.Tensor,
        *,
        fixed: bool = False,
        dtype: torch.dtype | None = None,
        max_positions: int | None = None,
    ) -> KVCache:
        """A cache that holds [rows, H, length, D] already.

        Parameters
        ----------
        keys, values
            What the cache holds.
        fixed
            Nothing will be appended (cross-attention): contiguous tensors of the right dtype are
            used as they are, without a copy.
        dtype
            Storage; None keeps that of ``keys``.
        max_positions
            As in the constructor.
        """
        rows, heads, length, head_size = keys.shape
        dtype = dtype or keys.dtype
        cache = cls(
            rows,
            heads,
            head_size,
            capacity=1 if fixed else max(MINIMUM_CAPACITY, 2 * length),
            dtype=dtype,
            device=keys.device,
            max_positions=max_positions,
        )
        cache.fixed = fixed
        cache._store(keys.detach(), values.detach())
        return cache

    def _store(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Take over contents of [rows, H, length, D], every row in its own cache row."""
        length = keys.shape[2]
        k_scales = v_scales = None
        packed, self.packed = self.packed, False
        if self.keys.dtype == torch.int8 and not packed:
            keys, k_scales = _quantized(keys)
            values, v_scales = _quantized(values)
        if not packed:
            keys, values = keys.to(self.keys.dtype), values.to(self.values.dtype)
        self.slots = None
        if self.fixed:
            self.keys, self.values = keys.contiguous(), values.contiguous()
            self.key_scales, self.value_scales = k_scales, v_scales
        else:
            if keys.shape[0] != self.keys.shape[0] or length > self.capacity:
                capacity = max(self.capacity, 2 * length)
                self.keys = self._padded(keys, capacity)
                self.values = self._padded(values, capacity)
                if k_scales is not None and v_scales is not None:
                    self.key_scales = self._padded(k_scales, capacity)
                    self.value_scales = self._padded(v_scales, capacity)
            else:
                self.keys[:, :, :length] = keys
                self.values[:, :, :length] = values
                if self.key_scales is not None and k_scales is not None:
                    self.key_scales[:, :, :length] = k_scales
                if self.value_scales is not None and v_scales is not None:
                    self.value_scales[:, :, :length] = v_scales
        self.length = length
        self.lengths = torch.full(
            (keys.shape[0],), length, dtype=torch.int32, device=self.keys.device
        )
        if packed:
            self.pack()

    @staticmethod
    def _padded(states: torch.Tensor, capacity: int) -> torch.Tensor:
        """[S, H, length, D] at the beginning of zeros [S, H, capacity, D]."""
        padded = states.new_zeros(*states.shape[:2], capacity, states.shape[3])
        padded[:, :, : states.shape[2]] = states
        return padded

    @property
    def rows(self) -> int:
        """Number of hypotheses (rows that attend)."""
        return int(self.lengths.shape[0])

    @property
    def capacity(self) -> int:
        """Positions allocated per cache row."""
        return int(self.keys.shape[2])

    def reserve(self, tokens: int) -> None:
        """Make room for ``tokens`` more positions.

        Raises
        ------
        LoraKernelsError
            If the cache is fixed or the model has no such position.
        """
        needed = self.length + tokens
        if self.fixed:
            raise LoraKernelsError(
                f"cache: expected a growing cache, got a fixed one of {self.length} positions; "
                "build it without fixed=True to append to it"
            )
        if self.max_positions is not None and needed > self.max_positions:
            raise LoraKernelsError(
                f"cache: expected at most {self.max_positions} positions (the model has no more), "
                f"got {self.length} and {tokens} new ones; generate fewer tokens"
            )
        if needed <= self.capacity:
            return
        capacity = max(needed, 2 * self.capacity)
        if self.max_positions is not None:
            capacity = min(capacity, self.max_positions)
        old = self.capacity
        self.keys = self._padded(self.keys, capacity)
        self.values = self._padded(self.values, capacity)
        if self.key_scales is not None and self.value_scales is not None:
            self.key_scales = self._padded(self.key_scales, capacity)
            self.value_scales = self._padded(self.value_scales, capacity)
        if self.slots is not None:
            own = torch.arange(self.rows, dtype=torch.int32, device=self.slots.device)
            self.slots = torch.cat(
                (self.slots, own.unsqueeze(1).expand(-1, capacity - old)), dim=1
            ).contiguous()

    def step(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None = None,
        v: torch.Tensor | None = None,
        *,
        scale: float = 1.0,
        heads: Sequence[int] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append k, v (when given) and attend.

        Parameters
        ----------
        q, k, v
            [rows, T, H, D].
        scale
            Factor of the scores.
        heads
            Heads whose softmax weights are returned.

        Returns
        -------
        tuple of torch.Tensor
            out [rows, T, H, D] and weights fp32 [rows, len(heads), T, capacity].
        """
        if k is not None:
            tokens = q.shape[1]
            if self.fixed or self.length + tokens > self.keys.shape[2]:
                self.reserve(tokens)
        out, weights = ops.kv_attention_step(
            q,
            k,
            v,
            self.keys,
            self.values,
            lengths=self.lengths,
            k_scales=self.key_scales,
            v_scales=self.value_scales,
            slots=self.slots,
            scale=scale,
            heads=heads,
        )
        if k is not None:
            self.length += tokens
            self.lengths.add_(tokens)
        return out, weights

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write [rows, H, T, D] after the valid positions, without attending.

        Every row must have the same length.
        """
        tokens = keys.shape[2]
        if self.fixed and self.length == 0:
            self._store(keys.detach(), values.detach())
            return
        self.reserve(tokens)
        places = slice(self.length, self.length + tokens)
        if self.keys.dtype == torch.int8:
            keys, k_scales = _quantized(keys)
            values, v_scales = _quantized(values)
            assert self.key_scales is not None
            assert self.value_scales is not None
            self.key_scales[:, :, places], self.value_scales[:, :, places] = k_scales, v_scales
        self.keys[:, :, places] = keys.detach()
        self.values[:, :, places] = values.detach()
        self.length += tokens
        self.lengths = self.lengths + tokens

    def to(self, device: torch.device | str) -> None:
        """Move the cache to another device, in place."""
        for name in ("keys", "values", "key_scales", "value_scales", "lengths", "slots"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, tensor.to(device))

    def reorder(self, rows: torch.Tensor) -> None:
        """Row i continues from what was row ``rows[i]``; only indices move.

        Parameters
        ----------
        rows
            Integer [rows]: beam search's permutation (with repetitions).
        """
        rows = rows.to(self.lengths.device)
        if rows.shape[0] != self.rows:
            self.select(rows)
            return
        if self.fixed:
            if self.slots is None:
                self.slots = torch.arange(self.rows, dtype=torch.int32, device=rows.device)
            self.slots = self.slots.index_select(0, rows)
        else:
            if self.slots is None:
                own = torch.arange(self.rows, dtype=torch.int32, device=rows.device)
                self.slots = own.unsqueeze(1).repeat(1, self.capacity)
            # Positions still to come belong to the row itself.
            past = self.slots[:, : self.length].index_select(0, rows)
            self.slots[:, : self.length] = past
        # Rows of different lengths take their lengths along; equal ones stay equal.
        self.lengths = self.lengths.index_select(0, rows)

    def crop(self, length: int) -> None:
        """Forget every position from ``length`` on."""
        self.length = min(self.length, length)
        self.lengths = self.lengths.clamp(max=length)
        if self.slots is not None and self.slots.dim() == 2:
            own = torch.arange(self.rows, dtype=torch.int32, device=self.slots.device)
            self.slots[:, self.length :] = own.unsqueeze(1)

    def share_equal_rows(self) -> None:
        """Keep neighbouring cache rows of a fixed cache once where they are equal.

        ``generate()`` repeats each utterance for its beams before it computes keys and values;
        one copy per utterance is read from memory per step instead of one per beam. The
        comparison is exact, so rows with different adapters stay apart.
        """
        if not self.fixed or self.slots is not None or self.keys.shape[0] < 2:
            return
        keys, values = self.keys, self.values
        if self.key_scales is not None or not bool((keys[1:, :, 0] == keys[:-1, :, 0]).any()):
            return
        equal = (keys[1:] == keys[:-1]).flatten(1).all(1)
        equal &= (values[1:] == values[:-1]).flatten(1).all(1)
        first = torch.cat((equal.new_ones(1), ~equal))
        if bool(first.all()):
            return
        self.keys, self.values = keys[first], values[first]
        self.slots = (first.cumsum(0) - 1).to(torch.int32)

    def pack(self) -> None:
        """Quantize a fixed cache per channel, into the blocks of :func:`lora_kernels.ops.kv_pack`.

        A step then reads a quarter of what fp32 takes. For keys and values beside INT8 weights: q
        and the softmax weights are rounded to 14 bits, q of 64 tokens or more to 8.

        Raises
        ------
        LoraKernelsError
            If the cache grows, or is stored in int8 already.
        """
        if not self.fixed or self.key_scales is not None:
            got = "one in int8" if self.fixed else "a growing one"
            raise LoraKernelsError(
                f"cache: expected a fixed one in floating point, got {got}; build it with "
                "from_states(..., fixed=True)"
            )
        k, v = (states.transpose(1, 2).flatten(2) for states in (self.keys, self.values))
        packed = ops.kv_pack(k, v, self.keys.shape[1])
        self.keys, self.values, self.key_scales, self.value_scales = packed
        self.packed = True

    def _unpacked(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What :meth:`pack` packed, int8 [S, H, length, D] each."""
        assert self.key_scales is not None, "a packed cache"
        size = self.key_scales.shape[-1]
        # [S, H, C / 64, D / 4, 64, 4] and [S, H, C / 4, D', 4]: see kv_pack.
        keys = self.keys.transpose(3, 4).flatten(4).flatten(2, 3)
        values = self.values.transpose(3, 4).flatten(2, 3)
        return keys[..., : self.length, :size], values[..., : self.length, :size]

    def select(self, rows: torch.Tensor) -> None:
        """Keep (or repeat) the given rows; unlike :meth:`reorder` their number may change.

        A fixed cache changes its table alone; a growing one gathers its contents, once.
        """
        rows = rows.to(self.lengths.device)
        if rows.dtype == torch.bool:
            rows = rows.nonzero().reshape(-1)
        lengths = self.lengths.index_select(0, rows)
        if self.fixed:
            own = torch.arange(self.rows, dtype=torch.int32, device=rows.device)
            self.slots = (own if self.slots is None else self.slots).index_select(0, rows)
        else:
            keys, values = self.gather()
            self._store(keys.index_select(0, rows), values.index_select(0, rows))
        self.lengths = lengths

    def repeat_interleave(self, repeats: int) -> None:
        """Each row ``repeats`` times: the beams of an utterance start from the same prompt."""
        rows = torch.arange(self.rows, device=self.lengths.device)
        self.select(rows.repeat_interleave(repeats))

    def gather(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [rows, H, length, D] in floating point (views where possible)."""
        result = []
        stored = self._unpacked() if self.packed else (self.keys, self.values)
        for states, scales in zip(stored, (self.key_scales, self.value_scales), strict=True):
            if scales is not None:
                states = states.to(torch.float32) * scales
            valid = states[:, :, : self.length]
            if self.slots is not None and self.slots.dim() == 1:
                valid = valid.index_select(0, self.slots)
            elif self.slots is not None:
                positions = torch.arange(self.length, device=states.device)
                table = self.slots[:, : self.length].long()
                valid = states[table, :, positions].transpose(1, 2)
            result.append(valid)
        return result[0], result[1]
