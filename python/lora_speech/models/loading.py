"""Load a base model, and the adapters and INT8 weights it serves.

A base is named by `"shipped"` (the small model in this package), a local folder in the Hugging Face
layout, or a name on the Hugging Face hub.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lora_speech.devices import choose_device
from lora_speech.errors import MissingExtraError, ModelError
from lora_speech.models import family_of
from lora_speech.models.base import SHIPPED, ModelFamily


@dataclass
class SpeechModel:
    """A model with all that is needed to use it.

    Attributes
    ----------
    model : torch.nn.Module
        The `transformers` model, in evaluation mode.
    processor : object
        Its processor: feature extractor and tokenizer.
    family : ModelFamily
        What is declared about its architecture.
    source : str
        Where it came from, as the caller named it.
    int8 : bool
        Whether its linears are quantized.
    adapters : tuple of str
        Names of the adapters loaded into it.
    """

    model: Any
    processor: Any
    family: ModelFamily
    source: str
    int8: bool = False
    adapters: tuple[str, ...] = field(default_factory=tuple)

    @property
    def device(self) -> torch.device:
        """Where the model is, and features are moved to."""
        return next(self.model.parameters()).device

    @property
    def sampling_rate(self) -> int:
        """Samples per second that the model expects."""
        return int(self.processor.feature_extractor.sampling_rate)

    @property
    def window_seconds(self) -> float | None:
        """Longest audio the model takes at once, in seconds; None where there is no limit."""
        if not self.family.features.fixed_window:
            return None
        return float(self.processor.feature_extractor.chunk_length)


def shipped_model_path() -> Path:
    """Return the folder of the base model inside this package.

    Raises
    ------
    ModelError
        This installation does not hold it.
    """
    path = Path(__file__).resolve().parent.parent / "assets" / "base_model"
    if not (path / "config.json").is_file():
        raise ModelError(
            f"base 'shipped': expected the model in {path}, got nothing there; install the package "
            "whole (pip install 'lora-kernels[speech]'), or name a folder or hub model instead"
        )
    return path


def load_base(
    base: str | os.PathLike[str] = SHIPPED, *, device: str | torch.device = "cpu"
) -> SpeechModel:
    """Load a base model with its processor, in fp32 and evaluation mode.

    Parameters
    ----------
    base : str or path
        `"shipped"`, a local folder or a hub name such as `"openai/whisper-tiny"`.
    device : str or torch.device
        Where the weights go: see `devices.choose_device`.

    Returns
    -------
    SpeechModel

    Raises
    ------
    ModelError
        Nothing is there, a file is missing or corrupt, or the family is unknown. Without a
        connection, a hub name works once its files are in the local cache.
    SpeechError
        The device cannot be used.
    """
    where = choose_device(device)  # before the model takes its time to load
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError(
            "loading a model needs transformers; install the speech extra: "
            "pip install 'lora-kernels[speech]'"
        ) from error

    location = _locate(base)
    family = family_of(_model_type(location, transformers))
    model_class = getattr(transformers, family.model_class)
    processor_class = getattr(transformers, family.processor_class)
    try:
        # safetensors only: a pickled checkpoint could run code of its own.
        with _no_bars(transformers.utils.logging):
            model = model_class.from_pretrained(location, dtype=torch.float32, use_safetensors=True)
            processor = processor_class.from_pretrained(location)
    except Exception as error:  # transformers and its clients raise many unrelated types
        raise ModelError(
            f"base {str(base)!r}: expected a complete {family.name} in the Hugging Face layout "
            f"(config, safetensors weights, tokenizer, feature extractor), but loading failed: "
            f"{_first_line(error)}; download or save it again"
        ) from error
    model.eval().to(where)
    model.requires_grad_(False)
    return SpeechModel(model=model, processor=processor, family=family, source=str(base))


def load_for_serving(
    base: str | os.PathLike[str] | SpeechModel = SHIPPED,
    adapters: Mapping[str, str | os.PathLike[str]] | None = None,
    *,
    int8: bool = False,
    device: str | torch.device | None = None,
) -> SpeechModel:
    """Load a base, quantize it on request, and load adapters that stay unmerged.

    Parameters
    ----------
    base : str, path or SpeechModel
        As in `load_base`; a loaded model is changed in place.
    adapters : mapping, optional
        PEFT folder per adapter name.
    int8 : bool
        Quantize the linears to INT8 (dynamic activations).
    device : str or torch.device, optional
        Where the model runs: "auto", "cpu", "cuda" or "cuda:N", see `devices.choose_device`. None
        leaves a loaded model where it is, and takes the CPU for others.

    Returns
    -------
    SpeechModel
        Fused by `lora_kernels`; choose adapters with `lora_kernels.use_adapters` or the `adapter`
        argument of this package's functions.
    """
    import lora_kernels as lk

    where = None if device is None else choose_device(device)
    speech_model = base if isinstance(base, SpeechModel) else load_base(base)
    if int8 and not speech_model.int8:
        lk.quantize(speech_model.model, lk.Int8Dynamic(), modules=quantized_names(speech_model))
        speech_model.int8 = True
    lk.swap(speech_model.model)
    if where is not None:  # weights are packed on the host, banks made where the weights are
        speech_model.model.to(where)
    for name, folder in (adapters or {}).items():
        lk.load_adapter(speech_model.model, folder, name=name)
        if name not in speech_model.adapters:
            speech_model.adapters += (name,)
    return speech_model


def quantized_names(speech_model: SpeechModel) -> list[str]:
    """Full names of the modules that the family declares quantized, in the model's order."""
    family = speech_model.family
    return [
        name
        for name, module in speech_model.model.named_modules()
        if family.covers(name, family.quantized)
        and not family.covers(name, family.floating_point)
        and getattr(module, "weight", None) is not None
    ]


@contextmanager
def _no_bars(logging: Any) -> Iterator[None]:
    """Keep transformers' bars off the terminal: loading a local model takes no time to show."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _locate(base: str | os.PathLike[str]) -> str:
    if isinstance(base, str) and base == SHIPPED:
        return str(shipped_model_path())
    path = Path(base).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(
                f"base {path}: expected a model folder with config.json, got one without; name "
                "the folder that save_pretrained wrote (an adapter folder is given separately)"
            )
        return str(path)
    text = str(base)
    hub_like = not text.startswith(("/", ".", "~")) and text.count("/") <= 1 and text
    if path.exists() or not hub_like:
        got = "a file" if path.exists() else "nothing there"
        raise ModelError(
            f"base {text!r}: expected 'shipped', a model folder or a hub name, got {got}; "
            "check the path"
        )
    return text


def _model_type(location: str, transformers: Any) -> str:
    path = Path(location) / "config.json"
    try:
        if path.is_file():
            return str(json.loads(path.read_text(encoding="utf-8")).get("model_type"))
        return str(transformers.AutoConfig.from_pretrained(location).model_type)
    except json.JSONDecodeError as error:
        raise ModelError(
            f"base {location}: config.json is not JSON ({error}); save it again"
        ) from error
    except Exception as error:  # offline, unknown name, unknown architecture: all end here
        raise ModelError(
            f"base {location!r}: no such folder here, and it cannot be had from the Hugging Face "
            f"hub ({_first_line(error)}); check the name and the connection, or use --base shipped"
        ) from error


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
