"""Decoding and encoding by whole models, and how near decoding comes to what reading allows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lora_kernels.benchmarking.roofline import read_bandwidth
from lora_speech.bench.measure import OURS, Contestant, compare, reason, significant
from lora_speech.bench.record import Record
from lora_speech.bench.settings import MIXED_RANKS, RANK, BenchSettings
from lora_speech.bench.systems import ONE_ADAPTER, RANK_16, Job, Ours, System
from lora_speech.bench.workload import Workload
from lora_speech.decoding.recorded_parts import SCREENED_BYTES

JOBS = {
    "decode": (Job("decode"),),
    "batch": (
        Job("decode_batch8", batch=8),
        Job("decode_batch8_adapters", batch=len(MIXED_RANKS), mixed=True),
    ),
    "beam": (Job("decode_beam5", beams=5),),
    "encoder": (Job("encoder", decode=False),),
}
"""What each section of the settings stands for."""


def compare_systems(
    job: Job,
    work: Workload,
    systems: Sequence[System],
    threads: int,
    settings: BenchSettings,
    record: Record,
) -> None:
    """Tokens per second of decoding, or milliseconds of encoding one window.

    The roofline goes with decoding one row without beams, and with a mixed batch the time that it
    takes as a multiple of the same batch's with one adapter.
    """
    torch.set_num_threads(threads)
    path = (job.name, work.key, str(threads))
    contestants: list[Contestant] = []
    for system in systems:
        try:
            contestants += system.contestants(job, threads)
        except Exception as error:  # peers raise what they like
            if isinstance(system, Ours):
                raise
            record.leave_out(f"{type(system).__name__} in {'.'.join(path)}", reason(error))
    counter = record.progress.counter(f"{job.name} {work.key}, threads {threads}")
    roofline = Roofline(work, threads) if job == JOBS["decode"][0] else None
    beside = None if roofline is None else roofline.read
    result = compare(contestants, settings, counter, beside=beside)
    made = job.batch * work.new_tokens
    figures = record.add(
        path, result, lambda seconds: made / seconds if job.decode else seconds * 1e3
    )
    if job.mixed:
        figures["over_one_adapter"] = significant(result.ratio(OURS, ONE_ADAPTER))
        figures["over_rank16"] = significant(result.ratio(OURS, RANK_16))
        record.save()
    if roofline is not None:
        record.put(("roofline", work.key, str(threads)), roofline.judge(made / result.median(OURS)))


def bytes_per_token(config: Any, prompt: int, new_tokens: int) -> dict[str, int]:
    """What our greedy step at batch 1 must read, by the model's shapes.

    INT8 weights, of a vocabulary with a screen the screen; the adapter's A and B in bf16; keys and
    values of cross-attention in INT8 and, at the mean length, of self-attention in fp32.
    Cross-attention applies its own key and value projections once per window, so they are not
    among the weights.
    """
    width, inner, layers = config.d_model, config.decoder_ffn_dim, config.decoder_layers
    vocabulary = config.vocab_size * width
    if vocabulary >= SCREENED_BYTES:
        vocabulary = vocabulary // 2 + 12 * config.vocab_size
    length = prompt + new_tokens // 2
    return {
        "weights": layers * (6 * width**2 + 2 * width * inner),
        "vocabulary": vocabulary,
        "adapter": layers * 2 * RANK * (6 * 2 * width + 2 * (width + inner)),
        "keys_and_values": layers * 2 * width * (config.max_source_positions + 4 * length),
    }


class Roofline:
    """Our share of what reading a step's bytes allows.

    The bandwidth is that of a block as large as what a step reads, since a large cache may hold
    it; memory's own stands beside it. It drifts, so it is read in the same rounds as the decoding
    it judges, and the best reading counts: a limit is what the machine can do. Computing
    cross-attention's keys and values is in the time and not in the bytes: the share is of the
    whole task, and that of the steps alone is larger.
    """

    def __init__(self, work: Workload, threads: int) -> None:
        self.threads = threads
        self.parts = bytes_per_token(work.config, len(work.prompt), work.new_tokens)
        self.bytes = sum(self.parts.values())
        self.bandwidth = 0.0

    def read(self) -> None:
        """Measure once more."""
        self.bandwidth = max(self.bandwidth, read_bandwidth(self.threads, self.bytes))

    def judge(self, tokens_per_second: float) -> dict[str, Any]:
        """What the record keeps."""
        limit = self.bandwidth / self.bytes
        return {
            "read_bytes_per_second": significant(self.bandwidth),
            "memory_bytes_per_second": significant(read_bandwidth(self.threads)),
            "bytes_per_token": self.bytes,
            "bytes": self.parts,
            "limit_tokens_per_second": significant(limit),
            "fraction": significant(tokens_per_second / limit),
        }
