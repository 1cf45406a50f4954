"""Charts of a comparison as data, and where their parts lie: a page draws them as SVG, a document with matplotlib.

A method has one look in all charts of a case: its group has a colour, and its mark tells it from others of the group.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from matplotlib.ticker import LogLocator, MaxNLocator

from omnifx.results import Case, Metric, Results, Row, Value
from omnifx.verdicts import (
    FAMILIES,
    best_at_shares,
    leading,
    number_text,
    share_text,
    uncached_of,
    value_text,
)

Axis = Literal["compute", "time"]

SHAPES = ("circle", "square", "up", "diamond", "down", "plus", "cross")
"""Marks; beyond these a group goes on with hollow ones, and then begins again."""
COLOURS = {
    "ours": ("#cf4307", "#ff8f4d"),
    "policy": ("#0072b2", "#4fb0e8"),
    "solver": ("#5d6770", "#9aa5af"),
    "peer0": ("#00796b", "#45c2ae"),
    "peer1": ("#7b3fa0", "#c296e6"),
    "peer2": ("#b0307a", "#f07fbd"),
    "peer3": ("#806600", "#d9bd4a"),
}
"""Of groups, in light and in dark windows."""
_PEERS = 4
_STEPS = (1, 2, 2.5, 5, 10)  # between ticks
_LOG_FROM = 20.0
"""A metric that is better when lower is drawn on a logarithmic axis if its figures differ by so much."""
_DEEPEST = 1e-4
"""Errors so much smaller than the largest are rounding: lines go down to here."""
_ENOUGH, _FENCE = 8, 2.0
"""From so many marks on, those are outliers that lie so many times the middle half's range outside of it."""


@dataclass(frozen=True)
class Look:
    """How a method is drawn in every chart of its case."""

    method: str
    group: str
    colour: str
    """A key of `COLOURS`."""
    shape: str
    hollow: bool

    @property
    def ours(self) -> bool:
        return self.colour == "ours"


@dataclass(frozen=True)
class Mark:
    """A point of a line."""

    x: float
    y: float
    spread: float = 0.0
    title: str = ""
    joined: bool = True
    """Whether the line runs through it."""


@dataclass(frozen=True)
class Line:
    """What one method has in a chart."""

    look: Look
    marks: tuple[Mark, ...]
    title: str = ""


@dataclass(frozen=True)
class Chart:
    """Lines over two axes, and the uncached level where there is one."""

    title: str
    note: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    log: bool = False
    level: Value | None = None
    dots: bool = True
    """Whether marks are drawn at each point, or only at a line's end."""

    def numbers(self) -> list[float]:
        """What the y axis should hold: all figures with their spreads, but for outliers. Broken settings would leave no
        room for the others; those of ours, and the uncached level, are never left out."""
        scale: Callable[[float], float] = math.log if self.log else float
        shown = [mark.y for line in self.lines for mark in line.marks if mark.y > 0 or not self.log]
        low, high = -math.inf, math.inf
        if self.dots and len(shown) >= _ENOUGH:
            first, _, third = statistics.quantiles(map(scale, shown), n=4)
            low, high = first - _FENCE * (third - first), third + _FENCE * (third - first)
        ends = [
            (mark.y - mark.spread, mark.y, mark.y + mark.spread)
            for line in self.lines
            for mark in line.marks
            if (mark.y > 0 or not self.log) and (line.look.ours or low <= scale(mark.y) <= high)
        ]
        if self.level is not None:
            spread = self.level.spread or 0.0
            ends.append((self.level.mean - spread, self.level.mean, self.level.mean + spread))
        found = [y for three in ends for y in three if y > 0 or not self.log]
        if not self.dots:
            found = [max(y, _DEEPEST * max(found)) for y in found]
        return found


