"""`Results` as pictures for documents: the charts, plans and samples of the page, drawn with matplotlib on white."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

from omnifx import charts, timelines, verdicts
from omnifx.charts import COLOURS, Line, Look, Plot, plot_of
from omnifx.errors import ConfigError
from omnifx.pictures import save_figure
from omnifx.results import Case, Results, Row
from omnifx.sample_grids import Grid, grid_of

_COLUMNS = 3
_CHART = (4.6, 3.5)  # inches
_LEGEND = 2.6
_DPI = 90  # documents hold many of these
_MARKERS = {"circle": "o", "square": "s", "up": "^", "diamond": "D", "down": "v", "plus": "P", "cross": "X"}
_INK, _PALE = "#222222", "#8a8a8a"

Drawing = Callable[[], Figure]


def drawings_of(case: Case, results: Results, samples: Mapping[str, Tensor]) -> dict[str, Drawing]:
    """What can be drawn of a case, by name: "frontier", "error", "plans", "samples"; each is drawn when called."""
    over_compute = charts.frontier_charts(case, results) + charts.frontier_charts(case, results, "time")
    drift, bands = charts.drift_charts(case, results), charts.band_charts(case, results)
    plans, grid = _plans(case, results), grid_of(case, samples)
    error = [plot_of(chart, group) for group in (drift, bands) for chart in group]
    titles = ["distance of the latents by step"] * len(drift) + ["error by frequency"] * len(bands)
    found: dict[str, Drawing] = {}
    if over_compute:
        found["frontier"] = partial(_charts_figure, case, [plot_of(chart) for chart in over_compute])
    if error:
        columns = max(len(drift), len(bands))
        found["error"] = partial(_charts_figure, case, error, columns=columns, titles=titles)
    if plans:
        found["plans"] = partial(_plans_figure, case, plans)
    if grid is not None:
        found["samples"] = partial(_samples_figure, case, grid)
    return found


def figure_name(case: Case, drawing: str) -> str:
    """The file that a drawing of a case is kept in."""
    return f"{case.name}-{drawing}.png"


def save_figures(results: Results, samples: Mapping[str, Mapping[str, Tensor]], folder: str | Path) -> list[Path]:
    """Draw all cases into a folder, which is made if it is not there: ``<case>-<drawing>.png``.

    Raises: ConfigError if the folder cannot be made, or a picture not be written; ResultsError as `grid_of`.
    """
    into = Path(folder)
    try:
        into.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"the folder {into} could not be made: {error.strerror}. Name another.") from error
    return [
        save_figure(draw(), into / figure_name(case, name), dpi=_DPI)
        for case in results.cases
        for name, draw in drawings_of(case, results, samples.get(case.name, {})).items()
    ]


def _charts_figure(case: Case, plots: Sequence[Plot], *, columns: int = _COLUMNS, titles: Sequence[str] = ()) -> Figure:
    columns = min(columns, len(plots))
    rows = -(-len(plots) // columns)
    figure = _figure(columns * _CHART[0] + _LEGEND, rows * _CHART[1] + 0.4)
    for i, plot in enumerate(plots):
        axes = figure.add_subplot(rows, columns, i + 1)
        _draw(axes, plot)
        chart = plot.chart
        if titles:
            axes.set_title(f"{chart.title}: {titles[i]}", fontsize=10.5, color=_INK)
        else:
            guard = ", a guard" if chart.note.startswith("a guard") else ""
            axes.set_title(_literal(f"{chart.title}{guard}"), fontsize=11, color=_INK)
    figure.suptitle(_literal(f"{case.title}: {case.sampler}, {case.steps} steps uncached"), fontsize=13, color=_INK)
    figure.legend(handles=_handles(charts.looks_of(case)), loc="outside right upper", frameon=False, fontsize=9.5)
    return figure


def _draw(axes: Axes, plot: Plot) -> None:
    chart, (low, high) = plot.chart, plot.y_range
    if chart.level is not None:
        spread = chart.level.spread or 0.0
        axes.axhspan(chart.level.mean - spread, chart.level.mean + spread, color=_PALE, alpha=0.25, lw=0)
        axes.axhline(chart.level.mean, color=_PALE, ls="--", lw=1.0)
        axes.annotate("uncached", (1.0, chart.level.mean), xycoords=("axes fraction", "data"), ha="right", va="bottom")
    for line in reversed(chart.lines):
        _draw_line(axes, line, dots=chart.dots, ends=(low, high))
    if chart.log:
        axes.set_yscale("log")
    axes.set_ylim(low, high)
    axes.set_yticks(plot.y_ticks, labels=[plot.y_text(tick) for tick in plot.y_ticks])
    axes.set_yticks([], minor=True)
    axes.set_xlabel(chart.x_label, color=_INK)
    axes.set_ylabel(_literal(chart.y_label), color=_INK)
    axes.grid(axis="y", color="#e4e4e4", lw=0.8)
    axes.set_axisbelow(True)
    for side in ("right", "top"):
        axes.spines[side].set_visible(False)


def _draw_line(axes: Axes, line: Line, *, dots: bool, ends: tuple[float, float]) -> None:
    look, style = line.look, _style(line.look)
    points = [(mark.x, min(max(mark.y, ends[0]), ends[1]), mark) for mark in line.marks]
    joined = [(x, y) for x, y, mark in points if mark.joined]
    axes.plot(*zip(*joined, strict=True), color=style["color"], lw=2.6 if look.ours else 1.1, ls=style["ls"])
    drawn = points if dots else points[-1:]
    for x, y, mark in drawn:
        if mark.spread:
            axes.errorbar(x, mark.y, yerr=mark.spread, color=style["color"], lw=0.9, alpha=0.6)
        alpha = 1.0 if mark.joined else 0.4
        axes.plot(x, y, alpha=alpha, zorder=4 if look.ours else 3, clip_on=False, **{**style, "ls": ""})


def _style(look: Look) -> dict[str, Any]:
    colour = COLOURS[look.colour][0]
    return {
        "color": colour,
        "marker": _MARKERS[look.shape],
        "ms": 6 if look.ours else 5,
        "mfc": "white" if look.hollow else colour,
        "mec": colour if look.hollow else "white",
        "mew": 1.2 if look.hollow else 0.5,
        "ls": "--" if look.colour == "solver" else "-",
    }


def _handles(looks: Mapping[str, Look]) -> list[Any]:
    """A legend's entries: groups as headings, their methods below."""
    handles: list[Any] = []
    for group in dict.fromkeys(look.group for look in looks.values()):
        handles.append(Line2D([], [], ls="", label=_literal(f"{group}:")))
        own = [look for look in looks.values() if look.group == group]
        handles += [
            Line2D([], [], label=_literal(look.method.removeprefix(f"{group} ")), **_style(look)) for look in own
        ]
    return handles


