"""Line charts as inline SVG for reports: no script, no network, readable in print."""

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

COLOURS = ("#0b6e99", "#c4622d", "#4b8b3b", "#8a4f9e", "#b8860b", "#555555", "#b03060", "#2f4f4f")
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 460, 250, 48, 12, 26, 38


class Series(NamedTuple):
    """One line: points (x, y, low, high), ascending in x; low and high equal y where there is no interval."""

    name: str
    points: Sequence[tuple[float, float, float, float]]


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    span = high - low or 1.0
    return [low + span * i / (count - 1) for i in range(count)]


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 10 or value == int(value) else f"{value:.2f}"


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    y_range: tuple[float, float] | None = (0.0, 1.0),
) -> str:
    """An SVG with one line per series, whiskers for intervals, and a legend below the title.

    Args:
        title, x_label, y_label: Texts.
        series: At least one with at least one point, else an empty string is returned.
        y_range: Fixed range, or None for 0 to the largest value.
    """
    shown = [s for s in series if s.points]
    if not shown:
        return ""
    xs = [p[0] for s in shown for p in s.points]
    top = max(p[3] for s in shown for p in s.points)
    y0, y1 = y_range or (0.0, top * 1.1 or 1.0)
    x0, x1 = min(xs), max(xs)
    x0, x1 = (x0 - 1, x1 + 1) if x0 == x1 else (x0, x1)

    def at(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + (x - x0) / (x1 - x0) * (_WIDTH - _LEFT - _RIGHT)
        return across, _TOP + (1 - (min(max(y, y0), y1) - y0) / (y1 - y0)) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT + 16 * len(shown)}" role="img" aria-label="{escape(title)}">']
    parts.append(f'<text x="{_LEFT}" y="15" class="t">{escape(title)}</text>')
    for y in _ticks(y0, y1):
        _, row = at(x0, y)
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{row:.1f}" y2="{row:.1f}" class="grid"/>')
        parts.append(f'<text x="{_LEFT - 5}" y="{row + 4:.1f}" class="l" text-anchor="end">{_number(y)}</text>')
    distinct = sorted(set(xs))
    for x in distinct if len(distinct) <= 10 else _ticks(x0, x1):
        column, _ = at(x, y0)
        parts.append(f'<text x="{column:.1f}" y="{_HEIGHT - 22}" class="l" text-anchor="middle">{_number(x)}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 6}" class="l" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(f'<text x="12" y="{_HEIGHT / 2}" class="l" text-anchor="middle" '
                 f'transform="rotate(-90 12 {_HEIGHT / 2})">{escape(y_label)}</text>')  # fmt: skip
    for index, one in enumerate(shown):
        parts += _line(one, COLOURS[index % len(COLOURS)], at, _HEIGHT + 10 + 16 * index)
    return "".join([*parts, "</svg>"])


def _line(one: Series, colour: str, at, legend: float) -> list[str]:  # type: ignore[no-untyped-def]
    places = [at(x, y) for x, y, _, _ in one.points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    parts = [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>']
    for (x, y), (value, _, low, high) in zip(places, one.points, strict=True):
        if high > low:
            top, bottom = at(value, high)[1], at(value, low)[1]
            parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{bottom:.1f}" stroke="{colour}"/>')
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')
    parts.append(f'<rect x="{_LEFT}" y="{legend - 9}" width="10" height="10" fill="{colour}"/>')
    parts.append(f'<text x="{_LEFT + 15}" y="{legend}" class="l">{escape(one.name)}</text>')
    return parts


def interval_bar(score: float, low: float, high: float, baseline: float) -> str:
    """A small bar: the interval, the score, and a tick at what a constant answer gets."""

    def x(value: float) -> float:
        return 1 + 118 * min(max(value, 0.0), 1.0)

    return (
        '<svg class="bar" viewBox="0 0 120 14"><rect x="1" y="6" width="118" height="2" fill="#ddd"/>'
        f'<rect x="{x(low):.1f}" y="4" width="{max(1.0, x(high) - x(low)):.1f}" height="6" fill="#9cc4d6"/>'
        f'<rect x="{x(baseline) - 0.7:.1f}" y="1" width="1.4" height="12" fill="#c4622d"/>'
        f'<circle cx="{x(score):.1f}" cy="7" r="3.5" fill="#0b6e99"/></svg>'
    )
