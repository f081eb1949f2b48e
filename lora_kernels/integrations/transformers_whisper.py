"""The cached step of transformers' ``WhisperAttention``, through ``kv_attention_step``.

The decoder's attention modules keep their forward for everything but single steps over a dynamic
cache: the prefill, training, returned attention weights, static caches and padded prompts go the
way they went before. Beside INT8 projections the keys and values of cross-attention are packed in
INT8, once per utterance, at the first step that reads them.
"""

from __future__ import annotations

import weakref
from types import MethodType
from typing import Any

import torch
from torch import nn

from ..nn.int8_lora_linear import Int8LoraLinear
from .peft_layers import has_foreign_forward

_MARK = "_lora_kernels_cached_step"


def is_whisper_attention(module: nn.Module) -> bool:
    """Whether a module is transformers' ``WhisperAttention`` (without importing transformers)."""
    cls = type(module)
    return cls.__name__ == "WhisperAttention" and cls.__module__.startswith("transformers.")


def static_reasons(module: nn.Module) -> list[str]:
    """Every reason why an attention module keeps its forward."""
    reasons = []
    if not getattr(module, "is_decoder", False):
        reasons.append("the encoder's attention has no cache")
    if getattr(module, "layer_idx", None) is None:
        reasons.append("it has no layer_idx")
    if has_foreign_forward(module) and not is_swapped(module):
        reasons.append("its forward was replaced by someone else")
    return reasons


# The last mask looked at: every layer of a step gets the same object.
_LAST_MASK: tuple[weakref.ref[torch.Tensor], int, bool] | None = None


def _all_visible(mask: torch.Tensor) -> bool:
    """Whether an attention mask (bool, or additive) hides nothing."""
    global _LAST_MASK
    last = _LAST_MASK
    # Inference tensors keep no count of changes in place: those are looked at every time.
    version = -1 if mask.is_inference() else mask._version
    if last is not None and last[0]() is mask and last[1] == version >= 0:
        return last[2]
    visible = bool(mask.all()) if mask.dtype == torch.bool else bool((mask >= 0).all())
    _LAST_MASK = (weakref.ref(mask), version, visible)
    return visible


def _cache_layer(layers: list[Any], index: int, *, fixed: bool, packed: bool) -> Any:
    """The :class:`KVCache` of a layer, taken over from transformers' layer at its first step."""
    from transformers.cache_utils import DynamicLayer

    from .transformers_cache import KVCacheLayer

    if index >= len(layers):
        return None
    layer = layers[index]
    if type(layer) is KVCacheLayer:
        return layer.cache
    if type(layer) is not DynamicLayer or layer.get_seq_length() == 0:
        return None
    layers[index] = KVCacheLayer.from_layer(layer, fixed=fixed, packed=packed)
    return layers[index].cache


def _step_cache(
    attention: Any,
    hidden_states: torch.Tensor,
    cross: bool,
    past: Any,
    mask: torch.Tensor | None,
    output_attentions: bool,
) -> Any:
    """The cache of a step that the operator can do, or None."""
    if past is None or output_attentions or torch.is_grad_enabled():
        return None
    if not cross and hidden_states.shape[1] != 1:
        return None
    updated = getattr(past, "is_updated", None)
    if updated is None or torch.compiler.is_compiling():
        return None
    if getattr(attention.config, "_output_attentions", False):
        return None
    if mask is not None and not _all_visible(mask):
        return None
    index = attention.layer_idx
    if cross:
        layers = past.cross_attention_cache.layers if updated.get(index) else []
    else:
        layers = past.self_attention_cache.layers
    # The usual case first, without the imports of the first step.
    layer = layers[index] if index < len(layers) else None
    cache = getattr(layer, "cache", None)
    if cache is None:
        # Beside INT8 projections, keys and values that were made by them are INT8 too.
        packed = cross and isinstance(attention.k_proj, Int8LoraLinear)
        cache = _cache_layer(layers, index, fixed=cross, packed=packed)
    if cache is None or cache.rows != hidden_states.shape[0]:
        return None
    return cache


def _forward(
    self: Any,
    hidden_states: torch.Tensor,
    key_value_states: torch.Tensor | None = None,
    past: Any = None,
    attention_mask: torch.Tensor | None = None,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    # By name it is `cache` since transformers 5.24 and was `past_key_values` before; by place it
    # is the third in all of them.
    for name in ("cache", "past_key_values"):
        past = kwargs.pop(name, past)
    cross = key_value_states is not None
    cache = _step_cache(self, hidden_states, cross, past, attention_mask, output_attentions)
    if cache is None:
        return type(self).forward(  # type: ignore[no-any-return]
            self,
            hidden_states,
            key_value_states,
            past,
            attention_mask=attention_mask,
            output_attentions=output_attentions,
            **kwargs,
        )
    rows, tokens, _ = hidden_states.shape
    shape = (rows, tokens, self.num_heads, self.head_dim)
    q = self.q_proj(hidden_states).view(shape)
    k = v = None
    if not cross:
        k = self.k_proj(hidden_states).view(shape)
        v = self.v_proj(hidden_states).view(shape)
    # transformers scales q before the product; the operator scales the fp32 scores.
    out, _ = cache.step(q, k, v, scale=self.scaling)
    return self.out_proj(out.view(rows, tokens, -1)), None


# A pickled instance finds its forward by this name, which is transformers' own until swapped again.
_forward.__name__ = "forward"


def swap_attention(module: nn.Module) -> None:
    """Replace the instance's forward; :func:`static_reasons` must be empty."""
    module.__dict__[_MARK] = True
    module.__dict__["forward"] = MethodType(_forward, module)


def is_swapped(module: nn.Module) -> bool:
    """Whether :func:`swap_attention` replaced this instance's forward."""
    return getattr(module.__dict__.get("forward"), "__func__", None) is _forward


def unswap_attention(module: nn.Module) -> bool:
    """Give transformers' forward back; returns whether it had been replaced."""
    if not module.__dict__.pop(_MARK, False):
        return False
    module.__dict__.pop("forward", None)
    return True
