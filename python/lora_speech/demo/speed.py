"""Decoding speed against transformers + peft, measured in turns in one run."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lora_speech.data.features import extract_features
from lora_speech.data.manifest import Utterance
from lora_speech.decoding.greedy import greedy_decode
from lora_speech.decoding.prompts import prompt_tokens, special_tokens
from lora_speech.errors import ModelError
from lora_speech.models.loading import SpeechModel, load_base


def measure_speed(
    model: SpeechModel,
    base: str | os.PathLike[str],
    adapter_folder: Path,
    adapter: str,
    utterance: Utterance,
    rounds: int,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """Decode the same features in turns, with `model` and with transformers + peft unfused.

    Both get the same features at batch 1, run the encoder and the decoder, and produce the same
    number of new tokens (the end of text is suppressed); the first round of each is not counted.

    Returns
    -------
    dict
        Medians `ours` and `transformers_peft` in tokens per second, their `ratio`, `new_tokens`,
        `threads`, and every measurement in seconds under `rounds`.
    """
    from peft import PeftModel
    from transformers.generation import GenerationMixin

    peer = load_base(base)
    unfused = PeftModel.from_pretrained(peer.model, str(adapter_folder)).eval().get_base_model()
    name = model.family.features.input_name
    features = extract_features(model, [within_window(model, utterance)])[name]
    tokens = special_tokens(model.model)
    prompt = torch.tensor([prompt_tokens(tokens, "en")])
    count = min(64, tokens.max_positions - 8)

    def ours() -> int:
        decoded = greedy_decode(
            model.model, features, adapters=[adapter], language="en",
            max_new_tokens=count, min_new_tokens=count,
        )  # fmt: skip
        return len(decoded.tokens[0])

    def theirs() -> int:
        # The mixin's, not Whisper's: that one starts again where a model writes odd timestamps,
        # which may never end while the end of text is suppressed.
        with torch.inference_mode(), _quiet_transformers():
            row = GenerationMixin.generate(
                unfused, input_features=features, decoder_input_ids=prompt, num_beams=1,
                do_sample=False, max_new_tokens=count, min_new_tokens=count,
            )[0]  # fmt: skip
        return len(row) - prompt.shape[1]

    times: dict[str, list[float]] = {"ours": [], "transformers_peft": []}
    for turn in range(rounds + 1):
        for label, decode in (("ours", ours), ("transformers_peft", theirs)):
            begin = time.perf_counter()
            produced = decode()
            seconds = time.perf_counter() - begin
            if produced != count:
                raise ModelError(
                    f"speed: expected {count} new tokens from {label} every time, got {produced}; "
                    "the comparison would not be fair: please report this"
                )
            if turn:
                times[label].append(seconds)
        progress(turn + 1, rounds + 1)
    medians = {label: count / statistics.median(seconds) for label, seconds in times.items()}
    return {
        "ours": round(medians["ours"], 1),
        "transformers_peft": round(medians["transformers_peft"], 1),
        "ratio": round(medians["ours"] / medians["transformers_peft"], 2),
        "new_tokens": count,
        "batch_size": 1,
        "threads": torch.get_num_threads(),
        "rounds": {k: [round(s, 5) for s in v] for k, v in times.items()},
    }


def within_window(model: SpeechModel, utterance: Utterance) -> np.ndarray:
    """Samples of an utterance, cut off where the model's window ends."""
    samples = utterance.samples(model.sampling_rate)
    limit = model.window_seconds
    return samples if limit is None else samples[: int(limit * model.sampling_rate)]


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep generate()'s remarks about its own arguments off the terminal."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
