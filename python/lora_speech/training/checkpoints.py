"""Checkpoints of a training run that continue it exactly.

A checkpoint is a folder `checkpoints/step-00000100` with `state.safetensors` (trainable
parameters, the optimizer's moments, the random generator) and `state.json` (step, best word error
rate so far, what the run was started with). It appears by a rename, whole or not at all, and
nothing in it is pickled.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_speech.errors import TrainingError
from lora_speech.files import publish, staging, write_json

FOLDER = "checkpoints"
_PREFIX = "step-"


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Attributes
    ----------
    step : int
        Optimizer steps done.
    batches : int
        Micro-batches consumed, over all epochs: the position in the data order.
    best_wer : float or None
        Best validation word error rate so far.
    best_step : int
        When it was reached.
    """

    step: int = 0
    batches: int = 0
    best_wer: float | None = None
    best_step: int = 0


def save_checkpoint(
    output: Path,
    parameters: dict[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    run: dict[str, Any],
    *,
    keep: int = 2,
) -> Path:
    """Write a checkpoint and drop all but the newest `keep`.

    Parameters
    ----------
    output : Path
        The run's output folder.
    parameters : dict
        Trainable parameters by name, in the optimizer's order.
    optimizer : torch.optim.Optimizer
        Its state per parameter is saved.
    progress : Progress
        Where the run stands.
    run : dict
        What the run was started with; `load_checkpoint` compares it.
    """
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {"random": torch.get_rng_state()}
    for name, parameter in parameters.items():
        tensors[f"parameter/{name}"] = parameter.detach().clone()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}/{name}"] = torch.as_tensor(value).detach().clone()
    record = {"progress": vars(progress), "run": run}
    final = output / FOLDER / f"{_PREFIX}{progress.step:08d}"
    with staging(final) as partial:
        partial.mkdir()
        save_file(tensors, partial / "state.safetensors")
        write_json(partial / "state.json", record)
        publish(partial, final)
    for old in list_checkpoints(output)[:-keep]:
        shutil.rmtree(old)
    return final


def list_checkpoints(output: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    folder = output / FOLDER
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.name.startswith(_PREFIX) and p.is_dir())


def load_checkpoint(
    path: Path,
    parameters: dict[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    run: dict[str, Any],
) -> Progress:
    """Put parameters, optimizer and random generator back where the checkpoint left them.

    Raises
    ------
    TrainingError
        The checkpoint is damaged, or was made by a run with other settings or data.
    """
    from safetensors.torch import load_file

    try:
        record = json.loads((path / "state.json").read_text(encoding="utf-8"))
        tensors = load_file(path / "state.safetensors")
        progress = Progress(**record["progress"])
    except Exception as error:  # missing, truncated or foreign files of either format
        raise TrainingError(
            f"checkpoint {path}: expected state.json and state.safetensors of a training run, "
            f"they cannot be read ({error}); delete this folder to continue from an older one"
        ) from error
    before = record["run"]
    changed = [key for key in {**before, **run} if before.get(key) != run.get(key)]
    if changed:
        listed = "; ".join(f"{k}: {before.get(k)!r} then, {run.get(k)!r} now" for k in changed[:5])
        raise TrainingError(
            f"resume: expected the settings and data that {path.parent.parent} was started with, "
            f"got other ones ({listed}); use the same, or another output folder"
        )
    expected = {f"parameter/{name}" for name in parameters}
    missing = expected - tensors.keys()
    if missing:
        raise TrainingError(
            f"checkpoint {path}: expected {len(expected)} parameters, {len(missing)} are missing "
            f"(e.g. {sorted(missing)[0]}); it belongs to another model: use another output folder"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"parameter/{name}"])
            state = {
                key: tensors[f"{key}/{name}"]
                for key in ("step", "exp_avg", "exp_avg_sq")
                if f"{key}/{name}" in tensors
            }
            if state:
                optimizer.state[parameter] = state
    torch.set_rng_state(tensors["random"].to(torch.uint8))
    return progress
