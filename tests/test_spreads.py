"""Simple spreads of computed steps, and what lies near a schedule."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from omnifx.spreads import MOST_AT_THE_END, MOVES, even, longest_gap, nearby, spreads


@given(total=st.integers(1, 80), data=st.data())
def test_spreads_are_schedules_of_so_many_steps(total: int, data: st.DataObject) -> None:
    computed = data.draw(st.integers(1, total))

    found = list(spreads(total, computed))

    assert found[0] == even(total, computed)
    assert len(set(found)) == len(found)
    for schedule in found:
        assert schedule[0] == 0
        assert len(schedule) == computed
        assert list(schedule) == sorted(set(schedule))
        assert schedule[-1] < total


@given(total=st.integers(1, 80), data=st.data())
def test_an_even_spread_has_gaps_of_two_lengths_at_most(total: int, data: st.DataObject) -> None:
    schedule = even(total, data.draw(st.integers(1, total)))

    gaps = {b - a for a, b in zip(schedule, (*schedule[1:], total), strict=True)}
    assert max(gaps) - min(gaps) <= 1


def test_some_spreads_are_dense_at_the_end_and_some_at_the_start() -> None:
    found = list(spreads(40, 10))
    middle = [sum(schedule) / len(schedule) for schedule in found]
    assert min(middle) < sum(even(40, 10)) / 10 < max(middle)
    assert any(schedule[-MOST_AT_THE_END:] == (37, 38, 39) for schedule in found)


@given(total=st.integers(2, 40), data=st.data())
def test_what_is_near_differs_by_one_step_moved_a_little(total: int, data: st.DataObject) -> None:
    schedule = even(total, data.draw(st.integers(1, total)))
    longest = data.draw(st.integers(0, total))

    for found in nearby(schedule, total, longest):
        left, came = set(schedule) - set(found), set(found) - set(schedule)
        assert len(left) == len(came) == 1
        assert came.pop() - left.pop() in MOVES
        assert found[0] == 0
        assert longest_gap(found, total) <= longest


def test_the_longest_gap_is_of_steps_that_are_not_computed() -> None:
    assert longest_gap((0, 1, 2), 3) == 0
    assert longest_gap((0, 3, 4), 8) == 3
    assert longest_gap((0,), 5) == 4
