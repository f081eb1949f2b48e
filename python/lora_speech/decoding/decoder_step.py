"""Whisper's decoder step under INT8, recorded once and run in one call per token.

Everything of a step but the lookup of the embedding is operators of `lora_kernels`: LayerNorm and
the quantization that follows are prologues of the projections, GELU and residuals their
epilogues, the choice of tokens the epilogue of the vocabulary's. What is left around them is one
call, where a flat loop over the same operators makes about ten per layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from lora_speech.decoding.adapter_rows import AdapterRows
from lora_speech.decoding.linear_parts import LinearParts, linear_parts
from lora_speech.decoding.recorded_parts import (
    Norm,
    has_gelu,
    norm_of,
    packed_once,
    record_linear,
    screen_once,
)

Head = Literal["choice", "candidates", "logits"]


@dataclass(frozen=True)
class LayerParts:
    """One decoder layer: its linears with INT8 weights, and its norms."""

    norms: tuple[Norm, Norm, Norm]
    q: LinearParts
    k: LinearParts
    v: LinearParts
    out: LinearParts
    cross_q: LinearParts
    cross_k: LinearParts
    cross_v: LinearParts
    cross_out: LinearParts
    fc1: LinearParts
    fc2: LinearParts
    heads: int
    scaling: float


@dataclass(frozen=True)
class DecoderParts:
    """What a recorded step of one Whisper is made of.

    Attributes
    ----------
    embedding, positions : Tensor
        [vocabulary, width] and [positions, width].
    layers : list of LayerParts
    norm : tuple
        Weight, bias and epsilon of the last layer norm.
    vocabulary : Tensor
        The vocabulary's projection, packed INT8.
    screen : Tensor or None
        Its screen, which halves the bytes of a choice, on a CPU where it is large enough.
    words : Tensor
        The same as it was, [vocabulary, width].
    """

    embedding: torch.Tensor
    positions: torch.Tensor
    layers: list[LayerParts]
    norm: Norm
    vocabulary: torch.Tensor
    screen: torch.Tensor | None
    words: torch.Tensor

    @classmethod
    def of(cls, whisper: Any) -> DecoderParts | None:
        """Take a Whisper's decoder apart; None unless its layers are INT8, with GELU."""
        decoder = whisper.model.decoder
        layers = []
        for layer in decoder.layers:
            own, cross = layer.self_attn, layer.encoder_attn
            modules = {
                "q": own.q_proj,
                "k": own.k_proj,
                "v": own.v_proj,
                "out": own.out_proj,
                "cross_q": cross.q_proj,
                "cross_k": cross.k_proj,
                "cross_v": cross.v_proj,
                "cross_out": cross.out_proj,
                "fc1": layer.fc1,
                "fc2": layer.fc2,
            }
            parts = {name: linear_parts(module) for name, module in modules.items()}
            if not has_gelu(layer) or any(p is None or not p.packed for p in parts.values()):
                return None
            norms = (
                norm_of(layer.self_attn_layer_norm),
                norm_of(layer.encoder_attn_layer_norm),
                norm_of(layer.final_layer_norm),
            )
            linears: dict[str, Any] = parts
            layers.append(LayerParts(norms, **linears, heads=own.num_heads, scaling=own.scaling))
        words = linear_parts(whisper.proj_out)
        if words is None or words.packed or words.lora or words.bias is not None:
            return None
        vocabulary = packed_once(whisper.proj_out)
        return cls(
            decoder.embed_tokens.weight,
            decoder.embed_positions.weight,
            layers,
            norm_of(decoder.layer_norm),
            vocabulary,
            screen_once(whisper.proj_out, vocabulary),
            whisper.proj_out.weight,
        )

    def identity(self) -> tuple[int, ...]:
        """Of parts that live at the same time, equal for those made of the same tensors."""
        found: list[Any] = [self.embedding, self.positions, self.vocabulary, self.screen]
        norms = [self.norm, *(norm for layer in self.layers for norm in layer.norms)]
        found += [tensor for weight, bias, _ in norms for tensor in (weight, bias)]
        for layer in self.layers:
            for part in vars(layer).values():
                if isinstance(part, LinearParts):
                    found += (part.weight, part.bias, part.x_scale, *(part.lora or ()))
        return tuple(map(id, found))

    def packed_words(self, ids: Sequence[int]) -> tuple[torch.Tensor, int]:
        """Pack some rows of the vocabulary's projection alone; return them and how many."""
        from lora_kernels.nn.int8_rows import quantize_weight
        from lora_kernels.ops import int8_pack

        return int8_pack(*quantize_weight(self.words[sorted(set(ids))])), len(set(ids))


