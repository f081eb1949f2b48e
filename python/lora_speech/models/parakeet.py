"""Parakeet (NVIDIA): a FastConformer encoder, eightfold subsampled, with a CTC head."""

from __future__ import annotations

from lora_speech.models.base import FeatureRecipe, ModelFamily

PARAKEET = ModelFamily(
    name="Parakeet",
    model_types=("parakeet_ctc",),
    model_class="ParakeetForCTC",
    processor_class="ParakeetProcessor",
    objective="ctc",
    lora_targets=("q_proj", "k_proj", "v_proj", "o_proj", "linear1", "linear2"),
    quantized=(
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "linear1",
        "linear2",
        "pointwise_conv1",
        "pointwise_conv2",
    ),
    # The depthwise convolution has one weight per tap and channel; relative positions and the head
    # are small and precision-sensitive.
    floating_point=("relative_k_proj", "depthwise_conv", "subsampling.linear", "ctc_head"),
    features=FeatureRecipe(input_name="input_features", fixed_window=False),
)
