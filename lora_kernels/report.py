"""What a swap or a quantization did to a model, readable by people and programs."""

from __future__ import annotations

import re
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Change:
    """One module that was replaced.

    Attributes
    ----------
    name
        Its name in ``named_modules()``.
    before, after
        Names of its class (or of what computes it) before and after.
    """

    name: str
    before: str
    after: str


@dataclass(frozen=True)
class Kept:
    """One module that was left as it is, and why."""

    name: str
    kind: str
    reason: str


def collapse(names: list[str]) -> list[str]:
    """Names with layer numbers folded: ``layers.0.fc1``, ``layers.1.fc1`` -> ``layers.0-1.fc1``.

    Order of first appearance is kept.
    """
    groups: dict[str, list[tuple[int, ...]]] = {}
    for name in names:
        template = re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)", "#", name)
        numbers = tuple(int(n) for n in re.findall(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)", name))
        groups.setdefault(template, []).append(numbers)
    folded = []
    for template, members in groups.items():
        text = template
        for column in zip(*members, strict=True):
            distinct = sorted(set(column))
            contiguous = distinct == list(range(distinct[0], distinct[-1] + 1))
            if len(distinct) == 1:
                shown = str(distinct[0])
            elif contiguous:
                shown = f"{distinct[0]}-{distinct[-1]}"
            else:
                shown = "{" + ",".join(map(str, distinct)) + "}"
            text = text.replace("#", shown, 1)
        folded.append(text)
    return folded


@dataclass(frozen=True)
class SwapReport:
    """What was replaced, what was left, and why.

    Attributes
    ----------
    replaced, kept
        One entry per module, in the model's order.
    notes
        Remarks about the whole model.
    """

    title: str = "swap"
    replaced: list[Change] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.replaced)

    def reason(self, name: str) -> str | None:
        """Why a module was left, or None if it was replaced or never considered."""
        return next((kept.reason for kept in self.kept if kept.name == name), None)

    def __str__(self) -> str:
        lines = [f"{self.title}: {len(self.replaced)} modules replaced, {len(self.kept)} left"]
        kinds: dict[tuple[str, str], list[str]] = {}
        for change in self.replaced:
            kinds.setdefault((change.before, change.after), []).append(change.name)
        for (before, after), names in kinds.items():
            lines.append(f"  {before} -> {after} ({len(names)}):")
            lines.extend(f"    {name}" for name in collapse(names))
        reasons: dict[tuple[str, str], list[str]] = {}
        for kept in self.kept:
            reasons.setdefault((kept.kind, kept.reason), []).append(kept.name)
        for (kind, why), names in reasons.items():
            lines.append(f"  left: {kind} ({len(names)}), {why}:")
            lines.extend(f"    {name}" for name in collapse(names))
        lines.extend(f"  note: {note}" for note in self.notes)
        return "\n".join(lines)
