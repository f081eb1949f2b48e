"""The operators called through ``_raw`` on the addresses of torch's tensors.

What the raw module needs is what it is given here: sizes, addresses, strides and a stream. torch
only holds the memory, of a CPU or of a CUDA device.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch


def address(t: torch.Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def addresses(**tensors: torch.Tensor | None) -> dict[str, int]:
    return {name: address(t) for name, t in tensors.items()}


@dataclasses.dataclass
class Raw:
    """The module, the device whose memory the operands are in, and the stream."""

    module: Any
    device: Any
    stream: int = 0

    def dtype(self, t: torch.Tensor) -> Any:
        return getattr(self.module.DType, str(t.dtype).removeprefix("torch."))

    def run(self, problem: Any, like: torch.Tensor, **operands: Any) -> None:
        plan = self.module.plan(problem, self.device)
        memory = torch.empty(plan.workspace_bytes + 256, dtype=torch.uint8, device=like.device)
        workspace = address(memory) + -address(memory) % 256
        self.module.run(plan, **operands, workspace=workspace, stream=self.stream)

    def _lora(self, a: torch.Tensor) -> Any:
        rank = a.shape[0]
        return self.module.LoraShape(
            adapters=1, total_rank=rank, max_rank=rank, dtype=self.dtype(a)
        )

    @staticmethod
    def _bank(a: torch.Tensor, b: torch.Tensor) -> dict[str, int]:
        strides = {"a_stride": a.stride(0), "b_stride_rank": b.stride(0)}
        return {**addresses(lora_a=a, lora_b=b), **strides, "b_stride_out": b.stride(1)}

    def _linear(self, x: torch.Tensor, weight: torch.Tensor, a: torch.Tensor) -> dict[str, Any]:
        sizes = {"rows": x.shape[0], "in_features": x.shape[1], "out_features": weight.shape[0]}
        return {**sizes, "dtype": self.dtype(x), "lora": self._lora(a)}

    def lora_linear(
        self, x: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor
    ) -> torch.Tensor:
        y = x.new_empty(x.shape[0], weight.shape[0])
        strides = {"x_stride": x.stride(0), "weight_stride": weight.stride(0)}
        problem = self.module.LoraLinearProblem(**self._linear(x, weight, a))
        self.run(problem, x, **addresses(x=x, weight=weight, y=y), **strides, **self._bank(a, b))
        return y

    def lora_linear_backward(
        self,
        dy: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """dx, and fp32 gradients of A and B."""
        dx = torch.empty_like(x)
        da, db = (torch.empty(t.shape, device=x.device) for t in (a, b))
        forward = self.module.LoraLinearProblem(**self._linear(x, weight, a))
        problem = self.module.LoraLinearBackwardProblem(
            forward=forward, needs_dx=True, needs_dlora=True
        )
        strides = {"x_stride": x.stride(0), "weight_stride": weight.stride(0)}
        operands = addresses(dy=dy, x=x, weight=weight, dx=dx, dlora_a=da, dlora_b=db)
        self.run(problem, x, **operands, **strides, **self._bank(a, b))
        return dx, da, db

    def int8_lora_linear(
        self,
        x: torch.Tensor,
        packed_weight: torch.Tensor,
        out_features: int,
        a: torch.Tensor,
        b: torch.Tensor,
    ) -> torch.Tensor:
        y = x.new_empty(x.shape[0], out_features)
        problem = self.module.Int8LoraLinearProblem(
            rows=x.shape[0],
            in_features=x.shape[1],
            out_features=out_features,
            dtype=self.dtype(x),
            lora=self._lora(a),
        )
        operands = addresses(x=x, packed_weight=packed_weight, y=y)
        self.run(problem, x, **operands, x_stride=x.stride(0), **self._bank(a, b))
        return y

    def int8_unpack(
        self, packed_weight: torch.Tensor, out_features: int, in_features: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        weight = packed_weight.new_empty((out_features, in_features), dtype=torch.int8)
        scales = packed_weight.new_empty(out_features, dtype=torch.float32)
        self.module.int8_unpack(
            self.device,
            **addresses(packed=packed_weight, weight=weight, scales=scales),
            out_features=out_features,
            in_features=in_features,
            stream=self.stream,
        )
        return weight, scales

    def kv_pack(
        self, k: torch.Tensor, v: torch.Tensor, heads: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        rows, positions, columns = k.shape
        size = columns // heads
        key_bytes = self.module.kv_key_bytes(positions, size)
        value_bytes = self.module.kv_value_bytes(positions, size)
        packed_k = k.new_empty((rows, heads, key_bytes), dtype=torch.int8)
        packed_v = k.new_empty((rows, heads, value_bytes), dtype=torch.int8)
        k_scales, v_scales = (
            k.new_empty((rows, heads, 1, size), dtype=torch.float32) for _ in range(2)
        )
        problem = self.module.KvPackProblem(
            cache_rows=rows, positions=positions, heads=heads, head_size=size, dtype=self.dtype(k)
        )
        results = addresses(
            packed_k=packed_k, packed_v=packed_v, k_scales=k_scales, v_scales=v_scales
        )
        strides = {"k_stride": k.stride(1), "k_row_stride": k.stride(0)}
        strides |= {"v_stride": v.stride(1), "v_row_stride": v.stride(0)}
        self.run(problem, k, **addresses(k=k, v=v), **strides, **results)
        return packed_k, packed_v, k_scales, v_scales

    def kv_attention_step(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        lengths: torch.Tensor,
        k_scales: torch.Tensor | None = None,
        v_scales: torch.Tensor | None = None,
        slots: torch.Tensor | None = None,
        scale: float = 1.0,
        heads: list[int] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes a ``Step`` of attention_steps.py."""
        m = self.module
        rows, tokens, head_count, size = q.shape
        blocked = k_cache.dim() == 6
        capacity = 4 * v_cache.shape[2] if blocked else k_cache.shape[2]
        per_channel = k_scales is not None and k_scales.shape[2:] == (1, size)
        kinds = {
            "layout": m.KvLayout.blocked if blocked else m.KvLayout.row_major,
            "scales": m.KvScales.none
            if k_scales is None
            else m.KvScales.per_channel
            if per_channel
            else m.KvScales.per_position,
            "slots": m.KvSlots.identity
            if slots is None
            else m.KvSlots.per_row
            if slots.dim() == 1
            else m.KvSlots.per_position,
        }
        problem = m.KvAttentionStepProblem(
            rows=rows,
            tokens=tokens,
            heads=head_count,
            head_size=size,
            cache_rows=k_cache.shape[0],
            capacity=capacity,
            dtype=self.dtype(q),
            cache_dtype=self.dtype(k_cache),
            append=k is not None,
            weight_heads=len(heads or []),
            **kinds,
        )
        out = torch.empty_like(q)
        shape = (0,) if heads is None else (rows, len(heads), tokens, capacity)
        weights = q.new_empty(shape, dtype=torch.float32)
        operands = addresses(q=q, k=k, v=v, k_cache=k_cache, v_cache=v_cache, lengths=lengths)
        operands |= addresses(k_scales=k_scales, v_scales=v_scales, slots=slots, out=out)
        operands["weights"] = address(weights) if heads else 0
        self.run(problem, q, **operands, scale=scale, weight_heads=heads or [])
        return out, weights

    def kv_relative_step(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        positions: torch.Tensor,
        bias_u: torch.Tensor,
        bias_v: torch.Tensor,
        lengths: torch.Tensor,
        *,
        left: int,
        counts: torch.Tensor | None,
        slots: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        """Takes a ``Chunk`` of relative_steps.py."""
        rows, tokens, heads, size = q.shape
        problem = self.module.KvRelativeStepProblem(
            rows=rows,
            tokens=tokens,
            heads=heads,
            head_size=size,
            cache_rows=k_cache.shape[0],
            capacity=k_cache.shape[2],
            left=left,
            dtype=self.dtype(q),
            cache_dtype=self.dtype(k_cache),
            counts=counts is not None,
            slots=slots is not None,
        )
        out = torch.empty_like(q)
        operands = addresses(q=q, k=k, v=v, k_cache=k_cache, v_cache=v_cache, out=out)
        operands |= addresses(positions=positions, bias_u=bias_u, bias_v=bias_v, lengths=lengths)
        self.run(problem, q, **operands, **addresses(counts=counts, slots=slots), scale=scale)
        return out
