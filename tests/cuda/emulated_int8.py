"""Calls of ``int8_lora_linear``'s CUDA kernels, compiled for the host, on CPU tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from emulated import ACTIVATIONS, DTYPES, ORDERS, EmulationError, _pointer, _run, library

__all__ = ["EmulatedInt8", "EmulationError"]

PATHS = {"tiled": 0, "few_rows": 1, "clustered": 1, "fused": 2}

_INTEGERS = """rows in_features out_features dtype bias_dtype norm_dtype activation has_bias
has_residual has_norm static_scale top_k log_sum adapters total_rank max_rank groups lora_dtype arch
path large_tiles splits cluster staged x_stride a_stride b_stride_rank b_stride_out b_stride_block
shared_bytes"""
_POINTERS = """x packed bias lora_a lora_b scales offsets adapter_ids residual x_scale norm_weight
norm_bias y top_columns top_values log_sums q row_scales"""


class Call(ctypes.Structure):
    """The twin of ``Call`` in tests/cpp/cuda_emulated_int8.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _INTEGERS.split()),
        ("norm_eps", ctypes.c_double),
        ("host_x_scale", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in _POINTERS.split()),
    ]


class EmulatedInt8:
    """The kernels in one order of threads; ``path=None``: the plan that the heuristic takes.

    ``large`` 128, 256 or 320: tiles by wgmma, so tall. ``splits``: of K among blocks; on
    ``clustered`` (``few_rows``) and ``fused`` those of a cluster. ``staged`` in shared memory:
    nothing (0), what rows are made of (1), or all that fits (2). ``max_rank`` 0: the largest rank
    of the bank.

    After a call ``q`` and ``row_scales`` are the quantized rows and their scales, where the path
    keeps them in memory, and ``plan`` says what ran.
    """

    def __init__(
        self, order: str = "forward", seed: int = 1, *, path: str | None = None,
        large: int = False, splits: int = 1, staged: int = 2, arch: int = 90,
        shared_bytes: int = 0, max_rank: int = 0,
    ) -> None:  # fmt: skip
        self.lib = library()
        self.order, self.seed = ORDERS[order], seed
        self.path, self.large, self.splits, self.staged = path, large, splits, staged
        self.arch, self.shared_bytes, self.max_rank = arch, shared_bytes, max_rank
        self.plan = ""
        self._together: list[Call] | None = None

    def _call(
        self, x, packed, out_features, bias, lora_a, lora_b, scales, offsets, adapter_ids, x_scale,
        norm,
    ) -> Call:  # fmt: skip
        call = Call()
        call.rows, call.in_features = x.shape
        call.out_features = out_features
        call.dtype, call.x_stride = DTYPES[x.dtype], x.stride(0)
        call.arch, call.shared_bytes = self.arch, self.shared_bytes
        call.path = PATHS[self.path] if self.path else -1
        call.large_tiles, call.staged = self.large, self.staged
        clusters = self.path in ("clustered", "fused")
        call.splits, call.cluster = (1, self.splits) if clusters else (self.splits, 1)
        call.x, call.packed = x.data_ptr(), packed.data_ptr()
        if bias is not None:
            call.has_bias, call.bias, call.bias_dtype = 1, bias.data_ptr(), DTYPES[bias.dtype]
        if isinstance(x_scale, float):
            call.static_scale, call.host_x_scale = 1, x_scale
        elif x_scale is not None:
            call.static_scale, call.x_scale = 1, x_scale.data_ptr()
        if norm is not None:
            call.has_norm, call.norm_dtype, call.norm_eps = 1, DTYPES[norm[0].dtype], norm[2]
            call.norm_weight, call.norm_bias = norm[0].data_ptr(), norm[1].data_ptr()
        if lora_a is not None:
            call.adapters = 1 if offsets is None else offsets.numel() - 1
            call.total_rank = lora_a.shape[0]
            ranks = [call.total_rank] if offsets is None else offsets.diff().tolist()
            call.max_rank = self.max_rank or max(0, min(max(ranks), call.total_rank))
            call.groups = 0 if adapter_ids is None else adapter_ids.numel()
            call.lora_dtype = DTYPES[lora_a.dtype]
            call.a_stride = lora_a.stride(0)
            if lora_b.dim() == 3:
                call.b_stride_block, call.b_stride_rank, call.b_stride_out = lora_b.stride()
            else:
                call.b_stride_rank, call.b_stride_out = lora_b.stride()
            call.lora_a, call.lora_b = lora_a.data_ptr(), lora_b.data_ptr()
            call.scales, call.offsets = _pointer(scales), _pointer(offsets)
            call.adapter_ids = _pointer(adapter_ids)
        self.q = torch.full(x.shape, -128, dtype=torch.int8)
        self.row_scales = torch.full((x.shape[0],), float("nan"))
        call.q, call.row_scales = self.q.data_ptr(), self.row_scales.data_ptr()
        return call

    @contextmanager
    def together(self) -> Iterator[None]:
        """The calls of the block in one launch, at its end; what they return is filled then."""
        self._together = calls = []
        try:
            yield
        finally:
            self._together = None
        pointers = (ctypes.POINTER(Call) * len(calls))(*map(ctypes.pointer, calls))
        self.lib.emulated_order(ctypes.c_int(self.order), ctypes.c_uint64(self.seed))
        message = ctypes.create_string_buffer(4000)
        count = ctypes.c_int64(len(calls))
        if self.lib.emulated_int8_together(pointers, count, message, ctypes.c_int64(4000)):
            raise EmulationError(message.value.decode())
        self.plan = message.value.decode()

    def _launch(self, call: Call) -> None:
        if self._together is not None:
            self._together.append(call)
            return
        self.lib.emulated_order(ctypes.c_int(self.order), ctypes.c_uint64(self.seed))
        self.plan = _run(self.lib.emulated_int8_forward, call)

    def forward(
        self, x, packed, out_features, bias=None, *, lora_a=None, lora_b=None, scales=None,
        offsets=None, adapter_ids=None, residual=None, activation="none", x_scale=None, norm=None,
    ) -> torch.Tensor:  # fmt: skip
        """``int8_lora_linear`` with the arguments of the operator, on rows [M, K]."""
        call = self._call(
            x, packed, out_features, bias, lora_a, lora_b, scales, offsets, adapter_ids, x_scale,
            norm,
        )  # fmt: skip
        y = torch.full((x.shape[0], out_features), float("nan"), dtype=x.dtype)
        call.activation = ACTIVATIONS[activation]
        call.has_residual, call.residual = int(residual is not None), _pointer(residual)
        call.y = y.data_ptr()
        self._launch(call)
        return y

    def topk(
        self, x, packed, out_features, k, bias=None, *, lora_a=None, lora_b=None, scales=None,
        offsets=None, adapter_ids=None, x_scale=None, norm=None, log_sum=True,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        """``int8_lora_topk``: values, columns, log sums."""
        call = self._call(
            x, packed, out_features, bias, lora_a, lora_b, scales, offsets, adapter_ids, x_scale,
            norm,
        )  # fmt: skip
        values = torch.full((x.shape[0], k), float("nan"))
        columns = torch.full((x.shape[0], k), -1)
        sums = torch.full((x.shape[0],), float("nan"))
        call.top_k, call.log_sum = k, int(log_sum)
        call.top_values, call.top_columns = values.data_ptr(), columns.data_ptr()
        call.log_sums = sums.data_ptr()
        self._launch(call)
        return values, columns, sums