def pack_cross_attention(
    parts: DecoderParts, encoded: torch.Tensor, rows: AdapterRows
) -> list[tuple[torch.Tensor, ...]]:
    """Keys and values of cross-attention, as a step reads them.

    Parameters
    ----------
    parts : DecoderParts
    encoded : Tensor
        [utterances, frames, width], the encoder's output.
    rows : AdapterRows
        Adapters of the utterances.

    Returns
    -------
    list of tuple
        Per layer, what `kv_pack` makes of them.
    """
    from lora_kernels.ops import Composite, kv_pack

    encoded = encoded.contiguous()
    # One layer's at a time, in the same memory: fresh memory costs as much as computing it.
    k, v = torch.empty_like(encoded), torch.empty_like(encoded)
    composite = Composite()
    packed: list[tuple[torch.Tensor, ...]] = []
    for layer in parts.layers:
        for part, out in ((layer.cross_k, k), (layer.cross_v, v)):
            record_linear(composite, encoded, part, rows.ids, out)
        like = packed[0] if packed else kv_pack(k.zero_(), v.zero_(), layer.heads)
        keys, values, k_scales, v_scales = (torch.empty_like(t) for t in like)
        packed.append((keys, values, k_scales, v_scales))
        composite.kv_pack(k, v, layer.heads, out=(keys, values, k_scales, v_scales))
    composite.run()
    return packed


