"""`Results` as a page: one HTML file that needs nothing else, in light and dark, for wide and narrow windows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

import omnifx
from omnifx import charts, timelines, verdicts
from omnifx.charts import Chart, Look, Plot
from omnifx.errors import ConfigError
from omnifx.page import template
from omnifx.results import Case, Family, Results, Row
from omnifx.sample_grids import Grid, data_uri, grid_of
from omnifx.timelines import Cell, Letter
from omnifx.verdicts import Verdict

MOST_PLANS = 8  # at a share; more are folded
_TICKS = 6  # timesteps written below the plans


@dataclass(frozen=True)
class PlanStrip:
    """A timeline: its row, its steps on the axis, and its letters with how often they occur."""

    row: Row
    cells: tuple[Cell, ...]
    counts: tuple[tuple[str, int], ...]

    @property
    def text(self) -> str:
        return ", ".join(f"{count} {letter}" for letter, count in self.counts)


@dataclass(frozen=True)
class PlanGroup:
    """Timelines that belong side by side."""

    title: str
    strips: tuple[PlanStrip, ...]


@dataclass(frozen=True)
class CaseView:
    """What the page says of a case."""

    case: Case
    verdicts: tuple[Verdict, ...]
    tally: str
    rivals: tuple[Family, ...]
    """The families that ours is compared with somewhere."""
    guarded: bool
    looks: dict[str, Look]
    groups: dict[str, list[Look]]
    """The looks by group, as the legend has them."""
    frontier: tuple[Plot, ...]
    over_time: tuple[Plot, ...]
    drift: tuple[Plot, ...]
    bands: tuple[Plot, ...]
    methods: dict[str, dict[float, Row]]
    """The best row of each method at each share."""
    plans: tuple[PlanGroup, ...]
    letters: dict[str, Letter]
    ticks: tuple[tuple[float, str], ...]
    """Places (a share of the width) and texts of the axis below the plans."""
    axis: str
    grid: Grid | None


def page_of(results: Results, samples: Mapping[str, Mapping[str, Tensor]] | None = None) -> str:
    """The page, as text. Whatever comes from the results is escaped.

    Args:
        results: What was found.
        samples: For each case, by its name, the samples of its rows by their keys; cases may be missing.

    Raises: ResultsError if samples of a case differ in shape.
    """
    views = [view_of(case, results, (samples or {}).get(case.name, {})) for case in results.cases]
    everything = [verdict for view in views for verdict in view.verdicts]
    return template("results.html.j2").render(
        results=results,
        views=views,
        tally=verdicts.tally_text(verdicts.tally(everything)),
        metric=verdicts.leading(results),
        version=omnifx.__version__,
        families=verdicts.FAMILIES,
        colours=charts.COLOURS,
        letters=list(timelines.LETTERS.values()),
        letter_class=_letter_class,
        outlines=OUTLINES,
        MOST_PLANS=MOST_PLANS,
        data_uri=data_uri,
        number_text=verdicts.number_text,
        value_text=verdicts.value_text,
        lead_text=verdicts.lead_text,
        share_text=verdicts.share_text,
        sentence=verdicts.sentence,
    )


def save_page(results: Results, samples: Mapping[str, Mapping[str, Tensor]], path: str | Path) -> Path:
    """Write the page; its folder must exist.

    Raises: ConfigError if the file cannot be written; ResultsError as `page_of`.
    """
    path, page = Path(path), page_of(results, samples)
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"the page {path} could not be written: {error.strerror}. Name a file.") from error
    return path


def view_of(case: Case, results: Results, samples: Mapping[str, Tensor]) -> CaseView:
    """Everything that the page says of a case."""
    found, looks = verdicts.verdicts_of(case, results), charts.looks_of(case)
    groups: dict[str, list[Look]] = {}
    for look in looks.values():
        groups.setdefault(look.group, []).append(look)
    plans, axis = plan_groups(case, results), timelines.axis_of(case)
    return CaseView(
        case=case,
        verdicts=found,
        tally=verdicts.tally_text(verdicts.tally(found)),
        rivals=tuple(family for family in verdicts.RIVALS if any(r.family == family for v in found for r in v.rivals)),
        guarded=any(verdict.guards for verdict in found),
        looks=looks,
        groups=groups,
        frontier=_plots(charts.frontier_charts(case, results)),
        over_time=_plots(charts.frontier_charts(case, results, "time")),
        drift=_plots(charts.drift_charts(case, results), together=True),
        bands=_plots(charts.band_charts(case, results), together=True),
        methods=best_rows(case, results),
        plans=plans,
        letters=timelines.letters_in([strip.row for group in plans for strip in group.strips]),
        ticks=_ticks(case, axis),
        axis="timestep" if axis else "step",
        grid=grid_of(case, samples),
    )


def best_rows(case: Case, results: Results) -> dict[str, dict[float, Row]]:
    """For each method, in the order of the legend, its best row at each share where it has one."""
    best = verdicts.best_at_shares(case, results)
    found = {
        method: {share: rows[method] for share, rows in best.items() if method in rows}
        for method in charts.looks_of(case)
    }
    return {method: rows for method, rows in found.items() if rows}


def plan_groups(case: Case, results: Results) -> tuple[PlanGroup, ...]:
    """Timelines of the best rows at each share, then of all other ways that have one."""
    axis, seen, groups = timelines.axis_of(case), set[int](), []
    for share, best in verdicts.best_at_shares(case, results).items():
        title = f"At {verdicts.share_text(share)} of the compute"
        groups.append(PlanGroup(title, _strips(case, axis, list(best.values()))))
        seen |= {id(row) for row in best.values()}
    others = [row for row in case.rows if id(row) not in seen and row.family != "uncached"]
    groups.append(PlanGroup("Others" if seen else "Plans", _strips(case, axis, others)))
    return tuple(group for group in groups if group.strips)


OUTLINES = {
    "circle": "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0Z",
    "square": "M-3.5-3.5h7v7h-7Z",
    "up": "M0-4.6L4.3 3.2h-8.6Z",
    "diamond": "M0-5L4.4 0L0 5L-4.4 0Z",
    "down": "M0 4.6L4.3-3.2h-8.6Z",
    "plus": "M-1.4-4.4h2.8v3h3v2.8h-3v3h-2.8v-3h-3v-2.8h3Z",
    "cross": "M-4-2.2L-2.2-4L0-1.8L2.2-4L4-2.2L1.8 0L4 2.2L2.2 4L0 1.8L-2.2 4L-4 2.2L-1.8 0Z",
}
"""Outlines of the marks of `charts.SHAPES`, around (0, 0), in pixels."""


def _strips(case: Case, axis: Sequence[float], rows: Sequence[Row]) -> tuple[PlanStrip, ...]:
    found = []
    for row in rows:
        if row.timeline is not None and row.timeline.steps:
            cells = timelines.cells_of(row.timeline, axis, case.steps)
            found.append(PlanStrip(row, cells, tuple(Counter(row.timeline.steps).most_common())))
    return tuple(found)


def _plots(found: Sequence[Chart], *, together: bool = False) -> tuple[Plot, ...]:
    return tuple(charts.plot_of(chart, found if together else ()) for chart in found)


def _ticks(case: Case, axis: Sequence[float]) -> tuple[tuple[float, str], ...]:
    stride = max(1, -(-case.steps // _TICKS))
    return tuple((i / case.steps, f"{axis[i]:.4g}" if axis else str(i + 1)) for i in range(0, case.steps, stride))


def _letter_class(letter: str) -> str:
    """A class name for a letter; unknown ones share a look."""
    known = list(timelines.LETTERS)
    return f"t{known.index(letter)}" if letter in known else "other"
