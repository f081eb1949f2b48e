"""Whisper (OpenAI): a Transformer encoder over log-mel windows with an autoregressive decoder."""

from __future__ import annotations

from lora_speech.models.base import FeatureRecipe, ModelFamily

WHISPER = ModelFamily(
    name="Whisper",
    model_types=("whisper",),
    model_class="WhisperForConditionalGeneration",
    processor_class="WhisperProcessor",
    objective="sequence",
    lora_targets=("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    quantized=("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    # The vocabulary projection shares its weight with the token embedding; the two convolutions
    # have kernels of width 3 and see the raw features.
    floating_point=("proj_out", "embed_tokens", "embed_positions", "conv1", "conv2"),
    features=FeatureRecipe(input_name="input_features", fixed_window=True),
)
