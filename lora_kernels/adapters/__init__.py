"""Adapters: PEFT folders in and out, the ragged bank of a layer, names and selection."""

from .adapter import Adapter, AdapterLayer
from .bank import AdapterBank
from .peft_config import matches_targets, resolve_scale
from .peft_folder import read_peft_folder, write_peft_folder
from .registry import ACTIVE_SELECTION, AdapterRegistry, AdapterSelection, use_adapters

__all__ = [
    "ACTIVE_SELECTION",
    "Adapter",
    "AdapterBank",
    "AdapterLayer",
    "AdapterRegistry",
    "AdapterSelection",
    "matches_targets",
    "read_peft_folder",
    "resolve_scale",
    "use_adapters",
    "write_peft_folder",
]
