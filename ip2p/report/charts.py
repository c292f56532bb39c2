"""Line charts as inline SVG: they follow the page's colours, so one file serves light and dark mode.

Series colours come from the CSS classes `s0` to `s7` of the page that holds the chart; the ninth has the first's.
"""

import math
from dataclasses import dataclass
from html import escape

from ip2p.evaluate.bootstrap import Estimate

WIDTH, HEIGHT = 420, 280
COLOURS = 8
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 14, 42


@dataclass(frozen=True)
class Point:
    """A point with its y (and, where given, x) interval, and an optional label beside it."""

    x: float
    y: Estimate
    label: str = ""
    x_interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Series:
    name: str
    points: list[Point]


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that cover low..high, about `about` of them."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def _extent(values: list[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    return low - margin, high + margin


def _axis_label(value: float) -> str:
    return f"{value:.6g}".replace("-", "−")


def line_chart(series: list[Series], x_title: str, y_title: str, title: str) -> str:
    """An SVG of the series, with the 95% intervals of their points as bars. Points that are not finite are left out."""
    shown = [
        Series(line.name, [p for p in line.points if math.isfinite(p.x) and math.isfinite(p.y.mean)]) for line in series
    ]
    points = [point for line in shown for point in line.points]
    if not points:
        return ""
    finite = [v for p in points for v in (p.y.low, p.y.high, p.y.mean) if math.isfinite(v)]
    x_low, x_high = _extent([v for p in points for v in (p.x, *(p.x_interval or ()))])
    y_low, y_high = _extent(finite)

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM),
        )

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for tick in ticks(y_low, y_high):
        y = at(x_low, tick)[1]
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_axis_label(tick)}</text>')
    for tick in ticks(x_low, x_high):
        x = at(tick, y_low)[0]
        parts.append(f'<path class="grid" d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{_axis_label(tick)}</text>'
        )
    middle, half_way = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_title)}</text>')
    turned = f"translate(12 {half_way}) rotate(-90)"
    parts.append(f'<text transform="{turned}" text-anchor="middle">{escape(y_title)}</text>')
    for k, line in enumerate(shown):
        parts.append(_line(line, f"s{k % COLOURS}", at))
    parts.append("</svg>")
    return "".join(parts)


def _line(line: Series, css: str, at) -> str:
    """One series: its polyline, and (unless it has very many points) its markers, intervals and labels."""
    places = [at(point.x, point.y.mean) for point in line.points]
    parts = [f'<g class="{css}"><polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}"/>']
    if len(line.points) <= 30:
        for point, (x, y) in zip(line.points, places, strict=True):
            if math.isfinite(point.y.low) and point.y.high > point.y.low:
                parts.append(
                    f'<path d="M{x:.1f} {at(point.x, point.y.low)[1]:.1f}V{at(point.x, point.y.high)[1]:.1f}"/>'
                )
            if point.x_interval:
                low, high = (at(v, point.y.mean)[0] for v in point.x_interval)
                parts.append(f'<path d="M{low:.1f} {y:.1f}H{high:.1f}"/>')
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5"><title>{escape(line.name)} {escape(point.label)}: '
                f"({point.x:.3g}, {point.y.mean:.3f})</title></circle>"
            )
            if point.label:
                # Towards the middle where it would run out of the picture.
                dx, anchor = (6, "start") if x < 0.8 * WIDTH else (-6, "end")
                parts.append(
                    f'<text class="label" x="{x + dx:.1f}" y="{y - 6:.1f}" text-anchor="{anchor}">'
                    f"{escape(point.label)}</text>"
                )
    return "".join([*parts, "</g>"])


def legend(series: list[Series]) -> str:
    """The names of the series with their colours, as HTML that wraps on a narrow screen."""
    keys = [
        f'<span class="key s{k % COLOURS}"><i></i>{escape(line.name)}</span>'
        for k, line in enumerate(series)
        if line.points
    ]
    return "".join(keys)
