"""Line charts as SVG text, by hand: axes with round ticks, stage boundaries, a faint raw line under a smoothed one.

Colours and fonts are the page's CSS classes, so that a chart follows its light and dark themes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 340, 210
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 36, 30
MAX_POINTS = 300


@dataclass(frozen=True)
class Series:
    """One line: its name in the legend and its points, x ascending."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Boundary:
    """A vertical line, such as the start of a training stage."""

    x: float
    name: str


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    boundaries: Sequence[Boundary] = (),
    x_label: str = "step",
    x_range: tuple[float, float] | None = None,
    log_y: bool = False,
    smoothing: float = 0.0,
) -> str:
    """An <svg> of WIDTH x HEIGHT units. Non-finite points are left out; log_y needs positive values, else it stays linear.

    x_range: the axis' ends, so that several charts compare; None: the series' own. smoothing: 0 draws the points alone; else the share of a series' length over which its values are averaged, drawn above them.
    """
    series = [_clean(line) for line in series]
    series = [line for line in series if line.x]
    if not series:
        return ""
    values = [y for line in series for y in line.y]
    log_y = log_y and min(values) > 0 and max(values) / min(values) > 5
    own = min(line.x[0] for line in series), max(line.x[-1] for line in series)
    x_axis = _Axis(*(x_range or own), LEFT, WIDTH - RIGHT)
    y_axis = _Axis(*_padded(min(values), max(values), log_y), HEIGHT - BOTTOM, TOP, log_y)
    parts = [f'<text class="chart-title" x="{LEFT}" y="13">{escape(title)}</text>']
    for value in y_axis.ticks(4):
        y = _n(y_axis(value))
        parts.append(f'<path class="grid" d="M{LEFT} {y}H{WIDTH - RIGHT}"/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 5}" y="{_n(y_axis(value) + 3.5)}" text-anchor="end">{tick_label(value)}</text>'
        )
    for value in x_axis.ticks(5):
        x = _n(x_axis(value))
        parts.append(f'<path class="axis" d="M{x} {HEIGHT - BOTTOM}v4"/>')
        parts.append(f'<text class="tick" x="{x}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{tick_label(value)}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
    parts.append(f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 2}" text-anchor="end">{escape(x_label)}</text>')
    for boundary in boundaries:
        if x_axis.low <= boundary.x <= x_axis.high:
            x = _n(x_axis(boundary.x))
            parts.append(f'<path class="boundary" d="M{x} {TOP}V{HEIGHT - BOTTOM}"/>')
            parts.append(f'<text class="tick" x="{_n(x_axis(boundary.x) + 3)}" y="{TOP + 9}">{escape(boundary.name)}</text>')
    for number, line in enumerate(series):
        raw = thin(line)
        if smoothing > 0 and len(line.x) > 4:
            smooth = thin(Series(line.name, line.x, smoothed(line.y, max(1, round(smoothing * len(line.y))))))
            parts.append(f'<path class="line raw c{number % 6}" d="{_path(raw, x_axis, y_axis)}"/>')
            parts.append(f'<path class="line c{number % 6}" d="{_path(smooth, x_axis, y_axis)}"/>')
        else:
            parts.append(f'<path class="line c{number % 6}" d="{_path(raw, x_axis, y_axis)}"/>')
    if len(series) > 1:
        parts.append(_legend([line.name for line in series]))
    kind = ", logarithmic" if log_y else ""
    label = escape(f"{title} over {x_label}{kind}", quote=True)
    return f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Mean over a window centred on each value; it shrinks at the ends, so no value is invented there."""
    total = [0.0]
    for value in values:
        total.append(total[-1] + value)
    half = window // 2
    out = []
    for i in range(len(values)):
        reach = min(half, i, len(values) - 1 - i)
        out.append((total[i + reach + 1] - total[i - reach]) / (2 * reach + 1))
    return out


def thin(line: Series, limit: int = MAX_POINTS) -> Series:
    """At most `limit` points, the means of equal runs of them."""
    count = len(line.x)
    if count <= limit:
        return line
    edges = [i * count // limit for i in range(limit + 1)]
    runs = list(zip(edges[:-1], edges[1:], strict=True))
    return Series(line.name, [sum(line.x[a:b]) / (b - a) for a, b in runs], [sum(line.y[a:b]) / (b - a) for a, b in runs])


def tick_label(value: float) -> str:
    """A short number: 0.25, 30, 1.5k, 2M, 1e-5."""
    size = abs(value)
    if size != 0 and size < 0.001:
        mantissa, exponent = f"{value:.0e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= limit:
            return f"{value / limit:.4g}{unit}"
    return f"{value:.4g}"


class _Axis:
    """Values low..high -> positions from..to, linear or logarithmic."""

    def __init__(self, low: float, high: float, start: float, end: float, log: bool = False):
        self.low, self.high, self.start, self.end, self.log = low, high, start, end, log

    def __call__(self, value: float) -> float:
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        share = (value - low) / (high - low) if high > low else 0.5
        return self.start + share * (self.end - self.start)

    def ticks(self, count: int) -> list[float]:
        return log_ticks(self.low, self.high) if self.log else linear_ticks(self.low, self.high, count)


def linear_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round values in low..high: multiples of 1, 2 or 5 times a power of ten."""
    if high <= low:
        return [low]
    power = 10 ** math.floor(math.log10((high - low) / count))
    step = next(m * power for m in (1, 2, 5, 10) if (high - low) / (m * power) <= count)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    digits = max(0, -math.floor(math.log10(step)))
    return [round(i * step, digits) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten in low..high; the powers alone where that would be many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for multiples in ((1, 2, 5), (1, 3), (1,)):
        found = [float(f"{m}e{p}") for p in powers for m in multiples if low <= float(f"{m}e{p}") <= high]
        if len(found) <= 5:
            break
    return found or [low, high]


def _padded(low: float, high: float, log: bool) -> tuple[float, float]:
    if log:
        room = (high / low) ** 0.04
        return low / room, high * room
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return (0.0 if 0 <= low < room else low - room), high + room


def _clean(line: Series) -> Series:
    points = [(float(x), float(y)) for x, y in zip(line.x, line.y, strict=True) if math.isfinite(x) and math.isfinite(y)]
    return Series(line.name, [x for x, _ in points], [y for _, y in points])


def _path(line: Series, x_axis: _Axis, y_axis: _Axis) -> str:
    points = [f"{_n(x_axis(x))} {_n(y_axis(y))}" for x, y in zip(line.x, line.y, strict=True)]
    # A line of one point has no length; a tiny one shows as a dot, by its round caps.
    return "M" + "L".join(points if len(points) > 1 else [points[0], points[0]])


def _legend(names: Sequence[str]) -> str:
    # 5.4 units is about a letter's width at the legend's size.
    parts, x = [], float(LEFT)
    for number, name in enumerate(names):
        parts.append(f'<path class="line c{number % 6}" d="M{_n(x)} 25.5h12"/>')
        parts.append(f'<text class="tick" x="{_n(x + 16)}" y="29">{escape(name)}</text>')
        x += 34 + 5.4 * len(name)
    return "".join(parts)


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
