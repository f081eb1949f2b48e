"""Live adapters of a model: load, add, replace, remove and save by name."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from .adapters.adapter import Adapter
from .adapters.bank import AdapterBank, check_features
from .adapters.peft_folder import read_peft_folder, unmatched_modules_text, write_peft_folder
from .adapters.registry import AdapterRegistry
from .errors import AdapterError, UnsupportedError
from .integrations.peft_layers import is_peft_layer
from .integrations.whisper_generation import follow_rows, unfollow_rows
from .nn.adapter_host import AdapterHost
from .nn.lora_linear import is_pointwise, specialise

_REGISTRY = "_lora_kernels_registry"
# One lock for all models: changes are rare, and a lock per model could be neither copied nor saved.
_LOCK = threading.RLock()


@dataclass(frozen=True)
class AdapterInfo:
    """What is known of one live adapter.

    Attributes
    ----------
    index
        Its place in every bank; what ``adapter_ids`` holds.
    modules
        Number of modules it changes.
    ranks
        Smallest and largest rank.
    nbytes
        Bytes of its A and B.
    content_hash
        sha256 of its names, scales and tensors; the key of every cache that depends on it.
    base_model
        The base it was trained on, if its configuration says.
    """

    name: str
    index: int
    modules: int
    ranks: tuple[int, int]
    nbytes: int
    content_hash: str
    base_model: str | None


def registry_of(model: nn.Module) -> AdapterRegistry | None:
    """The registry of a model with live adapters, or None."""
    registry = model.__dict__.get(_REGISTRY)
    return registry if isinstance(registry, AdapterRegistry) else None


def drop_registry(model: nn.Module) -> None:
    """Forget every live adapter of a model."""
    with _LOCK:
        for module in model.modules():
            if isinstance(module, AdapterHost):  # one without a bank may still name the registry
                module.set_bank(None, None)
        unfollow_rows(model)
        model.__dict__.pop(_REGISTRY, None)


def _candidates(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that an adapter may name: hosts, and what can become one."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, AdapterHost)
        or type(module) is nn.Linear
        or (type(module) is nn.Conv1d and is_pointwise(module))
    }


def _features(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, AdapterHost):
        return module.adapter_features
    if isinstance(module, nn.Conv1d):
        return module.in_channels, module.out_channels
    assert isinstance(module, nn.Linear)
    return module.in_features, module.out_features


def _refuse_peft(model: nn.Module) -> None:
    if any(is_peft_layer(module) for module in model.modules()):
        raise UnsupportedError(
            "model: expected a base model, got one with PEFT's own LoRA layers; take the base out "
            "with PEFT's unload() (or merge_and_unload()) and load live adapters on that, or keep "
            "PEFT's adapters and call swap(model)"
        )


def add_adapter(model: nn.Module, adapter: Adapter, name: str) -> AdapterInfo:
    """Make an adapter live under a name; a known name is replaced (hot-swap).

    Other threads may be using the model: a block of ``use_adapters()`` that has begun goes on with
    the adapters there were, and the next one sees the new.

    The linear layers and pointwise convolutions it names become LoraLinear and
    LoraPointwiseConv1d in place (quantized ones already carry adapters). Either every layer
    changes or, on an error, none.

    Parameters
    ----------
    model
        The base model (any module).
    adapter
        The adapter.
    name
        What ``use_adapters()`` calls it.

    Returns
    -------
    AdapterInfo

    Raises
    ------
    AdapterError
        If the adapter names modules that the model lacks (the nearest are listed), or its sizes
        are those of another model.
    UnsupportedError
        If the model carries PEFT's own LoRA layers.
    """
    if not isinstance(name, str) or not name:
        raise AdapterError(f"name: expected a non-empty string, got {name!r}")
    with _LOCK:
        _refuse_peft(model)
        candidates = _candidates(model)
        problem = unmatched_modules_text(adapter, list(candidates))
        if problem is not None:
            raise AdapterError(problem)
        for module_name, layer in adapter.layers.items():
            check_features(module_name, layer, *_features(candidates[module_name]))
        registry = registry_of(model) or AdapterRegistry()
        index = registry.free_index(name)
        capacity = max(registry.capacity, index + 1)
        banks: dict[str, AdapterBank] = {}
        for module_name, module in candidates.items():
            new = adapter.layers.get(module_name)
            if isinstance(module, AdapterHost):
                if new is not None or module.bank is not None:
                    banks[module_name] = module.bank_with(index, new, capacity)
            elif new is not None:
                layers = [new if place == index else None for place in range(capacity)]
                banks[module_name] = AdapterBank.pack(layers, *_features(module))
        changes: list[tuple[AdapterHost, AdapterBank | None]] = []
        for module_name, bank in banks.items():
            module = candidates[module_name]
            if not isinstance(module, AdapterHost):
                specialise(module)
            assert isinstance(module, AdapterHost)
            changes.append((module, bank.to(module.adapter_device)))
        _put_in_place(registry, changes, lambda: registry.put(name, adapter))
        model.__dict__[_REGISTRY] = registry
        follow_rows(model)
        return _info(registry, name)


def load_adapter(
    model: nn.Module, folder: str | os.PathLike[str], *, name: str | None = None
) -> AdapterInfo:
    """Read a PEFT adapter folder and make it live; see :func:`add_adapter`.

    Parameters
    ----------
    model
        The base model.
    folder
        What PEFT's ``save_pretrained`` (or :func:`save_adapter`) wrote.
    name
        Its name; None for the folder's own. A known name is replaced (hot-swap).
    """
    adapter = read_peft_folder(folder)
    return add_adapter(model, adapter, name or Path(folder).resolve().name)


def remove_adapter(model: nn.Module, name: str) -> None:
    """Forget a live adapter; who is using it in another thread goes on to the end of its block.

    Raises
    ------
    AdapterError
        If the name is unknown; the text lists the known ones.
    """
    with _LOCK:
        registry = _registry(model, name)
        index = registry.index(name)
        changes: list[tuple[AdapterHost, AdapterBank | None]] = []
        for module in model.modules():
            if isinstance(module, AdapterHost) and module.bank is not None:
                layers = module.bank.unpack()
                layers[index] = None
                bank = module.pack_bank(layers)
                changes.append((module, bank if bank.total_rank else None))
        _put_in_place(registry, changes, lambda: registry.pop(name))


def _put_in_place(
    registry: AdapterRegistry,
    changes: list[tuple[AdapterHost, AdapterBank | None]],
    rename: Callable[[], object],
) -> None:
    """Give modules their new banks and the registry its new names, in one moment for users."""
    with registry.changing([(module, module.bank) for module, _ in changes]) as in_use:
        for module, bank in changes:
            module.set_bank(bank, registry, in_use=in_use)
        rename()


def save_adapter(model: nn.Module, name: str, folder: str | os.PathLike[str]) -> Path:
    """Write a live adapter as a PEFT folder; see :func:`lora_kernels.write_peft_folder`."""
    return write_peft_folder(_registry(model, name).get(name), folder)


def get_adapter(model: nn.Module, name: str) -> Adapter:
    """The live adapter of a name.

    Raises
    ------
    AdapterError
        If the name is unknown; the text lists the known ones.
    """
    return _registry(model, name).get(name)


def list_adapters(model: nn.Module) -> dict[str, AdapterInfo]:
    """The live adapters of a model by name, in the order in which they were first added."""
    registry = registry_of(model)
    return {} if registry is None else {name: _info(registry, name) for name in registry.names}


def _registry(model: nn.Module, name: str) -> AdapterRegistry:
    """The model's registry, or an empty one, whose every look-up explains itself."""
    registry = registry_of(model) or AdapterRegistry()
    registry.index(name)
    return registry


def _info(registry: AdapterRegistry, name: str) -> AdapterInfo:
    adapter = registry.get(name)
    ranks = adapter.ranks.values()
    return AdapterInfo(
        name=name,
        index=registry.index(name),
        modules=len(adapter),
        ranks=(min(ranks), max(ranks)),
        nbytes=adapter.nbytes,
        content_hash=adapter.content_hash,
        base_model=adapter.config.get("base_model_name_or_path"),
    )
