"""The whole run: every comparison of every model at every number of threads."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lora_speech.bench import peers
from lora_speech.bench.linear import compare_linears
from lora_speech.bench.measure import reason
from lora_speech.bench.record import BenchProgress, Record
from lora_speech.bench.settings import BenchSettings
from lora_speech.bench.systems import Ours, System, TransformersPeft
from lora_speech.bench.train import compare_training
from lora_speech.bench.whole_model import JOBS, compare_systems
from lora_speech.bench.workload import Workload

TRAINED = "base"
"""The model whose training step is measured, or the first one where it is not asked for."""


def run_bench(
    settings: BenchSettings | None = None,
    path: Path | None = None,
    progress: BenchProgress | None = None,
) -> dict[str, Any]:
    """Measure.

    Parameters
    ----------
    settings : BenchSettings, optional
        What, and for how long.
    path : Path, optional
        Where the JSON goes; it is there after the first comparison and grows.
    progress : BenchProgress, optional
        Told what goes on.

    Returns
    -------
    dict
        What the JSON holds: figures under `decode`, `decode_batch8`, `decode_batch8_adapters`,
        `decode_beam5` (tokens per second), `encoder` (ms per window), `linear` (us per call),
        `train` and `roofline`; percentiles of all of them under the same keys in `timings`; what
        was `left_out` and why.
    """
    settings = settings or BenchSettings()
    record = Record(settings, progress or BenchProgress(), path)
    record.save()  # a path that cannot be written is known now, not after half an hour
    begin = time.perf_counter()
    with _threads_kept(), tempfile.TemporaryDirectory(prefix="lora_speech_bench_") as scratch:
        for model in settings.models if set(settings.only) != {"train"} else ():
            _measure_model(model, settings, record, Path(scratch))
    if "train" in settings.only:
        trained = TRAINED if TRAINED in settings.models else settings.models[0]
        compare_training(trained, max(settings.threads), settings, record)
    record.data["seconds"] = round(time.perf_counter() - begin, 1)
    record.put(("complete",), True)
    return record.data


def _measure_model(model: str, settings: BenchSettings, record: Record, scratch: Path) -> None:
    work = Workload(model, settings, scratch)
    record.data["models"][work.key] = work.describe()
    jobs = [job for section in settings.only for job in JOBS.get(section, ())]
    systems = _systems(work, record) if jobs else []
    for threads in settings.threads:
        for job in jobs:
            compare_systems(job, work, systems, threads, settings, record)
        if "linear" in settings.only:
            compare_linears(work.key, work.config, threads, settings, record)


def _systems(work: Workload, record: Record) -> list[System]:
    """Ours, transformers with peft, and the peers that are there and take this model."""
    systems: list[System] = [Ours(work), TransformersPeft(work)]
    for package, peer in peers.PEERS.items():
        why = peers.missing(package)
        if why is not None:
            record.leave_out(package, why)
            continue
        try:
            systems.append(peer(work))
        except Exception as error:  # peers raise what they like
            record.leave_out(f"{package} with {work.key}", reason(error))
    return systems


@contextmanager
def _threads_kept() -> Iterator[None]:
    before, engine = torch.get_num_threads(), torch.backends.quantized.engine
    try:
        yield
    finally:
        torch.set_num_threads(before)
        torch.backends.quantized.engine = engine
