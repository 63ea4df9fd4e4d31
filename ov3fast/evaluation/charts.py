"""Line charts as SVG text: matplotlib draws them, the page's style sheet colours them, so they follow its light and dark themes."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

WIDTH, HEIGHT = 3.4, 2.1
"""In inches of 100 units; the page scales them."""
MAX_POINTS = 300

# Placeholder colours for the style sheet's variables: matplotlib writes them, and they are replaced in its output.
_SERIES = tuple(f"#00000{number}" for number in range(1, 7))
_INK, _SOFT, _RULE = "#0000a1", "#0000a2", "#0000a3"
_VARIABLES = {colour: f"var(--c{number})" for number, colour in enumerate(_SERIES)}
_VARIABLES |= {_INK: "var(--ink)", _SOFT: "var(--soft)", _RULE: "var(--rule)"}

_STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "ov3fast", "font.size": 7.5, "text.color": _INK, "axes.titlecolor": _INK,
    "axes.titlesize": 8.5, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.edgecolor": _SOFT, "axes.labelcolor": _SOFT,
    "axes.linewidth": 0.6, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.grid.axis": "y",
    "axes.grid.which": "major", "grid.color": _RULE, "grid.linewidth": 0.5, "xtick.color": _SOFT, "ytick.color": _SOFT,
    "xtick.major.width": 0.5, "ytick.major.width": 0.5, "legend.frameon": False, "legend.fontsize": 7, "lines.solid_capstyle": "round",
}  # fmt: skip


@dataclass(frozen=True)
class Series:
    """One line: its name in the legend and its points, x ascending. low, high: a band around it."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


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
    prefix: str = "",
) -> str:
    """A self-contained <svg> (no links, no scripts), deterministic; "" if no point is finite.

    Non-finite points are left out; log_y needs positive values, otherwise the axis stays linear. x_range: the axis limits, so that several
    charts are comparable; None: the data's own. smoothing: 0 draws only the points; otherwise the fraction of a series' length over which
    its values are averaged, drawn on top. prefix: for the ids, if a page has several charts with the same title.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

    series = [line for line in map(_finite, series) if line.x]
    if not series:
        return ""
    values = [y for line in series for y in line.y]
    log_y = log_y and min(values) > 0 and max(values) / min(values) > 5
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = figure.subplots()
        axes.set_title(title)
        if log_y:
            axes.set_yscale("log")
            decades = math.log10(max(values) / min(values))
            axes.yaxis.set_major_locator(
                LogLocator(subs=(1.0, 2.0, 5.0) if decades < 1.5 else (1.0, 3.0) if decades < 2.5 else (1.0,))
            )
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.set_xlabel(x_label, loc="right", labelpad=1)
        for colour, line in zip(_SERIES, series, strict=False):
            marker = "o" if len(line.x) == 1 else None  # a single point is not a line
            options = {"color": colour, "clip_on": False, "marker": marker, "markersize": 2}
            smooth = smoothing > 0 and len(line.x) > 4
            x, y = thin(line.x), thin(line.y)
            axes.plot(x, y, linewidth=0.7 if smooth else 1.2, alpha=0.3 if smooth else 1, label=line.name, **options)
            if line.low:
                axes.fill_between(x, thin(line.low), thin(line.high), color=colour, alpha=0.18, linewidth=0)
            if smooth:
                mean = thin(smoothed(line.y, max(1, round(smoothing * len(line.y)))))
                axes.plot(x, mean, linewidth=1.2, **options)
        low, high = x_range or (min(line.x[0] for line in series), max(line.x[-1] for line in series))
        axes.set_xlim(low, high if high > low else low + 1)
        for boundary in boundaries:
            if low <= boundary.x <= high:
                axes.axvline(boundary.x, color=_SOFT, linewidth=0.6, linestyle=(0, (3, 3)), clip_on=False)
                axes.annotate(boundary.name, (boundary.x, 1), (2, -6), xycoords=("data", "axes fraction"), textcoords="offset points",
                              color=_SOFT, fontsize=6.5)  # fmt: skip
        if len(series) > 1:
            legend = figure.legend(loc="outside lower left", ncols=len(series), borderpad=0, handlelength=1.2)
            for handle in legend.get_lines():
                handle.set_alpha(1)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    label = escape(f"{title} over {x_label}{', logarithmic' if log_y else ''}", quote=True)
    return _inline(buffer.getvalue(), label, prefix="".join(c for c in prefix + title if c.isalnum()))


def smoothed(values: Sequence[float], window: int) -> np.ndarray:
    """Centred moving average; the window shrinks at the ends instead of padding."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    reach = np.minimum(window // 2, np.minimum(index, len(values) - 1 - index))
    return (total[index + reach + 1] - total[index - reach]) / (2 * reach + 1)


def thin(values: Sequence[float], limit: int = MAX_POINTS) -> np.ndarray:
    """At most `limit` values: the means of consecutive runs of equal length."""
    values = np.asarray(values, np.float64)
    if len(values) <= limit:
        return values
    edges = np.arange(limit + 1) * len(values) // limit
    return np.add.reduceat(values, edges[:-1]) / np.diff(edges)


def _finite(line: Series) -> Series:
    columns = [line.x, line.y, *((line.low, line.high) if line.low else ())]
    points = [[float(value) for value in point] for point in zip(*columns, strict=True) if all(map(math.isfinite, point))]
    return Series(line.name, *([point[i] for point in points] for i in range(len(columns))))


def _inline(svg: str, label: str, prefix: str) -> str:
    """matplotlib's document as an inline element: no header, metadata or namespaces, unique ids, the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    box = re.search(r'viewBox="([^"]*)"', svg)[1]
    svg = re.sub(r"^<svg[^>]*>", f'<svg class="chart" viewBox="{box}" role="img" aria-label="{label}">', svg)
    svg = svg.replace("xlink:href", "href").replace('id="', f'id="{prefix}-').replace('href="#', f'href="#{prefix}-')
    svg = re.sub(r' clip-path="url\(#[^"]*"', "", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    return re.sub(r"\n\s*", "\n", svg).strip()
