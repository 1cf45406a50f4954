"""Plans side by side: what each step of each way ran, on one axis of timesteps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from omnifx.results import Case, Row, Timeline


@dataclass(frozen=True)
class Letter:
    """How a letter of `Plan.timeline` is drawn: higher means that more was computed, so colour is not the only sign."""

    label: str
    height: float
    light: str
    dark: str
    """Colours, in light and in dark windows."""


LETTERS = {
    "F": Letter("full: everything computed", 1.0, "#0072b2", "#3d9bd4"),
    "m": Letter("some branches computed, others reused", 0.8, "#b0307a", "#f07fbd"),
    "t": Letter("some tokens computed", 0.7, "#7b3fa0", "#c296e6"),
    "r": Letter("reuse", 0.5, "#e69f00", "#f0b429"),
    "c": Letter("reuse, output corrected", 0.5, "#009e73", "#3fc79d"),
    "p": Letter("prediction from stored values", 0.5, "#56b4e9", "#9bd6f7"),
    "C": Letter("prediction, output corrected", 0.5, "#2f7f79", "#6fb8b1"),
    "a": Letter("reuse, combined with older outputs", 0.5, "#d55e00", "#ff8f4d"),
    "s": Letter("skipped: older outputs combined", 0.25, "#b8a400", "#f0e442"),
}
OTHER = Letter("other", 0.6, "#808080", "#9a9a9a")


@dataclass(frozen=True)
class Cell:
    """A step: its letter, and where it lies on the axis, in steps of the uncached generation."""

    letter: str
    start: float
    end: float


def axis_of(case: Case) -> Sequence[float]:
    """Timesteps of the uncached generation; empty if no row of that many steps tells them."""
    order = sorted(case.rows, key=lambda row: row.family != "uncached")
    found = (row.timeline.timesteps for row in order if row.timeline is not None)
    return next((steps for steps in found if len(steps) == case.steps and _falls(steps)), ())


def cells_of(timeline: Timeline, axis: Sequence[float], steps: int) -> tuple[Cell, ...]:
    """The steps of a timeline on an axis from 0 to `steps`.

    Where timesteps are known, a step begins where its timestep lies among those of `axis`, and lasts until the next
    one; otherwise all steps are equally long.
    """
    number = len(timeline.steps)
    known = len(timeline.timesteps) == number and len(axis) == steps and _falls(timeline.timesteps)
    if known:
        starts = [_place(timestep, axis) for timestep in timeline.timesteps]
        starts[:1] = [0.0]
    else:
        starts = [steps * i / number for i in range(number)]
    ends = [*starts[1:], float(steps)]
    return tuple(Cell(*cell) for cell in zip(timeline.steps, starts, ends, strict=True))


def letters_in(rows: Sequence[Row]) -> dict[str, Letter]:
    """The letters that these rows have, in the order of `LETTERS`."""
    seen = {letter for row in rows if row.timeline is not None for letter in row.timeline.steps}
    known = {letter: look for letter, look in LETTERS.items() if letter in seen}
    return known | dict.fromkeys(sorted(seen - set(LETTERS)), OTHER)


def _falls(timesteps: Sequence[float]) -> bool:
    return all(a > b for a, b in pairwise(timesteps))


def _place(timestep: float, axis: Sequence[float]) -> float:
    """Where a timestep lies among falling ones, in steps; linear in between and beyond the last."""
    for i, (high, low) in enumerate(pairwise(axis)):
        if timestep >= low:
            return max(0.0, i + (high - timestep) / (high - low))
    return float(len(axis) - 1)
