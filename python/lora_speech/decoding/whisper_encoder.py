"""Whisper's encoder as a flat loop over fused projections, one utterance at a time on the CPU.

Bias, GELU, residual and LoRA ride in the epilogue of the projection they belong to; the rest is
torch's: convolutions, layer norms, scaled dot-product attention. Under INT8 all of it is recorded
and run in one call (`recorded_encoder`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from lora_speech.decoding.adapter_rows import AdapterRows
from lora_speech.decoding.projections import joint_projection, projection
from lora_speech.decoding.recorded_encoder import EncoderParts, RecordedEncoder


class FlatEncoder:
    """The encoder of one Whisper.

    Parameters
    ----------
    encoder : WhisperEncoder
        Plain, swapped, quantized or within a PEFT model; in evaluation mode.
    rows : AdapterRows
        Which adapter each row of a batch uses.
    """

    def __init__(self, encoder: Any, rows: AdapterRows) -> None:
        self.encoder = encoder
        self.rows = rows
        # Of the utterance that is encoded at the moment.
        self.own = AdapterRows(None, None, rows.pins)
        norm = encoder.layer_norm
        self.norm = (norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        on_cpu = next(encoder.parameters()).device.type == "cpu"
        with rows.active():
            self.parts = EncoderParts.of(encoder) if on_cpu else None
            self.layers = [] if self.parts else [self._flatten(layer) for layer in encoder.layers]
        self.recorded: RecordedEncoder | None = None
        self.recorded_ids: torch.Tensor | None = None

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """Encode [batch, mel bands, frames] to [batch, positions, width].

        On the CPU each utterance goes alone: a window fills the cores, and torch's convolutions
        round differently in batches, which INT8 can make visible; a transcript must not depend on
        its neighbours in the batch.
        """
        expected = self.encoder.config.max_source_positions * 2
        if features.shape[-1] != expected or features.dtype == torch.float16:
            # The model's own forward has the word: it refuses lengths, and clamps in fp16.
            with self.rows.active():
                return self.encoder(features).last_hidden_state
        if features.shape[0] == 1 or features.device.type != "cpu":
            self.own.names, self.own.ids = self.rows.names, self.rows.ids
            return self._encode(features)
        encoded = []
        for index, row in enumerate(features.split(1)):
            self.own.names, self.own.ids = self.rows.of_row(index)
            encoded.append(self._encode(row))
        return torch.cat(encoded)

    def _encode(self, features: torch.Tensor) -> torch.Tensor:
        if self.parts is not None:
            return self._run_recorded(self.parts, features)
        encoder = self.encoder
        x = F.gelu(encoder.conv2(F.gelu(encoder.conv1(features))))
        x = x.transpose(1, 2) + encoder.embed_positions.weight
        for n1, qkv, out, n2, fc1, fc2, scale in self.layers:
            q, k, v = (t.transpose(1, 2) for t in qkv(torch.layer_norm(x, *n1)))
            y = F.scaled_dot_product_attention(q, k, v, scale=scale)
            x = out(y.transpose(1, 2).reshape(x.shape), x)
            x = fc2(fc1(torch.layer_norm(x, *n2), None), x)
        return torch.layer_norm(x, *self.norm)

    def _run_recorded(self, parts: EncoderParts, features: torch.Tensor) -> torch.Tensor:
        ids = self.own.ids
        if self.recorded is None:
            self.recorded_ids = None if ids is None else ids.clone()
            self.recorded = RecordedEncoder(parts, self.recorded_ids)
        if self.recorded_ids is not None and ids is not None:
            self.recorded_ids.copy_(ids)
        return self.recorded.run(features)

    def _flatten(self, layer: Any) -> tuple[Any, ...]:
        attention = layer.self_attn
        norms = [
            (norm.normalized_shape, norm.weight, norm.bias, norm.eps)
            for norm in (layer.self_attn_layer_norm, layer.final_layer_norm)
        ]
        modules = [attention.q_proj, attention.k_proj, attention.v_proj]
        return (
            norms[0],
            joint_projection(modules, self.own, attention.num_heads),
            projection(attention.out_proj, self.own),
            norms[1],
            projection(layer.fc1, self.own, activation="gelu"),
            projection(layer.fc2, self.own),
            attention.scaling,
        )
