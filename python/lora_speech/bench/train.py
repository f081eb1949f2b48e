"""A training step of LoRA: PEFT's layers as they are, and with ours swapped in.

Each contestant has a process of its own, so that its peak of memory is its own.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from lora_speech.bench.measure import OURS, Contestant, compare, reason
from lora_speech.bench.record import Record
from lora_speech.bench.settings import BenchSettings, model_key
from lora_speech.errors import SpeechError

CONTESTANTS = (OURS, "peft")
BATCH, LABELS = 2, 64
"""Windows and label tokens of a step."""


def compare_training(model: str, threads: int, settings: BenchSettings, record: Record) -> None:
    """Milliseconds of a step and peak of memory in MiB."""
    key = model_key(model)
    counter = record.progress.counter(f"train {key}, threads {threads}")
    with ExitStack() as stack:
        trainers = {
            name: stack.enter_context(_trainer(name, model, threads)) for name in CONTESTANTS
        }
        contestants = [Contestant(name, trainer.step) for name, trainer in trainers.items()]
        result = compare(contestants, settings, counter)
        peaks = {name: trainers[name].peak_mib() for name in result.names}
    path = ("train", key)
    figures = record.add(path, result, lambda seconds: seconds * 1e3)
    steps = {
        name: {"ms_per_step": value, "peak_mib": peaks[name]} for name, value in figures.items()
    }
    record.put(path, steps | {"threads": threads, "batch": BATCH, "labels": LABELS})


@dataclass(frozen=True)
class _Trainer:
    """The parent's end of a process that trains."""

    name: str
    connection: Connection

    def step(self) -> None:
        """One step, and wait for its end."""
        self._ask("step")

    def peak_mib(self) -> int:
        """The most memory that the process has held so far."""
        return int(self._ask("peak"))

    def _ask(self, what: str) -> Any:
        try:
            self.connection.send(what)
            answer = self.connection.recv()
        except (EOFError, OSError) as error:
            raise SpeechError(
                f"train: the process of {self.name} ended before it answered; its message is "
                "above, and where there is none, the memory may not have sufficed"
            ) from error
        if isinstance(answer, Exception):
            raise answer
        return answer


@contextmanager
def _trainer(name: str, model: str, threads: int) -> Iterator[_Trainer]:
    # Spawned: a fork would share memory with this process, and its threads would not come along.
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, name, model, threads), daemon=True)
    process.start()
    there.close()
    try:
        yield _Trainer(name, here)
    finally:
        here.close()  # which ends the loop in the process
        process.join()


def _serve(connection: Connection, name: str, model: str, threads: int) -> None:
    """The process: takes a step or tells its peak of memory, as often as it is asked."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries about each other
    with suppress(EOFError, OSError, KeyboardInterrupt):  # nobody asks any more
        step = None
        while True:
            what = connection.recv()
            answer: Any = None
            try:
                if what == "peak":
                    answer = _peak_mib()
                else:
                    step = step or _training_step(name, model, threads)
                    step()
            except Exception as error:
                answer = SpeechError(f"train, {name}: {reason(error)}")
            connection.send(answer)


def _training_step(name: str, model: str, threads: int) -> Any:
    import torch
    import torch.nn.functional as F

    import lora_kernels as lk
    from lora_speech.bench.workload import build_model, with_lora

    torch.set_num_threads(threads)
    adapted = with_lora(build_model(model)).train()
    if name == OURS:
        lk.swap(adapted)
    config = adapted.get_base_model().config
    config.apply_spec_augment = False  # it would mask other frames in every step
    shape = (BATCH, config.num_mel_bins, 2 * config.max_source_positions)
    features = torch.randn(shape) * 0.3
    count = min(LABELS, config.max_target_positions)
    labels = torch.randint(0, config.eos_token_id, (BATCH, count))
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def step() -> None:
        logits = adapted(input_features=features, decoder_input_ids=labels, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _peak_mib() -> int:
    """Of this process alone: `ru_maxrss` remembers the process that started it."""
    try:
        with open("/proc/self/status", encoding="ascii") as lines:
            return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        unit = 2**20 if sys.platform == "darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit
