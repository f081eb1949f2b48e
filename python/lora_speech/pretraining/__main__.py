"""Train the small Whisper that ships with the project: ``python -m lora_speech.pretraining``.

The model hears only speech that espeak-ng speaks (see ``synthesis`` and ``corpus``). The loss is
the decoder's cross-entropy plus a CTC loss on the encoder: without it, attention takes most of the
training to find which sound belongs to which word. A killed run goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import WhisperForConditionalGeneration, WhisperProcessor, WhisperTokenizer

from lora_speech.files import publish, staging, sweep, write_json
from lora_speech.pretraining.data import Batch, BatchMaker, batches
from lora_speech.pretraining.evaluation import Report, evaluate, write_model_card
from lora_speech.pretraining.model import (
    SPELLINGS,
    Trainee,
    build_extractor,
    build_model,
    build_tokenizer,
    losses,
)
from lora_speech.synthetic import synthesis

_CHECKPOINT = "checkpoint.pt"


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights.

    Attributes
    ----------
    steps : int
        Optimiser steps. A run that goes on may be given another number, as long as it has not
        begun to cool down: until then nothing depends on it.
    horizon : int
        Steps in which the learning rate would fall in half a cosine if it were not cooled down.
    cool_down : float
        Share of the steps, the last, in which the learning rate falls to nothing.
    batch_size : int
        Utterances of a full 5 s window per step; shorter windows take up to twice as many.
    learning_rate : float
        Peak, reached after ``warmup`` steps.
    warmup : int
        Steps.
    weight_decay, gradient_clip : float
        Of AdamW, and of the gradient's norm.
    ctc_start, ctc_end : float
        Weight of the encoder's CTC loss, falling with the learning rate.
    width, encoder_layers, decoder_layers : int
        Size of the model.
    seed : int
        Of the weights and of the data.
    """

    steps: int = 5000
    horizon: int = 8000
    cool_down: float = 0.5
    batch_size: int = 24
    learning_rate: float = 2e-3
    warmup: int = 320
    weight_decay: float = 0.02
    gradient_clip: float = 1.0
    ctc_start: float = 1.0
    ctc_end: float = 0.2
    width: int = 128
    encoder_layers: int = 4
    decoder_layers: int = 2
    seed: int = 0

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        rising = step / self.warmup
        if rising < 1.0:
            return self.learning_rate * max(rising, 0.01)
        done = min((step - self.warmup) / (self.horizon - self.warmup), 1.0)
        cosine = max(0.5 * (1.0 + math.cos(math.pi * done)), 0.005)
        return self.learning_rate * cosine * self._warmth(step)

    def ctc_weight(self, step: int) -> float:
        """Weight of the CTC loss at a step."""
        left = max(1.0 - step / self.horizon, 0.0) * self._warmth(step)
        return self.ctc_end + (self.ctc_start - self.ctc_end) * left

    def _warmth(self, step: int) -> float:
        """1 until the cool-down begins, then falling linearly to 0."""
        return min(1.0, (self.steps - step) / (self.cool_down * self.steps))


