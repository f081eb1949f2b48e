"""Wav2Vec2-Conformer (Meta): a Conformer encoder over the raw waveform with a CTC head."""

from __future__ import annotations

from lora_speech.models.base import FeatureRecipe, ModelFamily

WAV2VEC2_CONFORMER = ModelFamily(
    name="Wav2Vec2-Conformer",
    model_types=("wav2vec2-conformer",),
    model_class="Wav2Vec2ConformerForCTC",
    processor_class="Wav2Vec2Processor",
    objective="ctc",
    lora_targets=(
        "linear_q",
        "linear_k",
        "linear_v",
        "linear_out",
        "intermediate_dense",
        "output_dense",
    ),
    quantized=(
        "linear_q",
        "linear_k",
        "linear_v",
        "linear_out",
        "intermediate_dense",
        "output_dense",
        "pointwise_conv1",
        "pointwise_conv2",
    ),
    floating_point=("linear_pos", "depthwise_conv", "feature_projection.projection", "lm_head"),
    features=FeatureRecipe(input_name="input_values", fixed_window=False),
)
