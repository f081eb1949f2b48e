"""Small charts as inline SVG, coloured by the page's CSS variables (light and dark alike)."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence


def bar_chart(
    bars: Sequence[tuple[str, float, str, str]],
    *,
    label: str,
    width: int = 660,
    row: int = 44,
) -> str:
    """Draw horizontal bars, one per row, each with its value written at its end.

    Parameters
    ----------
    bars : sequence of (name, value, text, css class)
        Values of 0 or more; `text` is written at the bar's end.
    label : str
        What the chart shows, for screen readers.
    width, row : int
        Pixels of the whole and per bar.
    """
    left, right = 205, 150
    largest = max((value for _, value, _, _ in bars), default=0.0) or 1.0
    parts = []
    for index, (name, value, text, style) in enumerate(bars):
        y = index * row + 8
        length = max(2.0, (width - left - right) * value / largest)
        parts.append(
            f'<text x="{left - 12}" y="{y + 18}" class="name">{html.escape(name)}</text>'
            f'<rect x="{left}" y="{y}" width="{length:.1f}" height="{row - 16}" rx="4" '
            f'class="{style}"/>'
            f'<text x="{left + length + 8:.1f}" y="{y + 18}" class="value">{html.escape(text)}'
            "</text>"
        )
    return _svg(width, len(bars) * row, label, "".join(parts))


def line_chart(
    values: Sequence[float],
    marks: Sequence[tuple[int, float]] = (),
    *,
    label: str,
    width: int = 720,
    height: int = 260,
) -> str:
    """Draw a loss curve (raw and smoothed) over steps, and rates in [0, 1] as marked points.

    Parameters
    ----------
    values : sequence of float
        The loss of steps 1, 2, ...
    marks : sequence of (step, rate)
        Validation word error rates, drawn against the right axis (0 to 100 %).
    label : str
        What the chart shows, for screen readers.
    width, height : int
        Pixels.
    """
    left, right, top, bottom = 48, 52, 14, 34
    inner_width, inner_height = width - left - right, height - top - bottom
    steps = max(len(values), 2)
    highest = nice_ceiling(max(values, default=1.0))

    def x(step: float) -> float:
        return left + inner_width * (step - 1) / (steps - 1)

    def y(share: float) -> float:
        return top + inner_height * (1.0 - min(1.0, max(0.0, share)))

    grid = []
    for tick in range(5):
        share = tick / 4
        grid.append(
            f'<line x1="{left}" x2="{width - right}" y1="{y(share):.1f}" y2="{y(share):.1f}" '
            'class="grid"/>'
            f'<text x="{left - 8}" y="{y(share) + 4:.1f}" class="tick end">'
            f"{highest * share:.3g}</text>"
        )
        if marks:
            grid.append(
                f'<text x="{width - right + 8}" y="{y(share) + 4:.1f}" class="tick wer">'
                f"{share:.0%}</text>"
            )
    for tick in range(5):
        step = round(1 + (steps - 1) * tick / 4)
        grid.append(f'<text x="{x(step):.1f}" y="{height - 10}" class="tick middle">{step}</text>')
    raw = " ".join(f"{x(i):.1f},{y(v / highest):.1f}" for i, v in enumerate(values, 1))
    soft = " ".join(f"{x(i):.1f},{y(v / highest):.1f}" for i, v in enumerate(smooth(values), 1))
    curve = f'<polyline points="{raw}" class="raw"/><polyline points="{soft}" class="smooth"/>'
    line = " ".join(f"{x(step):.1f},{y(rate):.1f}" for step, rate in marks)
    points = f'<polyline points="{line}" class="werline"/>' if len(marks) > 1 else ""
    for step, rate in marks:
        points += (
            f'<circle cx="{x(step):.1f}" cy="{y(rate):.1f}" r="4.5" class="point">'
            f"<title>step {step}: {rate:.1%}</title></circle>"
        )
    return _svg(width, height, label, "".join(grid) + curve + points)


def smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average without the bias towards the first value."""
    result, mean = [], 0.0
    for index, value in enumerate(values, start=1):
        mean = weight * mean + (1.0 - weight) * value
        result.append(mean / (1.0 - weight**index))
    return result


def nice_ceiling(value: float) -> float:
    """Smallest 1, 2, 4, 5 or 8 times a power of ten that is not below `value`."""
    if not value > 0 or not math.isfinite(value):
        return 1.0
    unit = 10.0 ** math.floor(math.log10(value))
    return next(step * unit for step in (1, 2, 4, 5, 8, 10) if step * unit >= value * 0.999999)


def _svg(width: int, height: int, label: str, body: str) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(label)}" '
        f'preserveAspectRatio="xMinYMin meet" style="max-width:{width}px">{body}</svg>'
    )
