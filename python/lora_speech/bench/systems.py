"""Contestants that run in torch: ours, and what a plain user of transformers and peft has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import lora_kernels as lk
from lora_speech.beam_decoding import beam_decode
from lora_speech.bench.measure import OURS, Contestant
from lora_speech.bench.workload import Workload
from lora_speech.decoding import greedy_decode
from lora_speech.encoding import FlatEncoder
from lora_speech.projections import AdapterRows
from lora_speech.whisper_decoder import whisper_of

ADAPTER = "adapter"


@dataclass(frozen=True)
class Job:
    """What a system has to do: decode so many rows with so many beams, or encode a window."""

    name: str
    batch: int = 1
    beams: int = 1
    decode: bool = True


class System:
    """One way to run a Whisper.

    Encoding and decoding are timed apart: a decoder starts from the output of its own system's
    encoder, and its time includes the keys and values of cross-attention, which every system
    computes from there.
    """

    def contestants(self, job: Job, threads: int) -> list[Contestant]:
        """Ways to do the job, of which there may be none."""
        raise NotImplementedError


class Ours(System):
    """INT8 base with a live adapter, unmerged."""

    def __init__(self, work: Workload) -> None:
        self.work = work
        self.model = work.plain
        lk.quantize(self.model, lk.Int8Dynamic())
        lk.swap(self.model)
        lk.load_adapter(self.model, work.adapter_folder, name=ADAPTER)

    @torch.inference_mode()
    def encode(self, features: torch.Tensor) -> torch.Tensor:
        """Encode as `greedy_decode` does."""
        rows = AdapterRows.of(self.model, ADAPTER, features.shape[0])
        return FlatEncoder(whisper_of(self.model).model.encoder, rows)(features)

    def contestants(self, job: Job, threads: int) -> list[Contestant]:
        """The lean decoder, or the encoder alone."""
        work = self.work
        features = work.features(job.batch)
        if not job.decode:
            return [Contestant(OURS, lambda: self.encode(features))]
        encoded = self.encode(features)
        search = greedy_decode if job.beams == 1 else partial(beam_decode, beams=job.beams)

        def decode() -> None:
            decoded = search(
                self.model,
                encoded=encoded,
                adapters=ADAPTER,
                language=work.language,
                max_new_tokens=work.new_tokens,
                min_new_tokens=work.new_tokens,
            )
            work.check([len(tokens) for tokens in decoded.tokens], job.batch)

        return [Contestant(OURS, decode)]


class TransformersPeft(System):
    """fp32 with PEFT's LoRA layers, unmerged."""

    name = "transformers_peft"

    def __init__(self, work: Workload) -> None:
        self.work = work
        self.model = work.adapted.get_base_model()

    @torch.inference_mode()
    def encode(self, features: torch.Tensor) -> torch.Tensor:
        """Encode through the model's own forward."""
        return self.model.get_encoder()(features).last_hidden_state

    def contestants(self, job: Job, threads: int) -> list[Contestant]:
        """The encoder's own forward, or the model's own `generate()`."""
        features = self.work.features(job.batch)
        if not job.decode:
            return [Contestant(self.name, lambda: self.encode(features))]
        run = _generate(self.work, self.model, self.encode(features), job.beams)
        return [Contestant(self.name, run)]


def _generate(work: Workload, model: Any, encoded: torch.Tensor, beams: int) -> Callable[[], None]:
    """A run of transformers' `generate()` over an encoder's output."""
    from transformers.generation import GenerationMixin
    from transformers.modeling_outputs import BaseModelOutput

    batch = encoded.shape[0]
    prompts = torch.tensor([work.prompt] * batch)

    @torch.inference_mode()
    def run() -> None:
        # The mixin's, not Whisper's: that one splits audio into windows before it gets here.
        tokens = GenerationMixin.generate(
            model,
            encoder_outputs=BaseModelOutput(last_hidden_state=encoded),
            decoder_input_ids=prompts,
            max_new_tokens=work.new_tokens,
            min_new_tokens=work.new_tokens,
            num_beams=beams,
            do_sample=False,
        )
        work.check([len(row) - len(work.prompt) for row in tokens], batch)

    return run