class RecordedStep:
    """A decoder step for fixed rows and a fixed number of new tokens.

    Parameters
    ----------
    parts : DecoderParts
    self_cache : sequence of (keys, values)
        Per layer, [utterances, heads, positions, head size]; extended in place.
    cross_cache : sequence of tuple
        Per layer, what `kv_pack` made of cross-attention's keys and values.
    rows : AdapterRows
        Adapters of the rows as they are now.
    slots : Tensor or None
        int32 [rows], cache row of each row, or [rows, positions], of each of its positions.
    cross_slots : Tensor or None
        int32 [rows], utterance of each row.
    cross_lengths : Tensor
        int32 [rows], frames of each row's utterance.
    count : int
        New tokens per row.
    head : {"choice", "candidates", "logits"}
        What :meth:`run` returns of each row's last token.
    bias : Tensor or None
        fp32 [vocabulary], added to the logits; read anew at every run.
    candidates : int
        How many the head "candidates" finds.
    left_out : (Tensor, int) or None
        The rows of the vocabulary that `bias` takes out, packed INT8, and how many: the head
        "candidates" counts their share of the probabilities all the same.

    Attributes
    ----------
    values : Tensor
        Of the head "candidates": fp32 [rows, candidates], their logits.
    log_sums : tuple of Tensor
        Of the head "candidates": fp32 [rows, 1], the logarithm of the sum of the exponentials of
        what `bias` left in, and of what it took out.
    """

    def __init__(
        self,
        parts: DecoderParts,
        self_cache: Sequence[tuple[torch.Tensor, torch.Tensor]],
        cross_cache: Sequence[tuple[torch.Tensor, ...]],
        rows: AdapterRows,
        slots: torch.Tensor | None,
        cross_slots: torch.Tensor | None,
        cross_lengths: torch.Tensor,
        count: int,
        head: Head,
        bias: torch.Tensor | None,
        candidates: int = 1,
        left_out: tuple[torch.Tensor, int] | None = None,
    ) -> None:
        from lora_kernels.ops import Composite

        self.parts, self.count = parts, count
        batch, device = cross_lengths.shape[0], cross_lengths.device
        width = parts.embedding.shape[1]
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self.x = parts.embedding.new_empty(batch * count, width)
        self._x3 = self.x.view(batch, count, width)
        self._composite = step = Composite()
        x = self._x3
        normal, attended = torch.empty_like(x), torch.empty_like(x)

        def linear(
            x: torch.Tensor, part: LinearParts, out: torch.Tensor, **extra: Any
        ) -> torch.Tensor:
            return record_linear(step, x, part, rows.ids, out, **extra)

        for layer, own, cross in zip(parts.layers, self_cache, cross_cache, strict=True):
            first, second, third = layer.norms
            shape = (batch, count, layer.heads, width // layer.heads)
            q, k, v = (
                linear(x, part, torch.empty_like(x), norm=first).view(shape)
                for part in (layer.q, layer.k, layer.v)
            )
            out = attended.view(shape)
            step.kv_attention_step(
                q, k, v, *own, self.lengths, slots=slots, scale=layer.scaling, out=out
            )
            linear(attended, layer.out, x, residual=x)
            linear(x, layer.cross_q, normal, norm=second)
            keys, values, k_scales, v_scales = cross
            step.kv_attention_step(
                normal.view(shape), None, None, keys, values, cross_lengths, k_scales=k_scales,
                v_scales=v_scales, slots=cross_slots, scale=layer.scaling, out=out,
            )  # fmt: skip
            linear(attended, layer.cross_out, x, residual=x)
            hidden = x.new_empty(batch, count, layer.fc1.out_features)
            linear(x, layer.fc1, hidden, norm=third, activation="gelu")
            linear(hidden, layer.fc2, x, residual=x)

        words = parts.embedding.shape[0]
        last = self.x[count - 1 :: count]
        vocabulary = (last, parts.vocabulary, words, bias)
        if head == "logits":
            self.result = x.new_empty(batch, words)
            step.int8_lora_linear(*vocabulary, norm=parts.norm, out=self.result)
            return
        self.values = torch.empty(batch, candidates, device=device)
        self.result = torch.empty(batch, candidates, dtype=torch.int64, device=device)
        log_sums = torch.full((2, batch, 1), -math.inf, device=device)
        self.log_sums = log_sums[0], log_sums[1]
        step.int8_lora_topk(
            *vocabulary, norm=parts.norm, values=self.values, columns=self.result,
            log_sum=self.log_sums[0] if head == "candidates" else None,
            screen=parts.screen if head == "choice" else None,
        )  # fmt: skip
        if head == "candidates" and left_out is not None:
            largest = self.values.new_empty(batch, 1), self.result.new_empty(batch, 1)
            step.int8_lora_topk(
                last, *left_out, norm=parts.norm, values=largest[0], columns=largest[1],
                log_sum=self.log_sums[1],
            )  # fmt: skip

    def run(self, tokens: torch.Tensor, begin: int) -> torch.Tensor:
        """Run the step.

        Parameters
        ----------
        tokens : Tensor
            int64 [rows, count].
        begin : int
            Position of the first of them.

        Returns
        -------
        Tensor
            The step's own, overwritten by the next run: the likeliest next tokens, int64 [rows, 1]
            or [rows, candidates], or the logits [rows, vocabulary].
        """
        torch.index_select(self.parts.embedding, 0, tokens.view(-1), out=self.x)
        self._x3 += self.parts.positions[begin : begin + self.count]
        self.lengths.fill_(begin)
        self._composite.run()
        return self.result

    def run_at(self, tokens: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """:meth:`run` for one token per row, at a place that is in the device's memory.

        Nothing of it depends on values that the host knows: a CUDA graph may hold it.

        Parameters
        ----------
        tokens : Tensor
            int64 [rows].
        position : Tensor
            int64 [1], the same for all rows.
        """
        torch.index_select(self.parts.embedding, 0, tokens, out=self.x)
        self._x3 += self.parts.positions.index_select(0, position)
        self.lengths.copy_(position.expand_as(self.lengths))
        self._composite.run()
        return self.result


def suppressing_bias(
    suppressed: Sequence[int], words: int, device: torch.device | None = None
) -> torch.Tensor:
    """Bias that takes tokens out of the choice: fp32 [words], minus infinity at `suppressed`."""
    bias = torch.zeros(words)
    bias[list(suppressed)] = -math.inf
    return bias.to(device)
