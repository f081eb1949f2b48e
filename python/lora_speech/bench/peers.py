"""Contestants that are optional: other runtimes, which serve the adapter merged."""

from __future__ import annotations

import warnings
from functools import partial
from importlib import util
from typing import Any

from lora_speech.bench.measure import Contestant
from lora_speech.bench.systems import Job, System
from lora_speech.bench.workload import Workload

INSTALL = "pip install 'lora-kernels[bench]'"


def missing(package: str) -> str | None:
    """Why a peer cannot take part and what to do, or None where its package is there."""
    if util.find_spec(package) is None:
        return f"not installed; {INSTALL}"
    return None


class CTranslate2(System):
    """CTranslate2 with every compute type that this CPU has; the fastest stands for it."""

    name = "ctranslate2"
    COMPUTE_TYPES = ("int8", "int8_float32", "int8_bfloat16", "bfloat16", "float32")

    def __init__(self, work: Workload) -> None:
        import ctranslate2

        self.work = work
        self.library = ctranslate2
        self.folder = work.folder / "ctranslate2"
        _convert(work, str(self.folder))
        supported = ctranslate2.get_supported_compute_types("cpu")
        self.types = [kind for kind in self.COMPUTE_TYPES if kind in supported]

    def contestants(self, job: Job, threads: int) -> list[Contestant]:
        """One per compute type; none where every row has an adapter of its own."""
        if job.mixed:
            return []
        features = self.library.StorageView.from_array(self.work.features(job.batch).numpy())
        found = []
        for kind, model in self._models(threads).items():
            run = partial(model.encode, features)
            if job.decode:
                run = partial(self._decode, model, run(), job)
            found.append(Contestant(self.name, run, kind))
        return found

    def _decode(self, model: Any, encoded: Any, job: Job) -> None:
        work = self.work
        results = model.generate(
            encoded,
            [work.prompt] * job.batch,
            beam_size=job.beams,
            max_length=2 * work.new_tokens,  # it makes at most half as many new ones
            suppress_blank=False,
            suppress_tokens=[work.tokens.end],
        )
        work.check([len(result.sequences_ids[0]) for result in results], job.batch)

    def _models(self, threads: int) -> dict[str, Any]:
        models: dict[str, Any] = {}
        for kind in self.types:
            model = self.library.models.Whisper(
                str(self.folder), compute_type=kind, intra_threads=threads, inter_threads=1
            )
            models.setdefault(model.compute_type, model)  # "int8" is another name of one of these
        return models


class OpenVino(System):
    """OpenVINO's encoder; it has no decoder that a Whisper could be compared by in one call."""

    def __init__(self, work: Workload) -> None:
        import openvino
        import torch

        self.work = work
        self.core = openvino.Core()
        encoder = work.merged.model.encoder

        class Hidden(torch.nn.Module):
            """The encoder's tensor alone, which is what can be traced."""

            def __init__(self) -> None:
                super().__init__()
                self.encoder = encoder

            def forward(self, features: torch.Tensor) -> torch.Tensor:
                return self.encoder(features).last_hidden_state

        example = work.features(1)
        with warnings.catch_warnings():  # of tracing: the shape is fixed, and so are its branches
            warnings.simplefilter("ignore")
            self.model = openvino.convert_model(
                Hidden().eval(), example_input=example, input=list(example.shape)
            )

    def contestants(self, job: Job, threads: int) -> list[Contestant]:
        """Encoding with each precision, each under a name of its own."""
        if job.decode:
            return []
        features = self.work.features(1).numpy()
        contestants = []
        for precision in ("bf16", "f32"):
            compiled = self.core.compile_model(
                self.model,
                "CPU",
                {
                    "INFERENCE_NUM_THREADS": threads,
                    "INFERENCE_PRECISION_HINT": precision,
                    "PERFORMANCE_HINT": "LATENCY",
                },
            )
            contestants.append(Contestant(f"openvino_{precision}", partial(compiled, features)))
        return contestants


PEERS: dict[str, type[CTranslate2] | type[OpenVino]] = {
    "ctranslate2": CTranslate2,
    "openvino": OpenVino,
}
"""By the package that each needs."""


class _Vocabulary:
    """As much of a tokenizer as the conversion asks for: a name for every id below timestamps."""

    unk_token = "<|endoftext|>"

    def __init__(self, work: Workload) -> None:
        tokens = work.tokens
        names = {tokens.end: "<|endoftext|>", tokens.start: "<|startoftranscript|>"}
        names |= {index: f"<|{task}|>" for task, index in tokens.tasks.items()}
        names |= {index: f"<|{code}|>" for code, index in tokens.languages.items()}
        count = work.config.vocab_size
        if tokens.no_timestamps is not None:
            names[tokens.no_timestamps] = "<|notimestamps|>"
            count = tokens.no_timestamps + 1
        self.ids = {names.get(index, f"t{index}"): index for index in range(count)}

    def get_vocab(self) -> dict[str, int]:
        """Id by name."""
        return self.ids


def _convert(work: Workload, folder: str) -> None:
    from ctranslate2.converters import TransformersConverter

    class Converter(TransformersConverter):
        """Takes the merged model where it is, and needs no tokenizer files."""

        def load_model(self, *_: Any, **__: Any) -> Any:
            return work.merged

        def load_tokenizer(self, *_: Any, **__: Any) -> Any:
            return _Vocabulary(work)

    source = work.folder / "merged"
    work.config.save_pretrained(source)
    # Weights stay fp32 on disk: each compute type is made of them when the model is loaded.
    Converter(str(source)).convert(folder)
