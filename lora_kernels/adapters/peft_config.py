"""Read an ``adapter_config.json`` as PEFT reads it: targets, ranks, scales, and what is refused."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import AdapterError, UnsupportedError

# Initialisations that change the base weights: such an adapter is only right on a base that was
# changed in the same way, which a shared live base is not.
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")


def unsupported_reasons(config: Mapping[str, Any]) -> list[str]:
    """Every feature of the configuration that live serving does not carry, with its way out."""
    reasons = []
    peft_type = config.get("peft_type")
    if peft_type != "LORA":
        reasons.append(
            f"peft_type: expected 'LORA', got {peft_type!r}; convert the adapter to LoRA"
        )
    merge = "merge it into its own copy of the model with PEFT's merge_and_unload()"
    for key, word in (
        ("use_dora", "DoRA rescales the whole weight, so it has no low-rank difference"),
        ("lora_bias", "a bias in lora_B is not part of the fused operator"),
        ("use_qalora", "QALoRA pools the input of lora_A"),
        ("alora_invocation_tokens", "activated LoRA depends on the tokens"),
        ("arrow_config", "Arrow routes between adapters inside the layer"),
        ("use_bdlora", "block-diagonal LoRA needs its own operator"),
        ("velora_config", "VeLoRA changes the layer's forward"),
        ("monteclora_config", "MonteCLoRA samples its weights"),
        ("kasa_config", "KaSA adds a singular-value diagonal"),
        ("layer_replication", "layer replication changes the base model"),
        ("target_parameters", "LoRA on bare parameters has no module to serve it"),
        ("trainable_token_indices", "trained token embeddings replace base weights"),
    ):
        if config.get(key):
            reasons.append(f"{key}: {word}; {merge}")
    if config.get("modules_to_save"):
        reasons.append(
            f"modules_to_save: {config['modules_to_save']} are whole trained copies of base "
            f"modules, which one shared base cannot hold for several live adapters; {merge}, or "
            "train without modules_to_save"
        )
    if config.get("bias", "none") != "none":
        reasons.append(
            f"bias: {config['bias']!r} trains biases of the base, which all adapters share; "
            f"{merge}, or train with bias='none'"
        )
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INITS):
        reasons.append(
            f"init_lora_weights: {init!r} changed the base weights during training; save the "
            "adapter with PEFT's path_initial_model_for_weight_conversion, which converts it"
        )
    return reasons


def refuse_unsupported(config: Mapping[str, Any], source: str) -> None:
    """Raise if the configuration asks for what is not supported, with all reasons at once.

    Raises
    ------
    UnsupportedError
        Naming each field, why it is refused and what to do instead.
    """
    reasons = unsupported_reasons(config)
    if reasons:
        raise UnsupportedError(
            f"{source}: this adapter cannot be served live:\n  " + "\n  ".join(reasons)
        )


def pattern_value(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """Value of ``rank_pattern`` or ``alpha_pattern`` for a module.

    PEFT's rule (``peft.utils.other.get_pattern_key``): the first key that matches the end of the
    module's name as a regular expression, at a component boundary or from the start.
    """
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def resolve_scale(config: Mapping[str, Any], name: str, rank: int) -> float:
    """LoRA's scale of one module: ``alpha / r``, or ``alpha / sqrt(r)`` for rsLoRA.

    Parameters
    ----------
    config
        Fields of ``adapter_config.json``.
    name
        Module name relative to the base model.
    rank
        Rank of the tensors in the file.

    Raises
    ------
    AdapterError
        If the configuration gives the module another rank than its tensors have.
    """
    try:
        expected = int(pattern_value(config.get("rank_pattern") or {}, name, config.get("r", 8)))
        alpha = float(
            pattern_value(config.get("alpha_pattern") or {}, name, config.get("lora_alpha", 8))
        )
    except (TypeError, ValueError, re.error) as error:
        raise AdapterError(
            f"adapter_config.json: expected numbers in r, lora_alpha, rank_pattern and "
            f"alpha_pattern, got something else for {name!r} ({error}); save the adapter again"
        ) from error
    if expected != rank:
        raise AdapterError(
            f"{name}: expected rank {expected} by adapter_config.json (r, rank_pattern), got "
            f"lora_A with {rank} rows; config and weights belong to different adapters"
        )
    if rank == 0:
        return 1.0
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def matches_targets(targets: str | Iterable[str], name: str) -> bool:
    """Whether PEFT's ``target_modules`` names a module.

    A string is a regular expression for the whole name; a list holds names or their ends.
    """
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)
