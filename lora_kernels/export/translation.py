"""How ``torch.onnx.export`` writes our operators: ``custom_translation_table=translations()``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ..errors import UnsupportedError
from . import functional as functional  # registers the operator that is translated here
from .nodes import ACTIVATIONS, PLUGIN_NAMESPACE, PLUGIN_VERSION, operator

_PLUGIN = {"plugin_version": PLUGIN_VERSION, "plugin_namespace": PLUGIN_NAMESPACE}
_FLOAT, _INT32 = 1, 6  # onnx.TensorProto.DataType


def _standard() -> Any:
    """The standard operators; imported when a model is exported, not before."""
    from onnxscript import opset18

    return opset18


def _constant(array: np.ndarray) -> Any:
    import onnx

    return _standard().Constant(value=onnx.numpy_helper.from_array(array))


def _zeros(*shape: int, dtype: type = np.float32) -> Any:
    return _constant(np.zeros(shape, dtype))


def _or_zero(operand: Any, dtype: int) -> Any:
    """An operand, or its placeholder in the given type."""
    return _standard().Cast(_zeros(1), to=dtype) if operand is None else operand


def _size(value: Any, dimension: int, operand: str) -> int:
    """A size that must be known when the model is written."""
    size = None if value.shape is None else value.shape[dimension]
    if not isinstance(size, int):
        raise UnsupportedError(
            f"{operand}: expected a fixed size of dimension {dimension}, got {size}; leave it out "
            "of dynamic_shapes"
        )
    return size


def _bank(
    lora_a: Any, lora_b: Any, scales: Any, offsets: Any, ids: Any, inputs: int, outputs: int
) -> list[Any]:
    """The five inputs of an adapter bank, with placeholders for what is not there."""
    op = _standard()
    if lora_a is None or lora_b is None:
        return [
            _zeros(1, inputs),
            _zeros(1, outputs),
            _zeros(1),
            _constant(np.array([0, 1], np.int32)),
            _constant(np.array([-1], np.int32)),
        ]
    if len(lora_b.shape) == 3:  # in blocks of outputs: [N64 / 64, R, 64]
        by_rank = op.Transpose(lora_b, perm=[1, 0, 2])
        rank_rows = op.Reshape(by_rank, [0, -1])
        lora_b = op.Slice(rank_rows, [0], [outputs], [1])
    if offsets is None:
        # One adapter of all rank rows.
        begin = _zeros(1, dtype=np.int32)
        offsets = op.Concat(begin, op.Cast(op.Shape(lora_a, end=1), to=_INT32), axis=0)
    if scales is None:
        adapters = op.Sub(op.Shape(offsets), [1])
        scales = op.Expand(1.0, adapters)
    return [lora_a, lora_b, scales, offsets, _zeros(1, dtype=np.int32) if ids is None else ids]


def _linear(
    x: Any,
    weight: Any,
    bias: Any,
    lora_a: Any,
    lora_b: Any,
    scales: Any,
    offsets: Any,
    adapter_ids: Any,
    residual: Any,
    activation: str,
    dropout_p: float,
    dropout_seed: Any = None,
    max_rank: int = 0,
) -> Any:
    if dropout_p:
        raise UnsupportedError(
            f"dropout_p: expected 0 in an exported model, got {dropout_p}; call model.eval() "
            "before exporting"
        )
    sizes = (_size(weight, 1, "weight"), _size(weight, 0, "weight"))
    bank = _bank(lora_a, lora_b, scales, offsets, adapter_ids, *sizes)
    return operator("LoraLinear" + ACTIVATIONS[activation])(
        x,
        weight,
        _or_zero(bias, int(x.dtype)),
        *bank,
        _or_zero(residual, int(x.dtype)),
        has_bias=int(bias is not None),
        has_lora=int(lora_a is not None),
        has_residual=int(residual is not None),
        **_PLUGIN,
    )


def _int8_linear(
    x: Any,
    packed_weight: Any,
    out_features: int,
    bias: Any,
    lora_a: Any,
    lora_b: Any,
    scales: Any,
    offsets: Any,
    adapter_ids: Any,
    residual: Any,
    activation: str,
    x_scale: Any,
    norm_weight: Any = None,
    norm_bias: Any = None,
    norm_eps: float = 1e-5,
    max_rank: int = 0,
) -> Any:
    op = _standard()
    inputs, dtype = _size(x, -1, "x"), int(x.dtype)
    kind = dtype
    if norm_weight is not None:
        # quantization and LoRA see the normalized rows in fp32; only the result is rounded
        kind = _FLOAT
        factors = (op.Cast(factor, to=kind) for factor in (norm_weight, norm_bias))
        x = op.LayerNormalization(op.Cast(x, to=kind), *factors, epsilon=norm_eps)[0]
        residual = None if residual is None else op.Cast(residual, to=kind)
        bias = None if bias is None else op.Cast(bias, to=kind)
    y = operator("Int8LoraLinear" + ACTIVATIONS[activation])(
        x,
        packed_weight,  # bytes, and no scales yet: finish() makes words of them
        _zeros(out_features),
        _or_zero(bias, kind),
        *_bank(lora_a, lora_b, scales, offsets, adapter_ids, inputs, out_features),
        _or_zero(residual, kind),
        _or_zero(x_scale, _FLOAT),
        has_bias=int(bias is not None),
        has_lora=int(lora_a is not None),
        has_residual=int(residual is not None),
        has_x_scale=int(x_scale is not None),
        **_PLUGIN,
    )
    return y if kind == dtype else op.Cast(y, to=dtype)


def _kv(
    q: Any,
    k: Any,
    v: Any,
    k_cache: Any,
    v_cache: Any,
    k_scales: Any,
    v_scales: Any,
    lengths: Any,
    slots: Any,
    scale: float,
) -> Any:
    op = _standard()
    if len(k_cache.shape) != 4:
        raise UnsupportedError(
            f"k_cache: expected [S, H, C, D] in an exported model, got {len(k_cache.shape)} "
            "dimensions; export with caches that kv_pack has not packed"
        )
    has_slots = slots is not None
    if slots is None:  # row i in cache row i
        rows = op.Squeeze(op.Shape(q, end=1))
        slots = op.Cast(op.Range(0, rows, 1), to=_INT32)
    if not has_slots or len(slots.shape) == 1:
        slots = op.Unsqueeze(slots, [1])
    elif k is None:
        raise UnsupportedError(
            "slots: expected [rows] where nothing is appended, got a slot per position; leave the "
            "cache in place and pass one slot per row"
        )
    name = "KvAttention" + ("Fixed" if k is None else "Step") + ("" if k_scales is None else "Int8")
    new = () if k is None else (k, v)
    factors = () if k_scales is None else (k_scales, v_scales)
    results = operator(name)(
        q,
        *new,
        k_cache,
        v_cache,
        *factors,
        lengths,
        slots,
        has_slots=int(has_slots),
        scale=float(scale),
        **_PLUGIN,
    )
    return [results] if k is None else list(results)


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """For the argument ``custom_translation_table`` of ``torch.onnx.export``.

    ``ops.lora_linear``, ``ops.int8_lora_linear`` and :func:`~lora_kernels.export.kv_attention_step`
    become nodes of the domain ``lora_kernels``; what comes out of the exporter goes through
    :func:`~lora_kernels.export.finish`. A ``lora_linear`` with dropout, a blocked cache, and a slot
    per position where nothing is appended raise ``UnsupportedError``.
    """
    return {
        torch.ops.lora_kernels.lora_linear.default: _linear,
        torch.ops.lora_kernels.int8_lora_linear.default: _int8_linear,
        torch.ops.lora_kernels.kv_attention_step_functional.default: _kv,
    }
