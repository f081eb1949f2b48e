"""One module for each operator; ``benchmarks.gpu_suite.case`` says what it has to offer."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType


def operators() -> dict[str, ModuleType]:
    """The modules of this package by name."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return {name: importlib.import_module(f"{__name__}.{name}") for name in names}
