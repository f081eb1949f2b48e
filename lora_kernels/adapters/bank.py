"""The ragged bank of one layer: every adapter's rank rows, one after another, never padded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce

import torch

from ..errors import AdapterError
from .adapter import AdapterLayer


class _Store:
    """Memory with room behind the rows in use, which a bank and those appended to it share."""

    __slots__ = ("lora_a", "lora_b", "used")

    def __init__(self, lora_a: torch.Tensor, lora_b: torch.Tensor, rows: int, used: int) -> None:
        self.lora_a = _longer(lora_a, 0, rows)
        self.lora_b = _longer(lora_b, lora_b.dim() - 2, rows)
        self.used = used

    @property
    def rows(self) -> int:
        """How many there is memory for."""
        return int(self.lora_a.shape[0])

    def put(self, layer: AdapterLayer) -> None:
        """Write the rank rows of one more adapter behind the others."""
        rows = slice(self.used, self.used + layer.rank)
        self.lora_a[rows] = layer.a_matrix.detach()
        b = layer.b_matrix.detach().t()
        if self.lora_b.dim() == 2:
            self.lora_b[rows] = b
        else:
            self.lora_b[:, rows] = in_blocks(b)
        self.used = rows.stop


@dataclass(frozen=True, eq=False)
class AdapterBank:
    """All adapters of one layer, in the layout the operators read.

    A bank is immutable: a change makes a new bank, which replaces the old one whole, so that a
    forward pass under way keeps what it started with. One that only has more adapters at its end
    shares the memory of the old: see :meth:`append`.

    Attributes
    ----------
    lora_a
        [R, K], the rank rows of all adapters.
    lora_b
        [R, N], by rank row (PEFT's B [N, r] transposed), or in blocks of 64 outputs,
        [N64 / 64, R, 64] with N64 = N rounded up to 64, the last block padded with zeros: few
        rows read that as one stream, where [R, N] has every rank row in a page of its own.
    offsets
        int32 [n + 1]: adapter i owns the rows offsets[i] .. offsets[i + 1] - 1.
    scales
        fp32 [n].
    ranks
        The ranks as Python integers; 0 where an adapter leaves this layer alone.
    out_features
        N.
    max_rank
        The largest of the ranks. Operators on a CUDA device, which cannot wait for ``offsets``, are
        planned for it.
    """

    lora_a: torch.Tensor
    lora_b: torch.Tensor
    offsets: torch.Tensor
    scales: torch.Tensor
    ranks: tuple[int, ...]
    out_features: int
    _store: _Store | None = field(default=None, repr=False)
    max_rank: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # Once: it goes with every call.
        object.__setattr__(self, "max_rank", max(self.ranks, default=0))

    @classmethod
    def pack(
        cls,
        layers: Sequence[AdapterLayer | None],
        in_features: int,
        out_features: int,
        *,
        dtype: torch.dtype | None = None,
        blocked: bool = False,
        device: torch.device | str | None = None,
    ) -> AdapterBank:
        """Build a bank from each adapter's layer (None: the adapter leaves this layer alone).

        Parameters
        ----------
        layers
            One entry per adapter, in the order of the adapters' indices.
        in_features, out_features
            K and N of the layer.
        dtype
            Storage of A and B; None: the smallest dtype that holds every adapter exactly.
        blocked
            Whether B is kept in blocks.
        device
            Where the bank lives; None: the CPU.

        Raises
        ------
        AdapterError
            If a layer's shape is not that of the module.
        """
        for index, layer in enumerate(layers):
            if layer is not None:
                check_features(f"adapter {index}", layer, in_features, out_features)
        present = [layer for layer in layers if layer is not None and layer.rank]
        if dtype is None:
            dtypes = [layer.lora_a.dtype for layer in present]
            dtype = reduce(torch.promote_types, dtypes) if dtypes else torch.float32
        ranks = tuple(layer.rank if layer is not None else 0 for layer in layers)
        offsets = [0]
        for rank in ranks:
            offsets.append(offsets[-1] + rank)
        lora_a = torch.empty(offsets[-1], in_features, dtype=dtype)
        lora_b = torch.empty(offsets[-1], out_features, dtype=dtype)
        for begin, layer in zip(offsets, layers, strict=False):
            if layer is not None:
                lora_a[begin : begin + layer.rank] = layer.a_matrix.detach()
                lora_b[begin : begin + layer.rank] = layer.b_matrix.detach().t()
        scales = [layer.scale if layer is not None else 1.0 for layer in layers]
        bank = cls(
            lora_a,
            in_blocks(lora_b) if blocked else lora_b,
            torch.tensor(offsets, dtype=torch.int32),
            torch.tensor(scales, dtype=torch.float32),
            ranks,
            out_features,
        )
        return bank if device is None else bank.to(device)

    def append(self, layer: AdapterLayer | None) -> AdapterBank:
        """The bank with one more adapter at its end, in the same dtype.

        Its rows are written behind those of this bank, where there is room; else into memory half
        as large again, so that loading n adapters one by one moves each a few times and not n.
        This bank sees nothing of it.
        """
        rank = layer.rank if layer is not None else 0
        store, end = self._store, self.total_rank + rank
        if layer is not None and rank:
            # Where this is not the newest bank, another's rows are behind its own.
            if store is None or store.used != self.total_rank or end > store.rows:
                rows = max(end, self.total_rank * 3 // 2)
                store = _Store(self.lora_a, self.lora_b, rows, self.total_rank)
            store.put(layer)
        scale = layer.scale if layer is not None else 1.0
        return AdapterBank(
            self.lora_a if store is None else store.lora_a[:end],
            self.lora_b if store is None else store.lora_b.narrow(self.lora_b.dim() - 2, 0, end),
            torch.cat((self.offsets, self.offsets.new_tensor([end]))),
            torch.cat((self.scales, self.scales.new_tensor([scale]))),
            (*self.ranks, rank),
            self.out_features,
            store,
        )

    def unpack(self) -> list[AdapterLayer | None]:
        """The layers :meth:`pack` was given, in the bank's dtype (None where the rank is 0)."""
        layers: list[AdapterLayer | None] = []
        lora_b = by_rank(self.lora_b, self.out_features)
        begin = 0
        for rank, scale in zip(self.ranks, self.scales.tolist(), strict=True):
            rows = slice(begin, begin + rank)
            begin += rank
            layers.append(
                AdapterLayer(self.lora_a[rows], lora_b[rows].t(), scale) if rank else None
            )
        return layers

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> AdapterBank:
        """The bank on another device or with A and B in another dtype (scales stay fp32)."""
        return AdapterBank(
            self.lora_a.to(device=device, dtype=dtype),
            self.lora_b.to(device=device, dtype=dtype),
            self.offsets.to(device=device),
            self.scales.to(device=device),
            self.ranks,
            self.out_features,
        )

    @property
    def count(self) -> int:
        """Number of adapters n."""
        return len(self.ranks)

    @property
    def total_rank(self) -> int:
        """Number of rank rows R."""
        return int(self.lora_a.shape[0])


_BLOCK = 64  # kLoraBlockColumns of the operators


def _longer(tensor: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """A copy with room for ``size`` entries along a dimension."""
    shape = list(tensor.shape)
    shape[dim] = size
    copy = tensor.new_empty(shape)
    copy.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
    return copy


def in_blocks(lora_b: torch.Tensor) -> torch.Tensor:
    """B [R, N] as [N64 / 64, R, 64]."""
    rank, columns = lora_b.shape
    padded = torch.nn.functional.pad(lora_b, (0, -columns % _BLOCK))
    return padded.view(rank, padded.shape[1] // _BLOCK, _BLOCK).transpose(0, 1).contiguous()


def by_rank(lora_b: torch.Tensor, columns: int) -> torch.Tensor:
    """B as [R, N], however it is kept."""
    if lora_b.dim() == 2:
        return lora_b
    blocks, rank, width = lora_b.shape
    return lora_b.transpose(0, 1).reshape(rank, blocks * width)[:, :columns]


def check_features(name: str, layer: AdapterLayer, in_features: int, out_features: int) -> None:
    """Raise :class:`AdapterError` unless a layer fits a module of K inputs and N outputs."""
    if (layer.in_features, layer.out_features) != (in_features, out_features):
        raise AdapterError(
            f"{name}: expected lora_A [r, {in_features}] and lora_B [{out_features}, r], got "
            f"{tuple(layer.lora_a.shape)} and {tuple(layer.lora_b.shape)}; this adapter was "
            "trained for a model of another size, load it on that model"
        )
