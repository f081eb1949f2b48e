"""Calls of the CUDA kernels of ``kv_attention_step`` and its kin, compiled for the host."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from emulated import DTYPES, ORDERS, EmulationError, _pointer, _run, library

__all__ = ["EmulatedKv", "EmulationError"]

CACHE_DTYPES = DTYPES | {torch.int8: 3}

_INTEGERS = """rows tokens heads head_size cache_rows capacity dtype cache_dtype scales slot_kind
layout append weight_heads arch apart split_positions cluster chunks"""
_POINTERS = """q k v k_cache v_cache k_scales v_scales lengths slots chosen_heads weights out"""
_PACK_INTEGERS = """cache_rows positions heads head_size dtype k_stride v_stride k_row_stride
v_row_stride arch"""
_PACK_POINTERS = "k v packed_k packed_v k_scales v_scales"
_RELATIVE_INTEGERS = """rows tokens heads head_size cache_rows capacity left dtype cache_dtype arch
chunks"""
_RELATIVE_POINTERS = """q k v k_cache v_cache positions bias_u bias_v lengths counts slots out"""


class Call(ctypes.Structure):
    """The twin of ``Call`` in tests/cpp/cuda_emulated_kv.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _INTEGERS.split()),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in _POINTERS.split()),
    ]


class PackCall(ctypes.Structure):
    """The twin of ``PackCall`` there."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _PACK_INTEGERS.split()),
        *((name, ctypes.c_void_p) for name in _PACK_POINTERS.split()),
    ]


class RelativeCall(ctypes.Structure):
    """The twin of ``RelativeCall`` in tests/cpp/cuda_emulated_kv_relative.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _RELATIVE_INTEGERS.split()),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in _RELATIVE_POINTERS.split()),
    ]


class EmulatedKv:
    """The kernels in one order of threads.

    Parameters
    ----------
    order, seed
        "forward", "reverse" or "shuffled" (drawn by the seed).
    apart, split_positions, cluster, chunks
        Append in a kernel of its own; positions of a block, a multiple of 128; blocks that share
        out the positions in a cluster, where there can be one; blocks over the queries. None of
        them given: the plan that the heuristic takes, kept in ``plan``.
    """

    def __init__(
        self, order: str = "forward", seed: int = 1, *, apart: bool = False,
        split_positions: int = 0, cluster: int = 0, chunks: int = 0, arch: int = 90,
    ) -> None:  # fmt: skip
        self.lib = library()
        self.order, self.seed, self.arch = ORDERS[order], seed, arch
        self.apart, self.split_positions, self.chunks = apart, split_positions, chunks
        self.cluster = cluster
        self.plan = ""

    def _prepare(self) -> None:
        self.lib.emulated_order(ctypes.c_int(self.order), ctypes.c_uint64(self.seed))

    def step(
        self, q, k, v, k_cache, v_cache, lengths, *, k_scales=None, v_scales=None, slots=None,
        scale: float = 1.0, heads: Sequence[int] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """``kv_attention_step`` with the arguments of the operator; caches are written in place."""
        call = Call()
        call.rows, call.tokens, call.heads, call.head_size = q.shape
        blocked = k_cache.dim() == 6
        call.cache_rows = k_cache.shape[0]
        call.capacity = 4 * v_cache.shape[2] if blocked else k_cache.shape[2]
        call.layout = int(blocked)
        call.dtype, call.cache_dtype = DTYPES[q.dtype], CACHE_DTYPES[k_cache.dtype]
        if k_scales is not None:
            per_position = k_scales.shape[2:] == (call.capacity, 1) and not blocked
            call.scales = 1 if per_position else 2
        call.slot_kind = 0 if slots is None else slots.dim()
        call.append, call.scale, call.arch = int(k is not None), scale, self.arch
        call.apart, call.split_positions = self.apart, self.split_positions
        call.cluster, call.chunks = self.cluster, self.chunks
        out = torch.full(q.shape, 7.0, dtype=q.dtype)
        weights = torch.empty(0)
        chosen = torch.tensor(list(heads or []), dtype=torch.int64)
        if heads:
            call.weight_heads = len(heads)
            shape = (q.shape[0], len(heads), q.shape[1], call.capacity)
            weights = torch.full(shape, 7.0)
        operands = {
            "q": q, "k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache, "k_scales": k_scales,
            "v_scales": v_scales, "lengths": lengths, "slots": slots, "chosen_heads": chosen,
            "weights": weights, "out": out,
        }  # fmt: skip
        for name, tensor in operands.items():
            assert tensor is None or tensor.is_contiguous(), name
            setattr(call, name, _pointer(tensor))
        self._prepare()
        self.plan = _run(self.lib.emulated_kv_attention_step, call)
        return out, weights

    def pack(
        self, k: torch.Tensor, v: torch.Tensor, heads: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """``kv_pack``, on k and v with unit stride along the last dimension."""
        rows, positions, columns = k.shape
        size = columns // heads
        blocks, steps = -(-positions // 64), -(-positions // 4)
        channels = -(-size // 16) * 16
        packed_k = torch.full((rows, heads, blocks, -(-size // 4), 64, 4), -128, dtype=torch.int8)
        packed_v = torch.full((rows, heads, steps, channels, 4), -128, dtype=torch.int8)
        k_scales = torch.full((rows, heads, 1, size), 7.0)
        v_scales = torch.full((rows, heads, 1, size), 7.0)
        call = PackCall()
        call.cache_rows, call.positions, call.heads, call.head_size = rows, positions, heads, size
        call.dtype, call.arch = DTYPES[k.dtype], self.arch
        call.k_row_stride, call.k_stride = k.stride()[:2]
        call.v_row_stride, call.v_stride = v.stride()[:2]
        for name, tensor in zip(
            _PACK_POINTERS.split(), (k, v, packed_k, packed_v, k_scales, v_scales), strict=True
        ):
            setattr(call, name, tensor.data_ptr())
        self._prepare()
        self.plan = _run(self.lib.emulated_kv_pack, call)
        return packed_k, packed_v, k_scales, v_scales

    def relative_step(
        self, q, k, v, k_cache, v_cache, positions, bias_u, bias_v, lengths, *, left: int,
        counts=None, slots=None, scale: float = 1.0,
    ) -> torch.Tensor:  # fmt: skip
        """``kv_relative_step`` with the arguments of the operator; caches are written in place."""
        call = RelativeCall()
        call.rows, call.tokens, call.heads, call.head_size = q.shape
        call.cache_rows, call.capacity = k_cache.shape[0], k_cache.shape[2]
        call.dtype, call.cache_dtype = DTYPES[q.dtype], CACHE_DTYPES[k_cache.dtype]
        call.left, call.scale, call.arch, call.chunks = left, scale, self.arch, self.chunks
        out = torch.full(q.shape, 7.0, dtype=q.dtype)
        operands = (
            q, k, v, k_cache, v_cache, positions, bias_u, bias_v, lengths, counts, slots, out,
        )  # fmt: skip
        for name, tensor in zip(_RELATIVE_POINTERS.split(), operands, strict=True):
            assert tensor is None or tensor.is_contiguous(), name
            setattr(call, name, _pointer(tensor))
        self._prepare()
        self.plan = _run(self.lib.emulated_kv_relative_step, call)
        return out
