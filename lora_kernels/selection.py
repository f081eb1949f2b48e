"""Which modules of a model an argument ``modules=`` names."""

from __future__ import annotations

from collections.abc import Iterable

from .adapters.peft_config import matches_targets
from .errors import SwapError, describe_nearest


def select_modules(names: list[str], modules: str | Iterable[str] | None) -> set[str]:
    """The names that ``modules`` selects.

    Parameters
    ----------
    names
        Every candidate, as ``named_modules()`` gives it.
    modules
        None for all; a regular expression for the whole name; or a list of names or of their
        last components, as in PEFT's ``target_modules``.

    Raises
    ------
    SwapError
        If the expression, or an entry of the list, matches nothing; the text names the nearest.
    """
    if modules is None:
        return set(names)
    targets = [modules] if isinstance(modules, str) else list(modules)
    if not targets:
        raise SwapError("modules: expected at least one name, got an empty list; pass None for all")
    selected: set[str] = set()
    for target in targets:
        pattern = target if isinstance(modules, str) else [target]
        matched = {name for name in names if matches_targets(pattern, name)}
        if not matched:
            raise SwapError(
                f"modules: expected the name of a linear layer or pointwise convolution, got "
                f"{target!r}, which matches none; {describe_nearest(target, names)}; a string is a "
                "regular expression for the whole name, a list holds names or their ends"
            )
        selected |= matched
    return selected


def is_inside(name: str, owners: set[str]) -> bool:
    """Whether a module lies below one of ``owners``."""
    parts = name.split(".")
    return any(".".join(parts[:length]) in owners for length in range(1, len(parts)))
