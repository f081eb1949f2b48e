"""Whisper's decoder, flattened for stepping over a preallocated key/value cache.

`transformers`' `generate()` rebuilds masks, caches and module calls for every token. Here one step
is a flat loop over precomputed closures and tensors, about ten operator calls per decoder layer:
bias, GELU, residual and LoRA ride in the epilogue of the projection they belong to, the cache is
written in place, and cross-attention keys and values are computed once per utterance. Under INT8
all of a step is recorded and run in one call (`decoder_step`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from lora_speech.decoding.adapter_rows import AdapterRows
from lora_speech.decoding.decoder_step import DecoderParts, pack_cross_attention, suppressing_bias
from lora_speech.decoding.projections import joint_projection, projection
from lora_speech.decoding.prompts import special_tokens
from lora_speech.decoding.recorded_parts import has_gelu
from lora_speech.decoding.whisper_encoder import FlatEncoder
from lora_speech.errors import ModelError


@dataclass
class DecoderState:
    """Cache and routing of one batch while it is decoded.

    Attributes
    ----------
    self_cache, cross_cache : list of (keys, values)
        Per layer, [utterances, heads, positions, head size]; what `kv_pack` returns of
        cross-attention's under INT8. Of the self-attention's cache a beam search has as many rows
        per utterance as beams.
    rows : AdapterRows
        Adapter of each row that is still decoded.
    slots : Tensor or None
        int32 [rows], cache row of each row still decoded, or [rows, positions], of each of its
        positions; None while all rows are decoded.
    cross_slots : Tensor or None
        int32 [rows], utterance of each row; None while each has one row and all are decoded.
    """

    self_cache: list[tuple[torch.Tensor, torch.Tensor]]
    cross_cache: list[tuple[torch.Tensor, ...]]
    rows: AdapterRows
    slots: torch.Tensor | None = None
    cross_slots: torch.Tensor | None = None
    cross_lengths: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    def fan_out(self, beams: int) -> None:
        """Give every utterance, whose prompt is in the cache, `beams` rows side by side.

        Row i writes new positions into a cache row of its own and reads older ones wherever those
        that it descends from wrote them: `slots` becomes a table of that.
        """
        rows, _, capacity, _ = self.self_cache[0][0].shape
        own = torch.arange(rows, dtype=torch.int32, device=self.cross_lengths.device)
        # A position not written yet already names the row's own place: following a parent copies
        # the positions behind, and those ahead never change.
        self.slots = own[:, None].repeat(1, capacity)
        self.cross_slots = own // beams
        self.cross_lengths = self.cross_lengths.repeat_interleave(beams)
        self.rows.repeat(beams)

    def follow(self, parents: list[int], length: int) -> None:
        """Let each row continue `parents[row]`, whose first `length` positions are in the cache."""
        assert self.slots is not None  # fan_out has made the table
        if parents != list(range(len(parents))):
            behind = self.slots[:, :length]
            (_follow_on_host if behind.is_cpu else _follow_on_device)(behind, parents)

    def keep(self, index: torch.Tensor) -> None:
        """Go on with some of the rows only.

        The others leave the batch; the cache stays where it is, slots say where.
        """
        if self.slots is None:
            rows = self.cross_lengths.shape[0]
            self.slots = torch.arange(rows, dtype=torch.int32, device=index.device)
            self.cross_slots = self.slots
        assert self.cross_slots is not None  # beams fan out before any leaves
        self.slots = self.slots[index]
        self.cross_slots = self.cross_slots[index]
        self.cross_lengths = self.cross_lengths[index]
        self.rows.keep(index)


def _follow_on_host(behind: torch.Tensor, parents: list[int]) -> None:
    # NumPy's view of the table: a quarter of what the same takes through torch's calls.
    table = behind.numpy()
    table[:] = table[parents]


def _follow_on_device(behind: torch.Tensor, parents: list[int]) -> None:
    behind.copy_(behind[torch.tensor(parents, device=behind.device)])


class WhisperDecoder:
    """The decoder of one Whisper, flattened for stepping.

    Parameters
    ----------
    model : WhisperForConditionalGeneration
        Plain, or after `lora_kernels.swap`, `lora_kernels.quantize` or `peft.get_peft_model`.
    rows : AdapterRows
        Which adapter each row uses; read at every call.
    """

    def __init__(self, model: Any, rows: AdapterRows) -> None:
        from lora_kernels.ops import Composite

        self.whisper = whisper = whisper_of(model)
        decoder = whisper.model.decoder
        self.encode = FlatEncoder(whisper.model.encoder, rows)
        self.rows = rows
        self.tokens = special_tokens(whisper)
        # INT8 throughout: steps are recorded and run in one call each.
        with rows.active():
            self.parts = DecoderParts.of(whisper) if Composite.runs_on(whisper.device) else None
        self.embedding = decoder.embed_tokens.weight
        self.positions = decoder.embed_positions.weight
        self.heads = decoder.layers[0].self_attn.num_heads
        if self.parts is None:
            with rows.active():
                self._flatten(whisper)

    def _flatten(self, whisper: Any) -> None:
        decoder, rows = whisper.model.decoder, self.rows
        self.layers = [_flatten_layer(layer, rows) for layer in decoder.layers]
        self.cross = [
            (
                projection(layer.encoder_attn.k_proj, rows),
                projection(layer.encoder_attn.v_proj, rows),
            )
            for layer in decoder.layers
        ]
        norm = decoder.layer_norm
        self.norm = (norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        # Suppressed tokens get a bias of minus infinity inside the product: no extra call.
        bias = suppressing_bias(self.tokens.suppressed, whisper.config.vocab_size)
        suppress = bias.to(self.embedding) if self.tokens.suppressed else None
        self.vocabulary = projection(whisper.proj_out, rows, extra_bias=suppress)
        self.all_tokens = projection(whisper.proj_out, rows)

    def start(self, encoded: torch.Tensor, capacity: int, beams: int = 1) -> DecoderState:
        """Allocate the cache and compute cross-attention's keys and values.

        Parameters
        ----------
        encoded : Tensor
            [batch, frames, width], the encoder's output.
        capacity : int
            Decoder positions to make room for, prompt included.
        beams : int
            Hypotheses per utterance to make room for.
        """
        batch, frames, width = encoded.shape
        own: list[tuple[torch.Tensor, torch.Tensor]] = []
        cross: list[tuple[torch.Tensor, ...]] = []
        if self.parts:
            cross = pack_cross_attention(self.parts, encoded, self.rows)
        else:
            for keys, values in self.cross:
                shape = (batch, frames, self.heads, width // self.heads)
                states = (keys(encoded, None), values(encoded, None))
                cross.append(tuple(t.view(shape).transpose(1, 2).contiguous() for t in states))
        # Beside INT8 weights bf16 is precise enough, and half of what a step reads here.
        halved = self.parts and encoded.dtype == torch.float32
        dtype = torch.bfloat16 if halved else encoded.dtype
        size = (2, batch * beams, self.heads, capacity, width // self.heads)
        for _ in cross:
            keys_and_values = encoded.new_empty(size, dtype=dtype)
            own.append((keys_and_values[0], keys_and_values[1]))
        lengths = torch.full((batch,), frames, dtype=torch.int32, device=encoded.device)
        slots = None
        if beams > 1:
            slots = torch.arange(0, batch * beams, beams, dtype=torch.int32, device=encoded.device)
        return DecoderState(own, cross, self.rows, slots, cross_lengths=lengths)

    def hidden(self, tokens: torch.Tensor, lengths: torch.Tensor, begin: int, state: DecoderState):
        """Run the layers over new tokens.

        Parameters
        ----------
        tokens : Tensor
            int64 [rows, new tokens].
        lengths : Tensor
            int32 [rows], positions already in the cache, all equal to `begin`.
        begin : int
            Position of the first new token.
        state : DecoderState
            Extended in place.

        Returns
        -------
        Tensor
            [rows, new tokens, width], after the last layer norm.
        """
        attend = torch.ops.lora_kernels.kv_attention_step
        layer_norm = torch.layer_norm
        count = tokens.shape[1]
        x = F.embedding(tokens, self.embedding) + self.positions[begin : begin + count]
        shape = x.shape
        slots, cross_slots, cross_lengths = state.slots, state.cross_slots, state.cross_lengths
        for layer, (keys, values), (cross_keys, cross_values) in zip(
            self.layers, state.self_cache, state.cross_cache, strict=True
        ):
            n1, qkv, out, n2, cross_q, cross_out, n3, fc1, fc2, scale = layer
            q, k, v = qkv(layer_norm(x, *n1))
            y, _ = attend(q, k, v, keys, values, None, None, lengths, slots, scale, None)
            x = out(y.view(shape), x)
            q = cross_q(layer_norm(x, *n2), None).view(q.shape)
            y, _ = attend(
                q,
                None,
                None,
                cross_keys,
                cross_values,
                None,
                None,
                cross_lengths,
                cross_slots,
                scale,
                None,
            )
            x = cross_out(y.view(shape), x)
            x = fc2(fc1(layer_norm(x, *n3), None), x)
        return layer_norm(x, *self.norm)


def whisper_of(model: Any) -> Any:
    """Return the `WhisperForConditionalGeneration` inside a model or PEFT model."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if getattr(getattr(inner, "config", None), "model_type", None) != "whisper" or not hasattr(
        inner, "proj_out"
    ):
        raise ModelError(
            "model: expected a WhisperForConditionalGeneration, or a PEFT model of one, got "
            f"{type(inner).__name__}; only Whisper's decoder is stepped here"
        )
    return inner


def _flatten_layer(layer: Any, rows: AdapterRows) -> tuple[Any, ...]:
    own, cross = layer.self_attn, layer.encoder_attn
    if not has_gelu(layer):
        raise ModelError(
            f"activation_function: expected 'gelu', Whisper's, got "
            f"{type(layer.activation_fn).__name__}; use model.generate() for this model"
        )
    heads = own.num_heads
    norms = [
        (norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        for norm in (
            layer.self_attn_layer_norm,
            layer.encoder_attn_layer_norm,
            layer.final_layer_norm,
        )
    ]
    return (
        norms[0],
        joint_projection([own.q_proj, own.k_proj, own.v_proj], rows, heads),
        projection(own.out_proj, rows),
        norms[1],
        projection(cross.q_proj, rows),
        projection(cross.out_proj, rows),
        norms[2],
        projection(layer.fc1, rows, activation="gelu"),
        projection(layer.fc2, rows),
        own.scaling,
    )
