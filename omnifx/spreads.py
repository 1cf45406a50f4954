"""Schedules of computed steps without a search: spread evenly or unevenly, and what lies near a schedule."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

Schedule = tuple[int, ...]
"""Computed steps in order; the first step, 0, is always one."""

POWERS = (0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5)
"""How unevenly: 1 is evenly, less is denser towards the end, more towards the start."""

MOST_AT_THE_END = 3
"""Up to how many last steps are computed in a row."""

MOVES = (-2, -1, 1, 2)
"""By how many steps one computed step is moved."""


def even(total: int, computed: int) -> Schedule:
    """The schedule of 1 <= `computed` <= `total` steps at the same distance, as nearly as can be."""
    return tuple(sorted({(2 * i * total + computed) // (2 * computed) for i in range(computed)}))


def spreads(total: int, computed: int) -> Iterator[Schedule]:
    """Schedules of two parameters: how many last steps are computed, and how unevenly the others lie before them."""
    found = {even(total, computed)}
    yield from found
    for last in range(min(MOST_AT_THE_END, computed - 1) + 1):
        rest, before = total - last, computed - last
        for power in POWERS:
            steps = tuple(round(rest * (i / before) ** power) for i in range(before))
            schedule = (*steps, *range(rest, total))
            if len(set(schedule)) == computed and schedule not in found and schedule[-1] < total:
                found.add(schedule)
                yield schedule


def nearby(schedule: Sequence[int], total: int, longest: int) -> Iterator[Schedule]:
    """Schedules with one computed step moved a little, and no more than `longest` steps in a row that are not."""
    for i, step in enumerate(schedule):
        for move in MOVES:
            moved = tuple(sorted((*schedule[:i], step + move, *schedule[i + 1 :])))
            allowed = step > 0 and 0 < step + move < total and len(set(moved)) == len(moved)
            if allowed and longest_gap(moved, total) <= longest:
                yield moved


def longest_gap(schedule: Sequence[int], total: int) -> int:
    """Most steps in a row that a schedule does not compute."""
    return max(b - a - 1 for a, b in zip(schedule, (*schedule[1:], total), strict=True))


__all__ = ["Schedule", "even", "longest_gap", "nearby", "spreads"]
