"""One export: load, write, load again, compare, and only then publish."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from lora_speech.data.audio import load_audio
from lora_speech.decoding.prompts import default_language, special_tokens
from lora_speech.errors import ModelError, SpeechError
from lora_speech.export.check import Check, check_export
from lora_speech.export.names import MAX_WER
from lora_speech.export.target import Plan, Say, Target, target
from lora_speech.files import publish, staging, sweep, write_json
from lora_speech.models.loading import load_base, load_for_serving

CHECK = "check.json"


@dataclass(frozen=True)
class ExportReport:
    """What an export left, and how it was checked.

    Attributes
    ----------
    output : Path
        The folder.
    target : Target
    plan : Plan
    check : Check
    bytes : dict
        Size of each file.
    """

    output: Path
    target: Target
    plan: Plan
    check: Check
    bytes: dict[str, int]


def export_model(
    base: str | os.PathLike[str],
    to: str,
    output: str | os.PathLike[str],
    *,
    adapters: Mapping[str, str | os.PathLike[str]] | None = None,
    merge: bool = False,
    int8: bool = False,
    language: str | None = None,
    check: Sequence[str | os.PathLike[str]] = (),
    max_wer: float = MAX_WER,
    options: Mapping[str, str] | None = None,
    overwrite: bool = False,
    say: Say = lambda text: None,
) -> ExportReport:
    """Write a model as another runtime loads it, and check it.

    Parameters
    ----------
    base : str or path
        As `load_base` takes it.
    to : str
        One of `TARGETS`.
    output : path
        A new folder.
    adapters : mapping, optional
        PEFT folder per adapter name.
    merge : bool
        Fold the one adapter into the weights; otherwise adapters stay live where the target keeps
        them.
    int8 : bool
        INT8 weights.
    language : str, optional
        Of the prompt that is written beside graphs, and of the check; by default English where the
        model knows it.
    check : sequence of path
        Recordings to compare by; by default sentences that are synthesised here.
    max_wer : float
        Word error rate against the torch model beyond which nothing is published.
    options : mapping, optional
        What a target takes besides.
    overwrite : bool
        Replace a folder that an export wrote before.
    say : callable
        Told what is done at the moment.

    Returns
    -------
    ExportReport

    Raises
    ------
    SpeechError
        Something does not fit together, or the check failed; nothing is left behind.
    """
    chosen, output = target(to), Path(output)
    chosen.require(options or {})
    _refuse_output(output, overwrite)
    folders = dict(adapters or {})
    for name in folders:
        if not re.fullmatch(r"[\w-]+", name):  # it names files, and modules of PEFT
            raise SpeechError(
                f"adapters: expected names of letters, digits, - and _, got {name!r}; name it "
                "otherwise, e.g. --adapter NAME=FOLDER"
            )
    live = chosen.live and not merge
    if folders and not live and len(folders) > 1:
        raise SpeechError(
            f"adapters: expected one, which is merged into the weights, got {len(folders)} "
            f"({', '.join(folders)}); export them in turns"
            + ("" if chosen.live else f" ({to} keeps none apart from the weights)")
        )
    if merge and not folders:
        raise SpeechError("merge: expected an adapter to merge, got none; name it with --adapter")
    if int8 and chosen.int8 is None:
        raise SpeechError(f"int8: expected a target that takes INT8, got {to}; leave it out")
    say("loading the model")
    plan = _plan(base, chosen, folders, live, int8, dict(options or {}))
    plan = replace(plan, language=_known_language(plan, language))
    chosen.fits(plan)
    names, recordings = _recordings(plan, check)
    plan.samples.extend(recordings)
    try:
        sweep(output.parent)
        with staging(output) as partial:
            partial.mkdir()
            chosen.write(plan, partial, say)
            say("comparing with torch")
            found = check_export(plan, chosen.open(partial), names, recordings)
            worst = found.worst
            if not worst.wer <= max_wer:
                raise ModelError(
                    f"check: expected texts within {max_wer:.0%} WER of the torch model's, got "
                    f"{worst.wer:.0%} by {worst.adapter or 'the base'}; e.g. {worst.recording}: "
                    f"torch hears {worst.expected!r}, the "
                    f"export {worst.got!r}; nothing was written; check with speech "
                    "that the model knows, or raise max_wer"
                )
            write_json(partial / CHECK, found.record() | {"environment": chosen.environment()})
            _refuse_output(output, overwrite)  # it may have come meanwhile
            with staging(output.with_name(f"{output.name}.old")) as old:
                if output.exists():
                    output.replace(old)
                try:
                    publish(partial, output)
                except BaseException:  # an interrupt too: what stood there comes back
                    if old.exists() and not output.exists():
                        old.replace(output)
                    raise
    except (OSError, SafetensorError) as error:
        raise SpeechError(
            f"{output}: expected a folder that can be written, got: {error}; choose another place "
            "or make room"
        ) from error
    sizes = {
        str(path.relative_to(output)): path.stat().st_size
        for path in sorted(output.rglob("*"))
        if path.is_file()
    }
    return ExportReport(output, chosen, plan, found, sizes)


def _plan(
    base: Any,
    chosen: Target,
    folders: dict[str, Any],
    live: bool,
    int8: bool,
    options: dict[str, str],
) -> Plan:
    import lora_kernels as lk

    model = load_base(base)
    if model.family.objective not in chosen.objectives:
        raise ModelError(
            f"base: expected a Whisper, got a {model.family.name}, which --to {chosen.name} does "
            "not take; export it to onnx"
        )
    ours = int8 and chosen.int8 == "ours"
    if live:
        load_for_serving(model, folders, int8=ours)
        return Plan(model, tuple(folders), None, int8, options=options)
    load_for_serving(model, folders)
    for name in folders:
        try:
            lk.merge(model.model, name)
        except lk.SwapError as error:
            # Its advice, to keep the adapter live, is none here: graphs do not take such a layer.
            refusal = str(error).partition("; ")[0]
            raise ModelError(
                f"adapter {name!r}: {refusal}; export it to peft, which keeps it apart from the "
                "weights (without --merge), or train it without that layer"
            ) from error
    model.adapters = ()
    if ours:
        load_for_serving(model, int8=True)
    return Plan(model, (), next(iter(folders), None), int8, options=options)


def _known_language(plan: Plan, language: str | None) -> str | None:
    if plan.model.family.objective != "sequence":
        if language is not None:
            raise ModelError(
                f"language: expected none for a {plan.model.family.name}, got {language!r}; leave "
                "it out"
            )
        return None
    tokens = special_tokens(plan.model.model)
    if language is None:
        return default_language(tokens)
    tokens.language_id(language)  # refuses one that the model does not know
    return language


def _recordings(plan: Plan, given: Sequence[Any]) -> tuple[list[str], list[np.ndarray]]:
    if given:
        rate = plan.model.sampling_rate
        return [str(path) for path in given], [load_audio(path, rate) for path in given]
    from lora_speech.synthetic.corpus import sentences
    from lora_speech.synthetic.synthesis import SynthesisUnavailable, accent_speakers, synthesize

    try:
        speakers = accent_speakers("en-us", 3)
        texts = sentences(len(speakers), split="held_out", seed=0)
        recordings = [
            synthesize(text, speaker) for text, speaker in zip(texts, speakers, strict=True)
        ]
    except SynthesisUnavailable as error:
        raise SpeechError(f"check: {error}, or name recordings with --check FILE") from error
    return [f"synthesised {number}" for number in range(1, 1 + len(texts))], recordings


def _refuse_output(output: Path, overwrite: bool) -> None:
    if not (output.exists() or output.is_symlink()):
        above = next(path for path in output.absolute().parents if path.exists())
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise SpeechError(
                f"output: expected a folder that can be made, got {output}, and {above} is "
                f"{'not writable' if above.is_dir() else 'a file'}; choose another place"
            )
        return
    if output.is_symlink():
        raise SpeechError(f"output: expected a new folder, got {output}, a link; name its target")
    if not overwrite:
        raise SpeechError(
            f"output: expected a new folder, got {output}, which is there; choose another one or "
            "add --overwrite"
        )
    if not (output / CHECK).is_file():
        raise SpeechError(
            f"output: expected a folder that an export wrote, to overwrite it, got {output}, which "
            f"has no {CHECK}; remove it yourself or choose another one"
        )
