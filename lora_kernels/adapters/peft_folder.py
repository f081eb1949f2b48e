"""PEFT adapter folders in and out: ``adapter_config.json`` and ``adapter_model.safetensors``.

Writing gives the bytes that PEFT's own ``save_pretrained`` gives for the same adapter. Only
safetensors are read: a pickled ``adapter_model.bin`` could run any code when it is opened.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..errors import AdapterError, UnsupportedError, describe_nearest
from .adapter import Adapter, AdapterLayer
from .peft_config import refuse_unsupported, resolve_scale

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLED_NAME = "adapter_model.bin"
KEY_PREFIX = "base_model.model."
_SUFFIXES = {".lora_A.weight": "lora_A", ".lora_B.weight": "lora_B"}


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    if not folder.is_dir():
        raise AdapterError(
            f"folder: expected a PEFT adapter folder, got {str(folder)!r}, which is not a folder; "
            "pass the folder that save_pretrained() wrote"
        )
    if not path.is_file():
        children = sorted(p.parent.name for p in folder.glob(f"*/{CONFIG_NAME}"))
        hint = f"one of its subfolders {children}" if children else "the folder of one adapter"
        raise AdapterError(
            f"folder: expected {CONFIG_NAME} in {str(folder)!r}, got none; pass {hint}"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise AdapterError(
            f"{path}: expected JSON, got a file that does not parse ({error}); it is truncated or "
            "damaged, copy or save the adapter again"
        ) from error
    if not isinstance(config, dict):
        raise AdapterError(f"{path}: expected a JSON object, got {type(config).__name__}")
    return config


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        if (folder / PICKLED_NAME).is_file():
            raise UnsupportedError(
                f"{folder / PICKLED_NAME}: expected {WEIGHTS_NAME}, got a pickled file, which can "
                "run any code when it is opened; load it with PEFT where you trust it and call "
                "save_pretrained(folder, safe_serialization=True)"
            )
        raise AdapterError(
            f"folder: expected {WEIGHTS_NAME} in {str(folder)!r}, got none; the save was "
            "interrupted, save the adapter again"
        )
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(
            f"{path}: expected a complete safetensors file, got {path.stat().st_size} bytes that "
            f"do not parse ({error}); it is truncated or damaged, copy or save the adapter again"
        ) from error


def _split_key(key: str, path: Path) -> tuple[str, str]:
    """Module name and ``lora_A`` or ``lora_B`` of a key of the weights file."""
    for suffix, label in _SUFFIXES.items():
        if key.endswith(suffix):
            return key.removesuffix(suffix).removeprefix(KEY_PREFIX), label
    if "lora_magnitude_vector" in key:
        word = "DoRA's magnitudes; DoRA cannot be served live"
    elif "lora_embedding" in key:
        word = "LoRA on an embedding; only linear layers and pointwise convolutions are served live"
    elif key.endswith(("lora_B.bias", "lora_A.bias")):
        word = "a bias inside LoRA (lora_bias=True), which is not served live"
    else:
        word = "a whole trained tensor (modules_to_save or a trained bias), not served live"
    raise UnsupportedError(
        f"{path}: expected keys that end in .lora_A.weight or .lora_B.weight, got {key!r}, {word}; "
        "merge this adapter with PEFT's merge_and_unload()"
    )


def adapter_from_tensors(
    tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], path: Path
) -> Adapter:
    """Pair the tensors of a PEFT state dict and resolve each module's scale.

    Raises
    ------
    AdapterError, UnsupportedError
        See :func:`read_peft_folder`.
    """
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    # LoRA's own unsupported tensors first: they explain whole tensors saved beside them.
    for key, tensor in sorted(tensors.items(), key=lambda item: "lora_" not in item[0]):
        name, label = _split_key(key, path)
        pairs.setdefault(name, {})[label] = tensor
    layers = {}
    for name, pair in pairs.items():
        missing = {"lora_A", "lora_B"} - pair.keys()
        if missing:
            raise AdapterError(
                f"{path}: expected lora_A and lora_B of {name!r}, got no {missing.pop()}; "
                "the file is damaged, save the adapter again"
            )
        a, b = pair["lora_A"], pair["lora_B"]
        layers[name] = AdapterLayer(a, b, resolve_scale(config, name, int(a.shape[0])))
    return Adapter(layers, config)


def read_peft_folder(folder: str | os.PathLike[str]) -> Adapter:
    """Read an adapter that PEFT (or :func:`write_peft_folder`) saved.

    Parameters
    ----------
    folder
        The folder with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Returns
    -------
    Adapter
        On the CPU, in the dtype of the file.

    Raises
    ------
    AdapterError
        If a file is missing, truncated or damaged, if shapes, ranks or values are unusable.
    UnsupportedError
        For DoRA, LoRA biases, ``modules_to_save``, pickled weights and what else cannot be
        served live; the text says what to do instead.
    """
    path = Path(folder)
    config = _read_config(path)
    refuse_unsupported(config, str(path))
    return adapter_from_tensors(_read_tensors(path), config, path / WEIGHTS_NAME)


def _config_text(config: Mapping[str, Any]) -> str:
    # PEFT's own formatting (PeftConfigMixin.save_pretrained): sets as lists, sorted keys.
    plain = {k: sorted(v) if isinstance(v, (set, frozenset)) else v for k, v in config.items()}
    return json.dumps(plain, indent=2, sort_keys=True)


def write_peft_folder(adapter: Adapter, folder: str | os.PathLike[str]) -> Path:
    """Write an adapter as a PEFT folder, byte-identical to what PEFT saves for it.

    The files are written beside their destination and renamed into place, so that nothing
    half-written remains if the process dies: a new folder appears whole, in an existing folder
    each file is replaced whole (weights first; a reader that meets the old configuration beside
    the new weights gets an error when their ranks differ).

    Parameters
    ----------
    adapter
        The adapter.
    folder
        Where to write it; parents are created.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    AdapterError
        If ``folder`` names a file.
    """
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise AdapterError(
            f"folder: expected a folder to write to, got the file {str(target)!r}; pass another"
        )
    tensors = {}
    for name, layer in adapter.layers.items():
        tensors[f"{KEY_PREFIX}{name}.lora_A.weight"] = layer.lora_a.detach().cpu().contiguous()
        tensors[f"{KEY_PREFIX}{name}.lora_B.weight"] = layer.lora_b.detach().cpu().contiguous()
    # Two names may share one storage (A initialised once for several modules): safetensors
    # refuses that, so later names get their own copy, as in PEFT.
    seen: set[int] = set()
    for key, tensor in tensors.items():
        if tensor.data_ptr() in seen and tensor.numel():
            tensors[key] = tensor.clone()
        seen.add(tensor.data_ptr())
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        save_file(tensors, staging / WEIGHTS_NAME, metadata={"format": "pt"})
        (staging / CONFIG_NAME).write_text(_config_text(adapter.config), encoding="utf-8")
        for name in (WEIGHTS_NAME, CONFIG_NAME):
            with open(staging / name, "rb") as file:
                os.fsync(file.fileno())
        # mkdtemp makes folders that only their owner can enter; a saved adapter is as open as
        # any other new folder.
        mask = os.umask(0)
        os.umask(mask)
        staging.chmod(0o777 & ~mask)
        if target.exists():
            for name in (WEIGHTS_NAME, CONFIG_NAME):
                os.replace(staging / name, target / name)
        else:
            os.rename(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def unmatched_modules_text(adapter: Adapter, known: list[str]) -> str | None:
    """An error text when an adapter names modules that a model lacks, else None."""
    missing = [name for name in adapter if name not in set(known)]
    if not missing:
        return None
    listed = ", ".join(map(repr, missing[:4])) + (" ..." if len(missing) > 4 else "")
    return (
        f"adapter: expected names of this model's linear layers or pointwise convolutions, got "
        f"{len(missing)} of {len(adapter)} that it lacks ({listed}); for {missing[0]!r} "
        f"{describe_nearest(missing[0], known)}; load the adapter on the model it was trained for"
    )
