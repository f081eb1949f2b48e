"""From samples to model input, as the model's family declares it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lora_speech.errors import AudioError
from lora_speech.models.loading import SpeechModel


def extract_features(
    speech_model: SpeechModel,
    recordings: Sequence[np.ndarray],
    *,
    names: Sequence[str] | None = None,
) -> dict[str, torch.Tensor]:
    """Turn recordings into one batch of model input.

    Parameters
    ----------
    speech_model : SpeechModel
        Whose features to make.
    recordings : sequence of numpy.ndarray
        float32 [samples] each, at the model's sampling rate.
    names : sequence of str, optional
        How error messages call the recordings.

    Returns
    -------
    dict
        Keyword arguments of the model's `forward`. Fixed windows: one tensor
        [batch, mel bands, frames]. Otherwise features padded to the longest, with an
        `attention_mask` where the processor makes one.

    Raises
    ------
    AudioError
        A recording is longer than the model's window (cut it first: `transcription` does).
    """
    extractor = speech_model.processor.feature_extractor
    rate = speech_model.sampling_rate
    window = speech_model.window_seconds
    if window is None:
        return dict(
            extractor(list(recordings), sampling_rate=rate, padding=True, return_tensors="pt")
        )
    limit = int(window * rate)
    for index, recording in enumerate(recordings):
        if len(recording) > limit:
            name = names[index] if names else f"recording {index}"
            raise AudioError(
                f"{name}: expected at most {window:g} s, the window of this model, got "
                f"{len(recording) / rate:.2f} s; cut it into shorter utterances"
            )
    batch = extractor(
        list(recordings),
        sampling_rate=rate,
        padding="max_length",
        max_length=limit,
        return_tensors="pt",
    )
    name = speech_model.family.features.input_name
    return {name: batch[name].to(torch.float32)}
