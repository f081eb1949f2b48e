"""Whether the packages that a target needs are there, in versions that the extras ask for."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata, util

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lora_speech.errors import MissingExtraError


def require_packages(target: str, names: Sequence[str], extra: str) -> None:
    """Refuse packages that are missing, or of a version outside this package's own requirements.

    Parameters
    ----------
    target : str
        Who needs them.
    names : sequence of str
        Importable names.
    extra : str
        The extra that installs them beside `speech`; "" where that does.

    Raises
    ------
    MissingExtraError
        Naming the packages, the versions found and needed, and the command that mends it.
    """
    command = f"pip install 'lora-kernels[{','.join(filter(None, ('speech', extra)))}]'"
    missing = [name for name in names if util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"--to {target}: expected the package{'s' * (len(missing) > 1)} "
            f"{', '.join(missing)}, which {'are' if len(missing) > 1 else 'is'} not installed; "
            f"{command}"
        )
    unfit = [f"{found}, expected {needed}" for found, needed in _unfit(names, extra)]
    if unfit:
        raise MissingExtraError(f"--to {target}: got {'; '.join(unfit)}; {command}")


def installed(names: Sequence[str]) -> dict[str, str]:
    """Versions of what provides importable names, by distribution."""
    providers = metadata.packages_distributions()
    return {
        provider: metadata.version(provider)
        for name in names
        for provider in providers.get(name, ())
    }


def _unfit(names: Sequence[str], extra: str) -> list[tuple[str, Requirement]]:
    """What is installed, and what is required of it."""
    try:
        texts = metadata.requires("lora-kernels") or []
    except metadata.PackageNotFoundError:  # run from its sources: nothing says what is required
        return []
    required = {
        canonicalize_name(r.name): r
        for r in map(Requirement, texts)
        if r.marker is None or any(r.marker.evaluate({"extra": e}) for e in ("speech", extra))
    }
    found = []
    for provider, version in installed(names).items():
        requirement = required.get(canonicalize_name(provider))
        if requirement and not requirement.specifier.contains(version, prereleases=True):
            needed = Requirement(f"{requirement.name}{requirement.specifier}")  # without its extra
            found.append((f"{provider} {version}", needed))
    return found
