"""Contestants that run in torch: ours, and what a plain user of transformers and peft has."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch

import lora_kernels as lk
from lora_speech.bench.measure import OURS, Contestant
from lora_speech.bench.workload import Workload
from lora_speech.decoding.beam import beam_decode
from lora_speech.decoding.greedy import greedy_decode
from lora_speech.decoding.projections import AdapterRows
from lora_speech.decoding.whisper_decoder import whisper_of
from lora_speech.decoding.whisper_encoder import FlatEncoder

ADAPTER = "adapter"
ONE_ADAPTER = "ours_one_adapter"
RANK_16 = "ours_rank16"


@dataclass(frozen=True)
class Job:
    """What a system has to do: decode so many rows with so many beams, or encode a window.

    Attributes
    ----------
    mixed : bool
        Every row has an adapter of its own, of another rank each.
    """

    name: str
    batch: int = 1
    beams: int = 1
    decode: bool = True
    mixed: bool = False


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

    @cached_property
    def mixed(self) -> Any:
        """A copy with the adapters of a mixed batch; the other jobs' has one alone."""
        model = copy.deepcopy(self.model)
        for name, folder in self.work.mixed[1].items():
            lk.load_adapter(model, folder, name=name)
        return model

    def encode(self, features: torch.Tensor) -> torch.Tensor:
        """Encode as `greedy_decode` does."""
        return encode(self.model, features, ADAPTER)

    def contestants(self, job: Job, threads: int) -> list[Contestant]:
        """The lean decoder, or the encoder alone.

        For a mixed batch also the same model with one adapter for all rows, of the mean rank and
        of rank 16.
        """
        features = self.work.features(job.batch)
        if not job.decode:
            return [Contestant(OURS, lambda: self.encode(features))]
        if not job.mixed:
            return [Contestant(OURS, self._decoding(job, self.model, features, ADAPTER))]
        *several, mean = self.work.mixed[1]
        chosen: dict[str, str | list[str]] = {OURS: several, ONE_ADAPTER: mean, RANK_16: ADAPTER}
        return [
            Contestant(name, self._decoding(job, self.mixed, features, adapters))
            for name, adapters in chosen.items()
        ]

    def _decoding(
        self, job: Job, model: Any, features: torch.Tensor, adapters: str | list[str]
    ) -> Callable[[], None]:
        work, encoded = self.work, encode(model, features, adapters)
        search = greedy_decode if job.beams == 1 else partial(beam_decode, beams=job.beams)

        def decode() -> None:
            decoded = search(
                model,
                encoded=encoded,
                adapters=adapters,
                language=work.language,
                max_new_tokens=work.new_tokens,
                min_new_tokens=work.new_tokens,
            )
            work.check([len(tokens) for tokens in decoded.tokens], job.batch)

        return decode


@torch.inference_mode()
def encode(model: Any, features: torch.Tensor, adapters: str | list[str]) -> torch.Tensor:
    """Encode as `greedy_decode` does, with one adapter for all rows or one per row."""
    rows = AdapterRows.of(model, adapters, features.shape[0])
    return FlatEncoder(whisper_of(model).model.encoder, rows)(features)


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
        if job.mixed:
            return [Contestant(self.name, self._mixed(features))]
        run = _generate(self.work, self.model, self.encode(features), job.beams)
        return [Contestant(self.name, run)]

    def _mixed(self, features: torch.Tensor) -> Callable[[], None]:
        """PEFT's own way for a batch of several adapters: `adapter_names`."""
        peft, folders = self.work.mixed
        names = list(folders)[: len(features)]
        model = peft.get_base_model()
        # What PeftModel.generate(adapter_names=...) does around the model's own generate().
        hooks = partial(peft.base_model._enable_peft_forward_hooks, adapter_names=names)
        with torch.inference_mode(), hooks():
            encoded = model.get_encoder()(features).last_hidden_state
        generate = _generate(self.work, model, encoded, 1)

        def run() -> None:
            with hooks():
                generate()

        return run


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
