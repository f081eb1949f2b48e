"""Fine-tune a base model with LoRA: PEFT parameters, fused forward and backward, exact resume."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from lora_speech.data.manifest import load_utterances
from lora_speech.errors import TrainingError
from lora_speech.evaluation import evaluate
from lora_speech.files import publish, staging, sweep, write_jsonl
from lora_speech.models.loading import SpeechModel, load_base
from lora_speech.training.batching import (
    Batch,
    ExampleStore,
    epoch_batches,
    hash_seed,
    spec_augment,
)
from lora_speech.training.checkpoints import (
    FOLDER,
    Progress,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from lora_speech.training.config import TrainingConfig, TrainingEvent, TrainingResult

LOG = "training_log.jsonl"
"""One line per step (`step`, `loss`, `learning_rate`, `gradient_norm`) and per validation
(`step`, `validation_wer`)."""


def finetune(
    base: str | os.PathLike[str],
    train: Any,
    validation: Any = None,
    output: str | os.PathLike[str] = "adapter",
    config: TrainingConfig | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[TrainingEvent], None] | None = None,
) -> TrainingResult:
    """Train a LoRA adapter and keep the one that is best on the validation data.

    Parameters
    ----------
    base : str or path
        As in `load_base`.
    train, validation
        Utterances, as in `load_utterances`; validation may be None.
    output : path
        Folder for the adapter (PEFT layout), the log and the checkpoints.
    config : TrainingConfig, optional
        Settings.
    resume : bool
        Continue from the newest checkpoint in `output`, exactly as if never interrupted; start
        afresh where there is none.
    overwrite : bool
        Replace what an earlier run left in `output`.
    progress : callable, optional
        Told of every step.

    Returns
    -------
    TrainingResult

    Raises
    ------
    SpeechError
        Data, base or output cannot be used; nothing of an earlier run has been changed then.
    """
    config = config or TrainingConfig()
    started = time.perf_counter()
    utterances = load_utterances(train)
    held_out = load_utterances(validation) if validation is not None else None
    output = Path(output)
    _check_output(output, resume, overwrite)
    speech_model = load_base(base)
    _check_family(speech_model)
    tell = progress or (lambda event: None)
    store = ExampleStore(
        speech_model,
        utterances,
        config.language,
        lambda done, total: tell(TrainingEvent("prepare", done, total)),
    )
    # The caller's random state is none of our business, and ours none of theirs.
    with torch.random.fork_rng(devices=[]):
        run = _Run(speech_model, store, held_out, output, config, tell)
        if overwrite:  # only now: everything given has proved usable
            _clear(output)
        run.train(resume)
    return run.result(time.perf_counter() - started)


class _Run:
    """One training run: model, optimizer and where it stands."""

    def __init__(
        self,
        speech_model: SpeechModel,
        store: ExampleStore,
        held_out: list | None,
        output: Path,
        config: TrainingConfig,
        tell: Callable[[TrainingEvent], None],
    ) -> None:
        torch.manual_seed(config.seed)
        self.store, self.held_out, self.output = store, held_out, output
        self.config, self.tell = config, tell
        self.model = attach_lora(speech_model, config)
        self.tuned = replace(speech_model, model=self.model)
        self.parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=config.learning_rate,
            betas=(0.9, 0.98),
            weight_decay=config.weight_decay,
        )
        self.progress = Progress()
        self.log: list[dict[str, Any]] = []
        settings = {f.name: getattr(config, f.name) for f in fields(config)}
        settings["targets"] = list(config.targets) if config.targets else None
        self.started_with = settings | {"base": speech_model.source, "data": store.fingerprint}

    def train(self, resume: bool) -> None:
        self.output.mkdir(parents=True, exist_ok=True)
        found = list_checkpoints(self.output) if resume else []
        if found:
            self.progress = load_checkpoint(
                found[-1], self.parameters, self.optimizer, self.started_with
            )
            self.log = [r for r in read_log(self.output) if r["step"] <= self.progress.step]
        for folder in (self.output, self.output / FOLDER):
            sweep(folder)
        write_jsonl(self.output / LOG, self.log)
        batches = self._batches(self.progress.batches)
        with open(self.output / LOG, "a", encoding="utf-8") as log:
            for step in range(self.progress.step, self.config.steps):
                self._record(self._step(step, batches), log)
                done = step + 1
                last = done == self.config.steps
                if self.held_out and (last or done % self.config.validate_every == 0):
                    self._record(self._validate(done), log)
                if last or done % self.config.checkpoint_every == 0:
                    save_checkpoint(
                        self.output,
                        self.parameters,
                        self.optimizer,
                        self.progress,
                        self.started_with,
                    )
        if not self.held_out:
            save_adapter(self.model, self.output)
            self.progress = replace(self.progress, best_step=self.config.steps)

    def result(self, seconds: float) -> TrainingResult:
        total = sum(p.numel() for p in self.model.parameters())
        trainable = sum(p.numel() for p in self.parameters.values())
        return TrainingResult(
            output=self.output,
            losses=[r["loss"] for r in self.log if "loss" in r],
            validations=[
                (r["step"], r["validation_wer"]) for r in self.log if "validation_wer" in r
            ],
            best_wer=self.progress.best_wer,
            best_step=self.progress.best_step,
            trainable=trainable,
            total=total,
            skipped=tuple(self.store.skipped),
            seconds=seconds,
        )

    def _batches(self, consumed: int) -> Iterator[list[int]]:
        """Micro-batches from the given position of the endless sequence of epochs."""
        epoch = 0
        lengths = self.store.lengths
        while True:
            batches = epoch_batches(lengths, self.config.batch_size, self.config.seed, epoch)
            yield from batches[consumed:]
            consumed = max(0, consumed - len(batches))
            epoch += 1

    def _step(self, step: int, batches: Iterator[list[int]]) -> dict[str, Any]:
        config = self.config
        self.model.train()
        rate = config.learning_rate_at(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        generator = torch.Generator().manual_seed(hash_seed(config.seed, step, "augment"))
        loss_sum = 0.0
        for _ in range(config.accumulation):
            batch = self.store.collate(next(batches))
            if config.augment:
                batch = replace(batch, features=spec_augment(batch.features, generator))
            loss = self._loss(batch)
            loss_value = float(loss.detach())
            if not math.isfinite(loss_value):
                raise TrainingError(
                    f"loss: expected a finite number, got {loss_value} in step {step + 1}; lower "
                    f"--learning-rate (now {config.learning_rate:g}); the best adapter so far and "
                    "the checkpoints are kept"
                )
            (loss / config.accumulation).backward()
            loss_sum += loss_value
        norm = torch.nn.utils.clip_grad_norm_(
            list(self.parameters.values()), config.max_gradient_norm
        )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress = replace(
            self.progress,
            step=step + 1,
            batches=self.progress.batches + config.accumulation,
        )
        loss_mean = loss_sum / config.accumulation
        best = self.progress.best_wer
        self.tell(TrainingEvent("train", step + 1, config.steps, loss=loss_mean, best_wer=best))
        return {
            "step": step + 1,
            "loss": loss_mean,
            "learning_rate": rate,
            "gradient_norm": float(norm),
        }

    def _loss(self, batch: Batch) -> torch.Tensor:
        logits = self.model(
            **{self.tuned.family.features.input_name: batch.features},
            decoder_input_ids=batch.decoder_input,
            use_cache=False,
        ).logits
        return F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=-100)

    def _validate(self, done: int) -> dict[str, Any]:
        self.model.eval()
        rates = evaluate(self.tuned, self.held_out, language=self.config.language).rates
        best = self.progress.best_wer
        if best is None or rates.wer < best:
            self.progress = replace(self.progress, best_wer=rates.wer, best_step=done)
            save_adapter(self.model, self.output)
        self.tell(
            TrainingEvent(
                "validate",
                done,
                self.config.steps,
                wer=rates.wer,
                best_wer=self.progress.best_wer,
            )
        )
        return {"step": done, "validation_wer": rates.wer, "validation_cer": rates.cer}

    def _record(self, record: dict[str, Any], log: Any) -> None:
        self.log.append(record)
        log.write(json.dumps(record) + "\n")
        log.flush()


def attach_lora(speech_model: SpeechModel, config: TrainingConfig) -> Any:
    """Add PEFT's LoRA layers to a base and swap in the fused forward and backward."""
    from peft import LoraConfig, get_peft_model

    import lora_kernels as lk

    targets = list(config.targets or speech_model.family.lora_targets)
    alpha: Any = int(config.alpha) if float(config.alpha).is_integer() else config.alpha
    speech_model.model.config.apply_spec_augment = False  # ours depends on the step alone
    try:
        model = get_peft_model(
            speech_model.model,
            LoraConfig(
                r=config.rank,
                lora_alpha=alpha,
                lora_dropout=config.dropout,
                use_rslora=config.rslora,
                target_modules=targets,
            ),
        )
    except ValueError as error:
        names = sorted(
            {
                name.rsplit(".", 1)[-1]
                for name, module in speech_model.model.named_modules()
                if isinstance(module, torch.nn.Linear)
            }
        )
        raise TrainingError(
            f"targets: expected names of linears of this model ({', '.join(names)}), got "
            f"{', '.join(targets)}; choose among them ({error})"
        ) from error
    lk.swap(model)
    return model


