"""What a model family declares about itself.

One frozen `ModelFamily` per file of this folder holds all that differs between architectures:
class names, which layers LoRA and INT8 touch, how audio becomes model input. A new family is a new
file with one such object, added to `FAMILIES` in `lora_speech.models`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SHIPPED = "shipped"
"""The name of the base model inside this package."""


@dataclass(frozen=True)
class FeatureRecipe:
    """How audio becomes model input.

    Attributes
    ----------
    input_name : str
        The argument of `forward` that takes the features.
    fixed_window : bool
        True: every input is padded to one length, which the feature extractor's `chunk_length`
        (seconds) gives, and longer audio must be cut. False: inputs are as long as the audio, with
        an attention mask over the padding of a batch.
    """

    input_name: str
    fixed_window: bool


@dataclass(frozen=True)
class ModelFamily:
    """Everything about one architecture that code elsewhere needs to know.

    Attributes
    ----------
    name : str
        How the family is called in messages.
    model_types : tuple of str
        Values of `model_type` in a `config.json` that belong to the family.
    model_class, processor_class : str
        Names of the classes in `transformers`.
    objective : {"sequence", "ctc"}
        Sequence: an encoder with an autoregressive decoder. CTC: frame-wise labels.
    lora_targets : tuple of str
        Last components of the names of the linears that LoRA adapts by default.
    quantized : tuple of str
        Last components of the names of the linears and pointwise convolutions that INT8 covers.
    floating_point : tuple of str
        What stays in floating point under INT8, and therefore must not appear in `quantized`.
    features : FeatureRecipe
        How audio becomes model input.
    """

    name: str
    model_types: tuple[str, ...]
    model_class: str
    processor_class: str
    objective: Literal["sequence", "ctc"]
    lora_targets: tuple[str, ...]
    quantized: tuple[str, ...]
    floating_point: tuple[str, ...]
    features: FeatureRecipe

    def __post_init__(self) -> None:
        both = set(self.quantized) & set(self.floating_point)
        if both:
            raise ValueError(
                f"{self.name}: {sorted(both)} are declared both quantized and floating point; "
                "keep each in one of the two"
            )

    def covers(self, module_name: str, suffixes: tuple[str, ...]) -> bool:
        """Tell whether a dotted module name ends in one of the suffixes."""
        return any(module_name == s or module_name.endswith("." + s) for s in suffixes)