def looks_of(case: Case) -> dict[str, Look]:
    """A look for each method, ours first, then packages, solvers and other policies; methods of a group together."""
    order = {"ours": 0, "peer": 1, "solver": 2, "policy": 3}
    rows = [row for row in case.rows if row.family != "uncached"]
    groups: dict[str, dict[str, Row]] = {}
    for row in sorted(rows, key=lambda row: (order[row.family], _group_of(row))):
        groups.setdefault(_group_of(row), {}).setdefault(row.method, row)
    found, packages = {}, 0
    for group, methods in groups.items():
        family = next(iter(methods.values())).family
        colour = f"peer{packages % _PEERS}" if family == "peer" else family
        packages += family == "peer"
        for i, method in enumerate(methods):
            found[method] = Look(method, group, colour, SHAPES[i % len(SHAPES)], bool(i // len(SHAPES) % 2))
    return found


def frontier_charts(case: Case, results: Results, axis: Axis = "compute") -> list[Chart]:
    """A chart for each metric over the compute, or one of the leading metric over the measured time, which few rows
    have. A line runs through a method's best rows by the leading metric: those that none of its own beats at less cost.
    """
    metric = leading(results)
    shown = results.metrics if axis == "compute" else tuple(filter(None, (metric,)))
    charts = [_frontier_chart(case, each, metric or each, axis) for each in shown]
    return [chart for chart in charts if chart.lines]


def drift_charts(case: Case, results: Results) -> list[Chart]:
    """For each share, how far the latents of each method's best row are from the uncached ones, step by step."""
    return _at_shares(
        case,
        results,
        lambda row: [(case.steps * (i + 1) / len(row.drift), y) for i, y in enumerate(row.drift)],
        ("step of the uncached generation", "distance of the latents, over their norm", "after the last step"),
    )


def band_charts(case: Case, results: Results) -> list[Chart]:
    """For each share, the error of the samples of each method's best row by band of spatial frequency."""
    return _at_shares(
        case,
        results,
        lambda row: [((i + 0.5) / len(row.bands), y) for i, y in enumerate(row.bands)],
        ("spatial frequency, of the highest", "error over the amplitude there", "in the highest band"),
    )


def frontier(rows: Iterable[Row], metric: Metric, cost: Callable[[Row], float]) -> list[Row]:
    """The rows that no other one beats in both cost and metric, cheapest first."""
    sign = 1.0 if metric.better == "higher" else -1.0
    able = [row for row in rows if metric.name in row.metrics]
    found: list[Row] = []
    for row in sorted(able, key=lambda row: (cost(row), -sign * row.metrics[metric.name].mean)):
        if not found or sign * row.metrics[metric.name].mean > sign * found[-1].metrics[metric.name].mean:
            found.append(row)
    return found


@dataclass(frozen=True)
class Plot:
    """A chart with its place on a canvas: scales and ticks, in pixels."""

    chart: Chart
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    x_ticks: tuple[float, ...]
    y_ticks: tuple[float, ...]

    WIDTH = 400
    HEIGHT = 300
    LEFT, RIGHT, TOP, BOTTOM = 68, 12, 12, 42

    def x(self, value: float) -> float:
        low, high = self.x_range
        return round(self.LEFT + (value - low) / (high - low) * (self.WIDTH - self.LEFT - self.RIGHT), 1)

    def y(self, value: float) -> float:
        """Of a value; one beyond the axis lies on its end."""
        low, high = self.y_range
        scale: Callable[[float], float] = math.log10 if self.chart.log else float
        share = (scale(min(max(value, low), high)) - scale(low)) / (scale(high) - scale(low))
        return round(self.HEIGHT - self.BOTTOM - share * (self.HEIGHT - self.TOP - self.BOTTOM), 1)

    @property
    def beyond(self) -> int:
        """Marks that lie beyond the axis; points of lines without marks do not count."""
        low, high = self.y_range
        return self.chart.dots * sum(not low <= mark.y <= high for line in self.chart.lines for mark in line.marks)

    def path(self, line: Line) -> str:
        """The line through the marks that are joined."""
        points = [f"{self.x(mark.x):g} {self.y(mark.y):g}" for mark in line.marks if mark.joined]
        return "M" + "L".join(points)

    def x_text(self, tick: float) -> str:
        return f"{tick:g}"

    def y_text(self, tick: float) -> str:
        return f"{tick:g}" if tick == 0 or 1e-3 <= abs(tick) < 1e5 else f"{tick:.0e}".replace("e-0", "e-")


def plot_of(chart: Chart, like: Sequence[Chart] = ()) -> Plot:
    """Place a chart; its axes also hold what the charts of `like` show, so that they can be compared."""
    charts = [chart, *like]
    xs = [mark.x for each in charts for line in each.lines for mark in line.marks]
    ys = [y for each in charts for y in each.numbers()]
    x_low, x_high = min(xs), max(xs)
    pad = 0.04 * (x_high - x_low) or 0.05
    x_range = (max(0.0, x_low - pad), x_high + pad)
    y_low, y_high = min(ys, default=0.1), max(ys, default=1.0)
    if chart.log:
        y_range = (y_low / 1.15, y_high * 1.15)
        y_ticks = _log_ticks(*y_range)
    else:
        room = 0.05 * (y_high - y_low) or 0.05 * abs(y_high) or 0.05
        y_range = (y_low - room if y_low < 0 or y_low - room > 0 else 0.0, y_high + room)
        y_ticks = list(MaxNLocator(nbins=6, steps=_STEPS).tick_values(*y_range))
    x_ticks = list(MaxNLocator(nbins=7, steps=_STEPS).tick_values(*x_range))
    return Plot(chart, x_range, y_range, _inside(x_ticks, x_range), _inside(y_ticks, y_range))


def _log_ticks(low: float, high: float) -> list[float]:
    steps = (1.0,) if high / low > 200 else (1.0, 3.0) if high / low > 10 else (1.0, 2.0, 5.0)
    return list(LogLocator(subs=steps, numticks=12).tick_values(low, high))


def _inside(ticks: Iterable[float], ends: tuple[float, float]) -> tuple[float, ...]:
    return tuple(round(float(tick), 12) for tick in ticks if ends[0] <= tick <= ends[1])


def _group_of(row: Row) -> str:
    """What a legend puts a method under: of a peer the package, which is the first word of its name."""
    return row.method.split()[0].rstrip(":") if row.family == "peer" else FAMILIES[row.family]


def _frontier_chart(case: Case, metric: Metric, ranks: Metric, axis: Axis) -> Chart:
    cost: Callable[[Row], float] = (lambda r: r.compute) if axis == "compute" else (lambda r: r.time or 0.0)
    rows = [r for r in case.rows if r.family != "uncached" and metric.name in r.metrics]
    rows = [r for r in rows if axis == "compute" or r.time is not None]
    lines = []
    for method, look in looks_of(case).items():
        own = sorted((row for row in rows if row.method == method), key=cost)
        through = frontier(own, ranks, cost)
        marks = [_mark(row, metric, cost(row), joined=any(row is r for r in through)) for row in own]
        if marks:
            lines.append(Line(look, tuple(marks), method))
    uncached = uncached_of(case)
    level = uncached.metrics.get(metric.name) if uncached is not None else None
    means = [mark.y for line in lines for mark in line.marks]
    log = metric.better == "lower" and min(means, default=0.0) > 0 and max(means) > _LOG_FROM * min(means)
    note = f"{metric.better} is better"
    if metric.guard:
        note = f"a guard: it catches broken settings, and does not rank; {note}"
    over = "compute" if axis == "compute" else "time"
    return Chart(
        title=f"{metric.label} over {over}",
        note=note,
        x_label=f"{over}: share of the uncached {'FLOPs' if axis == 'compute' else 'time'}",
        y_label=metric.heading,
        lines=tuple(lines),
        log=log,
        level=level,
    )


def _mark(row: Row, metric: Metric, x: float, *, joined: bool) -> Mark:
    value = row.metrics[metric.name]
    figure = f"{metric.label} {value_text(value, metric)} {metric.unit}".rstrip()
    time = f", {row.time:.2f} of the time" if row.time is not None else ""
    title = f"{_name_of(row)}: {figure} at {share_text(row.compute)} of the compute{time}"
    return Mark(x, value.mean, value.spread or 0.0, title, joined)


def _name_of(row: Row) -> str:
    return f"{row.method}, {row.setting}" if row.setting else row.method


def _at_shares(
    case: Case, results: Results, points: Callable[[Row], list[tuple[float, float]]], labels: tuple[str, str, str]
) -> list[Chart]:
    """A chart for each share: the best row of each method there, where it has points to draw."""
    looks, charts = looks_of(case), []
    x_label, y_label, end = labels
    for share, best in best_at_shares(case, results).items():
        lines = []
        for method, row in best.items():
            marks = tuple(Mark(x, y) for x, y in points(row) if y > 0)
            if marks:
                title = f"{_name_of(row)}, {share_text(row.compute)} of the compute: {number_text(marks[-1].y)} {end}"
                lines.append(Line(looks[method], marks, title))
        if lines:
            title = f"At {share_text(share)} of the compute"
            charts.append(Chart(title, "lower is better", x_label, y_label, tuple(lines), log=True, dots=False))
    return charts