def save_adapter(model: Any, output: Path) -> None:
    """Write the adapter as a PEFT folder, each file appearing whole."""
    with staging(output / "adapter") as partial:
        model.save_pretrained(partial, safe_serialization=True)
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            publish(partial / name, output / name)


def read_log(output: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Records of a run's log; a last line that a kill cut short is left out."""
    path = Path(output) / LOG
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def _check_output(output: Path, resume: bool, overwrite: bool) -> None:
    if resume and overwrite:
        raise TrainingError("resume and overwrite exclude each other; choose one")
    if output.exists() and not output.is_dir():
        raise TrainingError(f"output {output}: expected a folder, got a file; name another one")
    used = output.is_dir() and any(
        (output / name).exists() for name in ("adapter_config.json", FOLDER, LOG)
    )
    if used and not resume and not overwrite:
        raise TrainingError(
            f"output {output}: an earlier run's adapter, log or checkpoints are there; continue "
            "it with --resume, replace it with --overwrite, or name another folder"
        )
    # Not before everything else is known to be in order does anything get written; but a folder
    # that cannot be written should be known before an hour of training.
    parent = next(p for p in (output, *output.absolute().parents) if p.exists())
    if not os.access(parent, os.W_OK):
        raise TrainingError(f"output {output}: {parent} cannot be written; name another folder")


def _check_family(speech_model: SpeechModel) -> None:
    if speech_model.family.objective != "sequence":
        raise TrainingError(
            f"base: expected a Whisper, got a {speech_model.family.name}; fine-tuning recipes for "
            "CTC families are not available yet (lora_kernels.swap works in your own script)"
        )


def _clear(output: Path) -> None:
    """Remove what an earlier run wrote, and nothing else."""
    shutil.rmtree(output / FOLDER, ignore_errors=True)
    for name in ("adapter_config.json", "adapter_model.safetensors", LOG):
        (output / name).unlink(missing_ok=True)