def train(
    recipe: Recipe,
    output: Path,
    *,
    work: Path,
    evaluate_every: int,
    checkpoint_every: int,
    console: Console,
) -> Report:
    """Train, keep the best weights by held-out WER, and write them as a Hugging Face folder.

    Parameters
    ----------
    recipe : Recipe
        What to train.
    output : Path
        Folder to write; replaced if it exists.
    work : Path
        Folder for the checkpoint and the best weights so far; removed at the end.
    evaluate_every, checkpoint_every : int
        Steps.
    console : rich.console.Console
        Where progress goes.

    Returns
    -------
    Report
        Word error rates of the weights that were written.
    """
    torch.manual_seed(recipe.seed)
    tokenizer, extractor = build_tokenizer(recipe.seed), build_extractor()
    processor = WhisperProcessor(feature_extractor=extractor, tokenizer=tokenizer)
    whisper = _build(recipe, tokenizer)
    trainee = Trainee(whisper)
    optimizer = torch.optim.AdamW(
        _parameter_groups(trainee, recipe.weight_decay), lr=recipe.learning_rate, betas=(0.9, 0.98)
    )
    work.mkdir(parents=True, exist_ok=True)
    sweep(work)
    first, best, seconds = 0, math.inf, 0.0
    if (work / _CHECKPOINT).exists():
        first, best, seconds = _resume(work / _CHECKPOINT, recipe, trainee, optimizer)
        console.print(f"going on from step {first} of {work / _CHECKPOINT}")
    maker = BatchMaker(tokenizer, extractor, batch_size=recipe.batch_size, seed=recipe.seed)
    columns = (
        *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()),
        *(TimeRemainingColumn(), TextColumn("{task.fields[status]}")),
    )
    started = time.monotonic() - seconds
    sums = [0.0, 0.0]
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("pretraining", total=recipe.steps, completed=first, status="")
        for step, batch in enumerate(batches(maker, first, recipe.steps), start=first):
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate(step)
            decoder, encoder = _step(trainee, optimizer, batch, recipe, recipe.ctc_weight(step))
            sums = [sums[0] + decoder, sums[1] + encoder]
            done = step + 1
            if done % 100 == 0:
                status = f"decoder {sums[0] / 100:.3f}  ctc {sums[1] / 100:.3f}"
                sums = [0.0, 0.0]
                progress.update(task, status=status)
                if not console.is_terminal:
                    console.print(f"step {done}  {status}  {time.monotonic() - started:.0f} s")
            progress.update(task, completed=done)
            if done % evaluate_every == 0 or done == recipe.steps:
                report = evaluate(whisper, processor, count=64)
                console.print(f"step {done}  {report}")
                if report.seen <= best:
                    best = report.seen
                    _save(work / "best", whisper, processor)
            if done % checkpoint_every == 0 or done == recipe.steps:
                elapsed = time.monotonic() - started
                _checkpoint(work / _CHECKPOINT, recipe, trainee, optimizer, done, best, elapsed)
    return _finish(recipe, output, work, time.monotonic() - started)


def _build(recipe: Recipe, tokenizer: WhisperTokenizer) -> WhisperForConditionalGeneration:
    whisper = build_model(
        tokenizer,
        width=recipe.width,
        encoder_layers=recipe.encoder_layers,
        decoder_layers=recipe.decoder_layers,
    )
    # In bfloat16 the plain products' backward is faster than the fused attention's on CPUs.
    whisper.set_attn_implementation("eager")
    return whisper


def _step(
    trainee: Trainee,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    recipe: Recipe,
    ctc_weight: float,
) -> tuple[float, float]:
    """Take one optimiser step; returns the decoder's and the encoder's loss."""
    # Matrix products in bfloat16 save a third of a step where the CPU has AMX.
    with torch.autocast("cpu", torch.bfloat16):
        logits, characters = trainee(batch.features, batch.tokens)
    decoder, encoder = losses(logits, characters, batch)
    (decoder + ctc_weight * encoder).backward()
    torch.nn.utils.clip_grad_norm_(trainee.parameters(), recipe.gradient_clip)
    optimizer.step()
    optimizer.zero_grad()
    return decoder.item(), encoder.item()


