"""One adapter in memory: per module A, B and a scale, with the PEFT configuration it came with."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch

from ..errors import AdapterError

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class AdapterLayer:
    """The LoRA of one module: ``delta W = scale * B A``.

    Attributes
    ----------
    lora_a
        PEFT's ``lora_A.weight``: [r, K], or [r, K, 1] for a pointwise convolution.
    lora_b
        PEFT's ``lora_B.weight``: [N, r], or [N, r, 1].
    scale
        ``alpha / r``, or ``alpha / sqrt(r)`` for rsLoRA.
    """

    lora_a: torch.Tensor
    lora_b: torch.Tensor
    scale: float

    @property
    def rank(self) -> int:
        """Number of rank rows r."""
        return int(self.lora_a.shape[0])

    @property
    def in_features(self) -> int:
        """K."""
        return int(self.lora_a.shape[1])

    @property
    def out_features(self) -> int:
        """N."""
        return int(self.lora_b.shape[0])

    @property
    def a_matrix(self) -> torch.Tensor:
        """``lora_a`` as [r, K] (a view)."""
        return self.lora_a.reshape(self.rank, self.in_features)

    @property
    def b_matrix(self) -> torch.Tensor:
        """``lora_b`` as [N, r] (a view)."""
        return self.lora_b.reshape(self.out_features, self.rank)

    def delta_weight(self) -> torch.Tensor:
        """``scale * B A`` in fp32, [N, K]."""
        return (self.b_matrix.float() @ self.a_matrix.float()) * self.scale


def check_layer(name: str, layer: AdapterLayer) -> list[str]:
    """Every reason why a layer cannot be used, each naming the tensor, expected, got and fix."""
    reasons = []
    for label, tensor in (("lora_A", layer.lora_a), ("lora_B", layer.lora_b)):
        where = f"{name}.{label}.weight"
        if tensor.dtype not in FLOAT_DTYPES:
            reasons.append(
                f"{where}: expected float32, float16 or bfloat16, got {tensor.dtype}; "
                "convert the adapter and save it again"
            )
        elif not bool(torch.isfinite(tensor).all()):
            reasons.append(
                f"{where}: expected finite values, got NaN or infinity; the training diverged, "
                "use an earlier checkpoint"
            )
        kernel_one = tensor.dim() == 3 and tensor.shape[2] == 1
        if tensor.dim() != 2 and not kernel_one:
            reasons.append(
                f"{where}: expected a matrix (or a convolution of kernel size 1), got shape "
                f"{tuple(tensor.shape)}; this module can be merged with PEFT but not served live"
            )
    if reasons:
        return reasons
    if layer.lora_b.shape[1] != layer.lora_a.shape[0]:
        reasons.append(
            f"{name}: expected lora_A [r, in] and lora_B [out, r] of one rank, got "
            f"{tuple(layer.lora_a.shape)} and {tuple(layer.lora_b.shape)}; the file is damaged or "
            "was edited by hand, save the adapter again"
        )
    if layer.lora_a.dtype != layer.lora_b.dtype:
        reasons.append(
            f"{name}: expected lora_A and lora_B of one dtype, got {layer.lora_a.dtype} and "
            f"{layer.lora_b.dtype}; save both in the same dtype"
        )
    if not math.isfinite(layer.scale):
        reasons.append(
            f"{name}: expected a finite scale, got {layer.scale}; check lora_alpha, alpha_pattern"
        )
    return reasons


@dataclass(frozen=True, eq=False)
class Adapter:
    """An immutable adapter: what one PEFT folder holds.

    Attributes
    ----------
    layers
        Module name (relative to the base model, as ``named_modules`` gives it) to its LoRA.
    config
        The fields of ``adapter_config.json``, kept as they were read so that writing them gives
        the same bytes.

    Raises
    ------
    AdapterError
        If there is no layer, or a layer's shapes, dtypes or values cannot be used.
    """

    layers: Mapping[str, AdapterLayer]
    config: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.layers:
            raise AdapterError(
                "adapter: expected at least one module with LoRA weights, got none; check that "
                "the adapter was saved after get_peft_model() and that target_modules matched"
            )
        reasons = [r for name, layer in self.layers.items() for r in check_layer(name, layer)]
        if reasons:
            more = f"\n  and {len(reasons) - 8} more" if len(reasons) > 8 else ""
            raise AdapterError("adapter is unusable:\n  " + "\n  ".join(reasons[:8]) + more)
        object.__setattr__(self, "layers", MappingProxyType(dict(self.layers)))
        object.__setattr__(self, "config", MappingProxyType(dict(self.config)))

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __reduce__(self) -> tuple[Any, ...]:
        # Mapping proxies neither copy nor pickle; plain dicts do.
        return (Adapter, (dict(self.layers), dict(self.config)))

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of each module's LoRA."""
        return {name: layer.rank for name, layer in self.layers.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all A and B."""
        return sum(
            t.numel() * t.element_size()
            for layer in self.layers.values()
            for t in (layer.lora_a, layer.lora_b)
        )

    @cached_property
    def content_hash(self) -> str:
        """sha256 (hex) of everything that changes an output: names, scales, A and B.

        Caches of encoder outputs and cross-attention keys are keyed by it. Fields of the
        configuration that change nothing at inference (dropout, the base model's path) are
        left out, so that equal adapters share their cache entries.
        """
        digest = hashlib.sha256()
        for name in sorted(self.layers):
            layer = self.layers[name]
            digest.update(f"{name}\0{float(layer.scale).hex()}\0".encode())
            for tensor in (layer.lora_a, layer.lora_b):
                tensor = tensor.detach().cpu().contiguous()
                digest.update(f"{tensor.dtype}{tuple(tensor.shape)}\0".encode())
                digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
        *,
        alpha: float | Mapping[str, float] | None = None,
        use_rslora: bool = False,
        base_model: str | None = None,
    ) -> Adapter:
        """Build an adapter from A and B, with a configuration that PEFT loads.

        Parameters
        ----------
        tensors
            Module name to (A [r, K], B [N, r]).
        alpha
            LoRA's alpha, for all modules or per module; None makes every scale 1.
        use_rslora
            Divide alpha by sqrt(r) instead of r.
        base_model
            Written to ``base_model_name_or_path``.

        Returns
        -------
        Adapter
        """
        ranks = {name: int(a.shape[0]) for name, (a, _) in tensors.items()}

        def divisor(rank: int) -> float:
            return math.sqrt(rank) if use_rslora else float(rank)

        alphas: dict[str, float] = {}
        for name, rank in ranks.items():
            if isinstance(alpha, Mapping):
                alphas[name] = alpha[name]
            else:
                value = divisor(rank) if alpha is None else alpha
                alphas[name] = int(value) if float(value).is_integer() else value
        common_rank = max(ranks.values(), default=8, key=list(ranks.values()).count)
        common_alpha = max(alphas.values(), default=8, key=list(alphas.values()).count)
        config: dict[str, Any] = {
            "peft_type": "LORA",
            "r": common_rank,
            "lora_alpha": common_alpha,
            "target_modules": sorted(ranks),
            "use_rslora": use_rslora,
            "rank_pattern": {
                f"^{name.replace('.', '[.]')}": r for name, r in ranks.items() if r != common_rank
            },
            "alpha_pattern": {
                f"^{name.replace('.', '[.]')}": a for name, a in alphas.items() if a != common_alpha
            },
            "base_model_name_or_path": base_model,
            "bias": "none",
            "inference_mode": True,
            "lora_dropout": 0.0,
        }
        layers = {
            name: AdapterLayer(a, b, alphas[name] / divisor(ranks[name]) if ranks[name] else 1.0)
            for name, (a, b) in tensors.items()
        }
        return cls(layers, config)
