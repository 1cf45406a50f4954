"""Following: which step of which stream a call is, told without a profile."""

from __future__ import annotations

import math

import pytest

from omnifx.clock import Marked, Reading
from omnifx.following import Following
from omnifx.runlog import Log
from omnifx.store import CacheStore


def reading(time: float, place: float, label: float = 3.0, *, shape: tuple[int, ...] = (1, 4)) -> Reading:
    """A call at a timestep, with latents at a place on a circle."""
    return Reading(
        small=((time,), (label,)),
        large=(),
        sample=(math.cos(place), math.sin(place), 1.0),
        finite=True,
        shapes=((1,), (1,), shape),
    )


def following() -> Following:
    return Following(CacheStore(1000), Log())


def begin(streams: Following, first: Reading, mark: Marked | None = None) -> int:
    return streams.begin(first, mark, None, num_bytes=10).key


def test_a_step_follows_if_time_and_latents_moved() -> None:
    streams = following()
    key = begin(streams, reading(9, 0.0))

    found, doubt = streams.proceed(reading(8, 0.1), None)

    assert found is not None
    assert (found.key, found.step, doubt) == (key, 1, "")


@pytest.mark.parametrize(
    "call",
    [
        reading(8, 0.1, shape=(2, 4)),
        reading(8, 3.1),  # unrelated latents
        reading(8, 0.0),  # the same latents
        reading(9, 0.1),  # the same time
    ],
    ids=["another shape", "far", "same latents", "same time"],
)
def test_what_is_no_next_step(call: Reading) -> None:
    streams = following()
    begin(streams, reading(9, 0.0))

    assert streams.proceed(call, None) == (None, "")


def test_time_keeps_its_direction_and_what_is_constant_stays() -> None:
    streams = following()
    begin(streams, reading(9, 0.0))
    streams.proceed(reading(8, 0.1), None)

    assert streams.proceed(reading(8.5, 0.2), None)[0] is None
    assert streams.proceed(reading(7, 0.2, label=4), None)[0] is None
    assert streams.proceed(reading(7, 0.2), None)[0] is not None


def test_streams_of_one_generation_are_told_apart_by_what_differs() -> None:
    streams = following()
    first, second = begin(streams, reading(9, 0.0)), begin(streams, reading(9, 0.0, label=0))

    found = [streams.proceed(reading(8, 0.1, label=label), None)[0] for label in (3, 0)]

    assert [stream.key for stream in found if stream is not None] == [first, second]
    assert len(streams.log.generations) == 1
    assert [stream.number for stream in streams] == [0, 1]


def test_generations_that_fit_alike_are_in_doubt_until_they_are_marked() -> None:
    streams = following()
    begin(streams, reading(9, 0.0))
    begin(streams, reading(9, 0.3))
    marks = [Marked(i, None, None, None) for i in range(2)]
    marked = [begin(streams, reading(9, 0.3 * i), mark) for i, mark in enumerate(marks)]

    assert "two generations" in streams.proceed(reading(8, 0.15), None)[1]
    for mark, key in zip(marks, marked, strict=True):
        found, doubt = streams.proceed(reading(8, 2.5), mark)  # however far
        assert found is not None
        assert (found.key, doubt) == (key, "")


def test_a_stream_ends_when_its_inputs_begin_again() -> None:
    streams = following()
    old = begin(streams, reading(9, 0.0))
    streams.proceed(reading(8, 0.1), None)

    new = begin(streams, reading(9, 2.0))

    assert [stream.key for stream in streams] == [new]
    assert not streams.store.holds(old)


def test_abandoned_streams_are_forgotten() -> None:
    streams = following()
    old = begin(streams, reading(9, 0.0))
    streams.proceed(reading(8, 0.1), None)
    for k in range(72):
        label = 10 + k // 12
        call = reading(20 - k % 12, 0.1 * (k % 12), label=label)
        if streams.proceed(call, None)[0] is None:
            begin(streams, call)

    assert old not in [stream.key for stream in streams]