def _parameter_groups(trainee: Trainee, decay: float) -> list[dict[str, object]]:
    """Decay matrices only: biases and norms have no reason to be small."""
    parameters = [p for p in trainee.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def _checkpoint(
    path: Path,
    recipe: Recipe,
    trainee: Trainee,
    optimizer: torch.optim.Optimizer,
    step: int,
    best: float,
    seconds: float,
) -> None:
    state = {
        "recipe": asdict(recipe),
        "trainee": trainee.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "best": best,
        "seconds": seconds,
    }
    with staging(path) as partial:
        torch.save(state, partial)
        publish(partial, path)


def _resume(
    path: Path, recipe: Recipe, trainee: Trainee, optimizer: torch.optim.Optimizer
) -> tuple[int, float, float]:
    state = torch.load(path, weights_only=True)
    found = Recipe(**state["recipe"])
    shorter = min(recipe.steps, found.steps)
    cooling = recipe.steps != found.steps and state["step"] > (1.0 - recipe.cool_down) * shorter
    if replace(found, steps=recipe.steps) != recipe or cooling:
        raise ValueError(
            f"{path}: expected a checkpoint of {recipe}, got step {state['step']} of {found}; "
            "give the same options, or another --work folder"
        )
    trainee.load_state_dict(state["trainee"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["best"], state["seconds"]


def _save(
    folder: Path, whisper: WhisperForConditionalGeneration, processor: WhisperProcessor
) -> None:
    """Write a folder, each file appearing whole."""
    folder.mkdir(exist_ok=True)
    with staging(folder) as partial:
        whisper.save_pretrained(partial)
        processor.save_pretrained(partial)
        # The file that every version of transformers looks for, beside the processor's newer one.
        processor.feature_extractor.save_pretrained(partial)
        # transformers reads the spellings of tokenizer.normalize() but does not write them.
        write_json(partial / "normalizer.json", SPELLINGS)
        for file in partial.iterdir():
            publish(file, folder / file.name)


def _finish(recipe: Recipe, output: Path, work: Path, seconds: float) -> Report:
    """Measure the best weights on more sentences, write the model card, and move all in place."""
    best = work / "best"
    whisper = WhisperForConditionalGeneration.from_pretrained(best)
    processor = WhisperProcessor.from_pretrained(best)
    report = evaluate(whisper, processor, count=300)
    write_model_card(best / "README.md", whisper, report, asdict(recipe), seconds)
    output.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(output, ignore_errors=True)
    shutil.move(best, output)
    shutil.rmtree(work)
    return report


def _seconds_per_step(recipe: Recipe, steps: int = 12) -> float:
    """Time some steps of a throwaway model, without the first, which warms up."""
    tokenizer, extractor = build_tokenizer(recipe.seed), build_extractor()
    trainee = Trainee(_build(recipe, tokenizer))
    optimizer = torch.optim.AdamW(trainee.parameters())
    maker = BatchMaker(tokenizer, extractor, batch_size=recipe.batch_size, seed=recipe.seed)
    started = 0.0
    # Two in three of the steps, or the queue's head start would hide how long batches take.
    for step, batch in enumerate(batches(maker, recipe.steps, recipe.steps + steps, ahead=1)):
        if step == steps // 3:
            started = time.monotonic()
        _step(trainee, optimizer, batch, recipe, recipe.ctc_end)
    return (time.monotonic() - started) / (steps - steps // 3)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the recipe from the command line."""
    default = Recipe()
    parser = argparse.ArgumentParser(
        prog="python -m lora_speech.pretraining",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, help="Hugging Face folder to write")
    parser.add_argument("--work", type=Path, help="folder for checkpoints [OUTPUT.work]")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, default=default.steps, help="optimiser steps")
    length.add_argument(
        "--minutes", type=float, help="as many steps as this machine takes in that time"
    )
    parser.add_argument("--seed", type=int, default=default.seed, help="weights and data")
    parser.add_argument("--batch-size", type=int, default=default.batch_size)
    parser.add_argument("--learning-rate", type=float, default=default.learning_rate)
    parser.add_argument("--encoder-layers", type=int, default=default.encoder_layers)
    parser.add_argument("--decoder-layers", type=int, default=default.decoder_layers)
    parser.add_argument("--threads", type=int, default=1, help="of the trainer; data takes one")
    parser.add_argument("--evaluate-every", type=int, default=500, help="steps")
    parser.add_argument("--checkpoint-every", type=int, default=250, help="steps")
    options = parser.parse_args(arguments)
    if not synthesis.is_available():
        parser.error("espeak-ng is needed to make the training data: pip install espeakng-loader")
    torch.set_num_threads(options.threads)
    recipe = Recipe(
        steps=options.steps,
        seed=options.seed,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        encoder_layers=options.encoder_layers,
        decoder_layers=options.decoder_layers,
    )
    console = Console(soft_wrap=True)
    if options.minutes is not None:
        steps = max(round(options.minutes * 60 / _seconds_per_step(recipe)), 100)
        recipe = replace(recipe, steps=steps)
        console.print(
            f"{steps} steps for {options.minutes:g} minutes: --steps {steps} repeats them"
        )
    report = train(
        recipe,
        options.output,
        work=options.work or options.output.with_name(options.output.name + ".work"),
        evaluate_every=options.evaluate_every,
        checkpoint_every=options.checkpoint_every,
        console=console,
    )
    console.print(f"wrote {options.output}: {report}")


if __name__ == "__main__":
    main()
