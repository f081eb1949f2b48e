"""Model families and how to load one. Add a family: one file here and one entry in `FAMILIES`."""

from __future__ import annotations

from lora_speech.models.base import FeatureRecipe, ModelFamily
from lora_speech.models.parakeet import PARAKEET
from lora_speech.models.wav2vec2_conformer import WAV2VEC2_CONFORMER
from lora_speech.models.whisper import WHISPER

FAMILIES: tuple[ModelFamily, ...] = (WHISPER, PARAKEET, WAV2VEC2_CONFORMER)
"""Every family this package knows, in the order error messages list them."""


def family_of(model_type: str) -> ModelFamily:
    """Find the family of a config's `model_type`.

    Raises
    ------
    ModelError
        No family declares this type; the message lists those that exist.
    """
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    from lora_speech.errors import ModelError

    known = ", ".join(f"{f.name} ({', '.join(f.model_types)})" for f in FAMILIES)
    raise ModelError(
        f"base: expected a model of a known family, {known}, got model_type {model_type!r}; "
        "choose such a model, or declare the family in lora_speech/models"
    )


__all__ = ["FAMILIES", "FeatureRecipe", "ModelFamily", "family_of"]
