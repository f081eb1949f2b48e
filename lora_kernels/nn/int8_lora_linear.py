"""A linear layer with INT8 weights and live adapters, through ``int8_lora_linear``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .. import ops
from ..adapters.registry import ACTIVE_SELECTION
from ..errors import LoraKernelsError
from .adapter_host import AdapterHost, autocast_dtype
from .int8_rows import quantize_weight
from .lora_linear import is_pointwise


class Int8LoraLinear(AdapterHost):
    """``act((q_x q_wᵀ) s_x s_w + bias + s (x At) B) + residual`` with W in INT8.

    Weights are symmetric per output channel; inputs are quantized per row as they come (or by
    ``x_scale``, a calibrated scale). LoRA, bias, activation and residual stay in floating point,
    with A and B kept in bf16 and sums in fp32.

    ``state_dict()`` holds ``weight`` (int8 [N, K]) and ``weight_scales`` (fp32 [N]), which mean
    the same on every machine; the packed bytes that the operator reads are derived from them.

    Parameters
    ----------
    q_weight
        int8 [N, K] in [-127, 127].
    weight_scales
        fp32 [N].
    bias
        [N] or None; a Parameter is shared, not copied.
    x_scale
        fp32 [1] for static quantization, None for dynamic.
    activation
        ``none``, ``gelu`` or ``silu``.
    """

    # Read with the weights at every step of a decoder: 16 bits lose far less than INT8 has lost.
    adapter_dtype = torch.bfloat16
    blocked_adapters = True

    packed_weight: torch.Tensor
    x_scale: torch.Tensor | None

    def __init__(
        self,
        q_weight: torch.Tensor,
        weight_scales: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        x_scale: torch.Tensor | None = None,
        activation: str = "none",
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = (int(size) for size in q_weight.shape)
        self.activation = activation
        packed = ops.int8_pack(q_weight, weight_scales)
        self.register_buffer("packed_weight", packed, persistent=False)
        self.register_buffer("x_scale", x_scale)
        if bias is None or isinstance(bias, nn.Parameter):
            self.register_parameter("bias", bias)
        else:
            self.bias = nn.Parameter(bias, requires_grad=False)

    @classmethod
    def from_linear(cls, linear: nn.Linear | nn.Conv1d, **kwargs: Any) -> Int8LoraLinear:
        """Quantize a linear layer or pointwise convolution, sharing its bias.

        Raises
        ------
        LoraKernelsError
            If the convolution is not pointwise, or the weight holds a NaN or an infinity.
        """
        weight = linear.weight.detach()
        if isinstance(linear, nn.Conv1d):
            if not is_pointwise(linear):
                raise LoraKernelsError(
                    f"linear: expected a convolution of kernel size 1, stride 1 and one group, got "
                    f"{linear}; leave it in floating point"
                )
            weight = weight.squeeze(-1)
        q_weight, scales = quantize_weight(weight)
        module = cls(q_weight, scales, linear.bias, **kwargs)
        module.train(linear.training)
        return module

    @property
    def adapter_device(self) -> torch.device:
        """Where the packed weight lives."""
        return self.packed_weight.device

    @property
    def weight(self) -> torch.Tensor:
        """The weight the layer computes with, fp32 [N, K] (dequantized anew at each access)."""
        q, scales = self.quantized_weight()
        return q.to(torch.float32) * scales.unsqueeze(1)

    def quantized_weight(self) -> tuple[torch.Tensor, torch.Tensor]:
        """int8 [N, K] and fp32 scales [N], unpacked."""
        return ops.int8_unpack(self.packed_weight, self.out_features, self.in_features)

    def _linear(
        self, x: torch.Tensor, batch: int, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The operator over [..., K] for ``batch`` sequences."""
        bias: torch.Tensor | None = self.bias
        registry, bank, ids = self._registry, None, None
        # Without adapters no context variable is read: torch.compile cannot trace one.
        selection = None if registry is None else ACTIVE_SELECTION.get()
        if registry is not None and selection is not None:
            ids = selection.ids(registry, x, batch)
            bank = self.bank_for(selection)
        dtype = autocast_dtype(x)
        if dtype is not None:
            x = x.to(dtype)
            residual = residual if residual is None else residual.to(dtype)
        if bias is not None and bias.dtype not in (x.dtype, torch.float32):
            bias = bias.to(x.dtype)
        if bank is None or ids is None:
            return ops.int8_lora_linear(
                x,
                self.packed_weight,
                self.out_features,
                bias,
                residual=residual,
                activation=self.activation,
                x_scale=self.x_scale,
            )
        return ops.int8_lora_linear(
            x,
            self.packed_weight,
            self.out_features,
            bias,
            lora_a=bank.lora_a,
            lora_b=bank.lora_b,
            scales=bank.scales,
            offsets=bank.offsets,
            adapter_ids=ids,
            max_rank=bank.max_rank,
            residual=residual,
            activation=self.activation,
            x_scale=self.x_scale,
        )

    def forward(self, input: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Apply the layer to [..., K]; ``residual`` [..., N] is added after the activation."""
        return self._linear(input, input.shape[0] if input.dim() > 1 else 1, residual)

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        result = super()._apply(fn, *args, **kwargs)
        # half() and bfloat16() cast every floating buffer, and a calibrated scale must stay fp32.
        if self.x_scale is not None:
            self.x_scale = self.x_scale.float()
        return result

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[no-untyped-call]
        q, scales = self.quantized_weight()
        destination[prefix + "weight"] = q
        destination[prefix + "weight_scales"] = scales

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = {prefix + "weight", prefix + "weight_scales"}
        present = own & state_dict.keys()
        rest = {key: value for key, value in state_dict.items() if key not in own}
        super()._load_from_state_dict(  # type: ignore[no-untyped-call]
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        missing_keys.extend(sorted(own - present) if strict else [])
        if present != own:
            return
        q, scales = state_dict[prefix + "weight"], state_dict[prefix + "weight_scales"]
        expected = (self.out_features, self.in_features)
        if tuple(q.shape) != expected or q.dtype != torch.int8:
            error_msgs.append(
                f"{prefix}weight: expected int8 {expected}, got {q.dtype} {tuple(q.shape)}; "
                "load a checkpoint that was saved after quantize()"
            )
            return
        packed = ops.int8_pack(q.contiguous(), scales.float())
        self.packed_weight = packed.to(self.packed_weight.device)

    def extra_repr(self) -> str:
        """Sizes, scheme and the ranks of the live adapters."""
        scheme = "dynamic" if self.x_scale is None else "static"
        ranks = f", ranks={list(self._bank.ranks)}" if self._bank is not None else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {scheme}{ranks}"
        )


class Int8LoraPointwiseConv1d(Int8LoraLinear):
    """:class:`Int8LoraLinear` over the channels of [batch, channels, frames]."""

    def forward(self, input: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Convolve [batch, in_channels, frames] (or [in_channels, frames])."""
        batch = input.shape[0] if input.dim() == 3 else 1
        residual = None if residual is None else residual.transpose(-1, -2)
        y = self._linear(input.transpose(-1, -2), batch, residual)
        return y.transpose(-1, -2)

    @property
    def weight(self) -> torch.Tensor:
        """The weight the layer computes with, fp32 [out_channels, in_channels, 1]."""
        return super().weight.unsqueeze(-1)
