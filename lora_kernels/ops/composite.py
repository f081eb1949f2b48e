"""Operators that run one after the other in one call: a whole decoder step, say.

A call of one operator costs some microseconds around its kernel, as long as a small projection
takes, and on several threads a fork and a join. A composite is recorded once and then run as
often as needed, each time in one call and with the threads gathered once.
"""

from __future__ import annotations

import weakref

import torch

from . import _library as _library
from ._dispatch import has_cuda

_ops = torch.ops.lora_kernels


class Composite:
    """Records operators with the tensors they read and write, and runs them in that order.

    Each method takes what the operator of its name takes, and ``out``, where the result goes.
    Nothing runs while recording. :meth:`run` reads all tensors anew, so what changes from run to
    run is written into them in place. The composite keeps them alive; none may be given other
    memory (``resize_``, ``.data =``, ``Module.to``). A tensor that would have to be copied to be
    read is refused, and so is an ``out`` that shares memory with ``x`` or ``q``.

    Forward only, outside of ``torch.compile``, on the CPU or, all of it, on one CUDA device, whose
    current stream runs it and whose graphs may hold it. Runs of one composite must not overlap.

    Examples
    --------
    >>> step = Composite()
    >>> step.int8_lora_linear(x, fc1, 2048, out=h, activation="gelu", norm=(weight, bias, 1e-5))
    >>> step.int8_lora_linear(h, fc2, 512, out=x, residual=x)
    >>> step.run()
    """

    @staticmethod
    def runs_on(device: torch.device) -> bool:
        """Whether this build can record operators on tensors of a device."""
        operators = (
            _ops.int8_lora_linear,
            _ops.int8_lora_topk,
            _ops.kv_attention_step,
            _ops.kv_pack,
        )
        return device.type == "cpu" or (
            device.type == "cuda" and all(has_cuda(operator.default) for operator in operators)
        )

    def __init__(self) -> None:
        self._handle: int = _ops.composite_new()
        weakref.finalize(self, _ops.composite_free, self._handle)
        self._run = _ops.composite_run.default

    def int8_lora_linear(
        self,
        x: torch.Tensor,
        packed_weight: torch.Tensor,
        out_features: int,
        bias: torch.Tensor | None = None,
        lora_a: torch.Tensor | None = None,
        lora_b: torch.Tensor | None = None,
        *,
        out: torch.Tensor,
        scales: torch.Tensor | None = None,
        offsets: torch.Tensor | None = None,
        adapter_ids: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
        activation: str = "none",
        x_scale: torch.Tensor | None = None,
        norm: tuple[torch.Tensor, torch.Tensor, float] | None = None,
        max_rank: int = 0,
    ) -> None:
        """Record :func:`lora_kernels.ops.int8_lora_linear`.

        Parameters
        ----------
        out
            As many elements as the result has, of its dtype, contiguous. It may be ``residual``
            itself.
        """
        norm_weight, norm_bias, norm_eps = (None, None, 0.0) if norm is None else norm
        _ops.composite_int8_lora_linear(
            self._handle,
            x,
            packed_weight,
            out_features,
            bias,
            lora_a,
            lora_b,
            scales,
            offsets,
            adapter_ids,
            residual,
            activation,
            x_scale,
            norm_weight,
            norm_bias,
            norm_eps,
            out,
            max_rank,
        )

    def int8_lora_topk(
        self,
        x: torch.Tensor,
        packed_weight: torch.Tensor,
        out_features: int,
        bias: torch.Tensor | None = None,
        lora_a: torch.Tensor | None = None,
        lora_b: torch.Tensor | None = None,
        *,
        values: torch.Tensor,
        columns: torch.Tensor,
        log_sum: torch.Tensor | None = None,
        scales: torch.Tensor | None = None,
        offsets: torch.Tensor | None = None,
        adapter_ids: torch.Tensor | None = None,
        x_scale: torch.Tensor | None = None,
        norm: tuple[torch.Tensor, torch.Tensor, float] | None = None,
        screen: torch.Tensor | None = None,
        max_rank: int = 0,
    ) -> None:
        """Record :func:`lora_kernels.ops.int8_lora_topk`.

        Parameters
        ----------
        values, columns, log_sum
            Where the results go: fp32 and int64 [..., k], fp32 [...] or None.
        """
        norm_weight, norm_bias, norm_eps = (None, None, 0.0) if norm is None else norm
        _ops.composite_int8_lora_topk(
            self._handle,
            x,
            packed_weight,
            out_features,
            columns.shape[-1],
            bias,
            lora_a,
            lora_b,
            scales,
            offsets,
            adapter_ids,
            x_scale,
            norm_weight,
            norm_bias,
            norm_eps,
            values,
            columns,
            log_sum,
            screen,
            max_rank,
        )

    def kv_attention_step(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        lengths: torch.Tensor,
        *,
        out: torch.Tensor,
        scale: float,
        k_scales: torch.Tensor | None = None,
        v_scales: torch.Tensor | None = None,
        slots: torch.Tensor | None = None,
    ) -> None:
        """Record :func:`lora_kernels.ops.kv_attention_step`, without weights of heads.

        Parameters
        ----------
        out
            As many elements as ``q`` has, of its dtype, contiguous.
        """
        _ops.composite_kv_attention_step(
            self._handle, q, k, v, k_cache, v_cache, k_scales, v_scales, lengths, slots, scale, out
        )

    def kv_pack(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        heads: int,
        *,
        out: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    ) -> None:
        """Record :func:`lora_kernels.ops.kv_pack`.

        Parameters
        ----------
        out
            As much memory as the four results take, of their dtypes, contiguous.
        """
        _ops.composite_kv_pack(self._handle, k, v, heads, *out)

    def run(self) -> None:
        """Run all that was recorded.

        Raises
        ------
        RuntimeError
            If a value that was read now does not fit (a length beyond the cache, say); the text
            names the operator and the argument. What earlier operators wrote stays written.
        """
        self._run(self._handle)

    def __repr__(self) -> str:
        """Plans of all stages, as they would run now."""
        return _ops.composite_describe(self._handle)
