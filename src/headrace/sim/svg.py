"""Small plots as inline SVG: no script, no outside resource, readable when printed."""

from collections.abc import Sequence
from html import escape
from math import isfinite

from headrace.sim.statistics import Interval

COLORS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f", "#475569", "#a16207")
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 8, 22


def line_plot(
    rows: Sequence[Sequence[float]], names: Sequence[str], *, title: str, width: int = 420, height: int = 170
) -> str:
    """One line per column over the row number, with a legend below.

    Args:
        rows: One per control step, each of the same length; numbers that are not finite leave a gap.
        names: One per column, shown in the legend and as tooltip.
        title: What the plot shows, with units.
        width, height: Of the drawing [px].

    Raises:
        ValueError: Rows of another length than `names`; names both.
    """
    wrong = [len(row) for row in rows if len(row) != len(names)]
    if wrong:
        raise ValueError(f"{title}: {len(names)} names for rows of {wrong[0]} numbers")
    finite = [value for row in rows for value in row if isfinite(value)]
    low, high = _padded(min(finite, default=0.0), max(finite, default=1.0))
    last = max(1, len(rows) - 1)

    def place(step: int, value: float) -> str:
        x = LEFT + (width - LEFT - RIGHT) * step / last
        y = TOP + (height - TOP - BOTTOM) * (high - value) / (high - low)
        return f"{x:.1f},{y:.1f}"

    lines = []
    for column, name in enumerate(names):
        color = COLORS[column % len(COLORS)]
        dash = "" if column < len(COLORS) else ' stroke-dasharray="4 2"'
        for start, part in _finite_runs([row[column] for row in rows]):
            points = " ".join(place(start + k, value) for k, value in enumerate(part))
            lines.append(f'<polyline points="{points}" stroke="{color}"{dash}><title>{escape(name)}</title></polyline>')
    legend = "".join(
        f'<span><i style="background:{COLORS[k % len(COLORS)]}"></i>{escape(name)}</span>'
        for k, name in enumerate(names)
    )
    axes = _axes(width, height, (low, high), (0, len(rows) - 1 if rows else 0), "step")
    return (
        f'<figure class="plot"><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(title)}">{axes}<g class="lines">{"".join(lines)}</g></svg>'
        f'<div class="legend">{legend}</div></figure>'
    )


def histogram(values: Sequence[float], *, title: str, unit: str, bins: int = 24, width: int = 640) -> str:
    """Counts of `values` in `bins` equal intervals from the smallest to the largest; each bar says its range."""
    height = 180
    low, high = _padded(min(values), max(values), share=0.0)
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, int((value - low) / (high - low) * bins))] += 1
    top = max(counts)
    step = (width - LEFT - RIGHT) / bins
    bars = []
    for number, count in enumerate(counts):
        tall = (height - TOP - BOTTOM) * count / top
        start, end = (low + (high - low) * (number + k) / bins for k in (0, 1))
        bars.append(
            f'<rect x="{LEFT + number * step:.1f}" y="{height - BOTTOM - tall:.1f}" width="{step - 1:.1f}" '
            f'height="{tall:.1f}"><title>{start:.3g} to {end:.3g} {escape(unit)}: {count}</title></rect>'
        )
    axes = _axes(width, height, (0, top), (low, high), unit)
    return (
        f'<figure class="plot wide"><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {width} {height}" '
        f'role="img" aria-label="{escape(title)}">{axes}<g class="bars">{"".join(bars)}</g></svg></figure>'
    )


def interval_bar(rate: float, interval: Interval, *, width: int = 220) -> str:
    """A rate from 0 to 1 as a dot on its interval."""
    low, dot, high = (6 + (width - 12) * value for value in (interval.low, rate, interval.high))
    return (
        f'<svg class="interval" viewBox="0 0 {width} 16" role="img" aria-label="{rate:.0%}, 95 % interval '
        f'{interval.low:.0%} to {interval.high:.0%}"><line x1="6" x2="{width - 6}" y1="8" y2="8" class="rail"/>'
        f'<line x1="{low:.1f}" x2="{high:.1f}" y1="8" y2="8" class="range"/>'
        f'<circle cx="{dot:.1f}" cy="8" r="4.5"/></svg>'
    )


def _padded(low: float, high: float, *, share: float = 0.05) -> tuple[float, float]:
    if high - low < 1e-9:
        return low - 0.5, high + 0.5
    return low - share * (high - low), high + share * (high - low)


def _finite_runs(values: Sequence[float]) -> list[tuple[int, list[float]]]:
    """Unbroken stretches of finite values with their start."""
    runs: list[tuple[int, list[float]]] = []
    for number, value in enumerate(values):
        if not isfinite(value):
            continue
        if runs and runs[-1][0] + len(runs[-1][1]) == number:
            runs[-1][1].append(value)
        else:
            runs.append((number, [value]))
    return runs


def _axes(width: int, height: int, y: tuple[float, float], x: tuple[float, float], x_name: str) -> str:
    floor, right = height - BOTTOM, width - RIGHT
    parts = []
    for k in range(5):
        level = TOP + (floor - TOP) * k / 4
        value = y[1] - (y[1] - y[0]) * k / 4
        parts.append(f'<line x1="{LEFT}" x2="{right}" y1="{level:.1f}" y2="{level:.1f}"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{level + 3.5:.1f}" text-anchor="end">{value:.3g}</text>')
    parts.append(f'<text x="{LEFT}" y="{height - 6}">{x[0]:.4g}</text>')
    parts.append(f'<text x="{right}" y="{height - 6}" text-anchor="end">{x[1]:.4g} {escape(x_name)}</text>')
    return f'<g class="axes">{"".join(parts)}</g>'