def _plans(case: Case, results: Results) -> list[tuple[str, Row]]:
    """At each share ours and the best of each other family, where they have timelines, with what to call them."""
    found: dict[int, tuple[str, Row]] = {}
    for verdict in verdicts.verdicts_of(case, results):
        for row in (verdict.ours, *(rival.row for rival in verdict.rivals)):
            if row is not None and row.timeline is not None and row.timeline.steps:
                found.setdefault(id(row), (f"{row.method} ({verdicts.share_text(row.compute)})", row))
    return list(found.values())


def _plans_figure(case: Case, plans: Sequence[tuple[str, Row]]) -> Figure:
    figure = _figure(12.0, 0.34 * len(plans) + 1.5)
    axes, axis = figure.add_subplot(), timelines.axis_of(case)
    letters = timelines.letters_in([row for _, row in plans])
    boxes: dict[str, list[Rectangle]] = {letter: [] for letter in letters}
    for i, (_, row) in enumerate(plans):
        for cell in timelines.cells_of(row.timeline, axis, case.steps) if row.timeline is not None else ():
            size = 0.8 * letters[cell.letter].height
            boxes[cell.letter].append(Rectangle((cell.start, i + 0.4 - size), cell.end - cell.start, size))
    for letter, own in boxes.items():
        axes.add_collection(PatchCollection(own, facecolor=letters[letter].light, edgecolor="white", linewidth=0.7))
    axes.set_xlim(0, case.steps)
    axes.set_ylim(len(plans) - 0.45, -0.55)
    axes.set_yticks(range(len(plans)), labels=[_literal(name) for name, _ in plans], fontsize=9.5)
    axes.tick_params(axis="y", length=0)
    at = range(0, case.steps, max(1, -(-case.steps // 10)))
    axes.set_xticks(list(at), labels=[f"{axis[i]:.4g}" if axis else str(i + 1) for i in at])
    axes.set_xlabel("timestep" if axis else "step", color=_INK)
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    handles = [Patch(facecolor=look.light, label=f"{letter}  {look.label}") for letter, look in letters.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 3), frameon=False, fontsize=9.5)
    figure.suptitle(_literal(f"{case.title}: plans (share of the compute)"), fontsize=13, color=_INK)
    return figure


def _samples_figure(case: Case, grid: Grid) -> Figure:
    least = min((row.target for row in case.rows if row.target is not None), default=None)
    strips = [strip for strip in grid.strips if strip.row.target in (None, least)]  # the page shows all
    count, (height, width) = len(strips), strips[0].samples.shape[:2]
    figure = _figure(12.0, count * (5.4 * height / width + 0.34) + 0.6)
    for i, strip in enumerate(strips):
        row = strip.row
        name = "uncached" if row.family == "uncached" else f"{row.method} ({verdicts.share_text(row.compute)})"
        sides = [(strip.samples, name), (strip.difference, f"difference from uncached, amplified {grid.factor}x")]
        for k, (picture, title) in enumerate(sides):
            if picture is None:
                continue
            axes = figure.add_subplot(count, 2, 2 * i + k + 1)
            axes.imshow(picture, interpolation="nearest")
            axes.set_title(_literal(title), fontsize=9.5, color=_INK, loc="left")
            axes.set_axis_off()
    figure.suptitle(_literal(f"{case.title}: samples of the same seeds"), fontsize=13, color=_INK)
    return figure


def _literal(text: str) -> str:
    """A text without matplotlib's formulas."""
    return text.replace("$", r"\$")


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
