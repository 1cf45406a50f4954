"""The clock: what it reads of a call, and when it takes two calls for steps of one stream."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from omnifx.clock import NUM_SAMPLES, Reader, Reading, Timeline, Watched, largest_move, mark, marked_for
from omnifx.graph import Inputs
from tests.toys import noise

INPUTS = Inputs(latents=0, small=(1, 2), large=(3,), static=(4,), names=("x", "t", "y", "text", "weight"))
TIMELINE = Timeline(timesteps=(981.0, 500.0, 1.0), moves=(0.0, 0.1, 0.1), time_inputs=(0,), varying_inputs=())


def read(x: Tensor, t: float = 500.0, y: int = 3, text: Tensor | None = None) -> Reading:
    given = noise(1, 5, 8) if text is None else text
    return Reader(INPUTS).read([x, torch.tensor([t]), torch.tensor([y]), given, torch.zeros(3)])


# -- reading -----------------------------------------------------------------------------------------------------------


def test_a_reading_holds_small_values_shapes_and_a_sample_of_the_latents() -> None:
    reading = read(noise(1, 4, 16, 16))

    assert reading.small == ((500.0,), (3.0,))
    assert len(reading.sample) == NUM_SAMPLES
    assert reading.shapes == ((1,), (1,), (1, 5, 8), (1, 4, 16, 16))
    assert reading.finite


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_value_that_is_not_finite_is_seen_wherever_it_is(value: float) -> None:
    x = noise(1, 4, 32, 32)
    x[0, 3, 31, 30] = value

    assert not read(x).finite


def test_plain_numbers_are_small_inputs_too() -> None:
    reading = Reader(INPUTS).read([noise(1, 4), 7, 2.5, noise(1, 5, 8), torch.zeros(3)])

    assert reading.small == ((7.0,), (2.5,))


def test_complex_small_inputs_are_read_with_both_parts() -> None:
    turns = torch.polar(torch.ones(3), torch.tensor([0.0, 1.0, 2.0]))

    one, other = (
        Reader(INPUTS).read([noise(1, 4), torch.tensor([1.0]), value, noise(1, 5, 8), torch.zeros(3)])
        for value in (turns, turns.conj())
    )

    assert len(one.small[1]) == 6
    assert one.small != other.small


@given(st.floats(0.01, 2.0), st.integers(0, 50))
def test_moves_are_relative_to_the_latents_before(share: float, seed: int) -> None:
    x = noise(1, 4, 4, 4, seed=seed)

    assert read(x * (1 + share)).moved_from(read(x)) == pytest.approx(share, rel=1e-4)
    assert read(x).moved_from(read(torch.zeros_like(x))) == float("inf")


# -- watching large inputs ---------------------------------------------------------------------------------------------


def test_the_same_tensor_unchanged_is_the_same() -> None:
    text = noise(1, 5, 8)

    assert Watched.of(text).same(Watched.of(text))


def test_a_tensor_overwritten_in_place_is_another_one() -> None:
    text = noise(1, 5, 8)
    before = Watched.of(text)
    text.mul_(2)

    assert not Watched.of(text).same(before)
    assert not before.same(Watched.of(noise(1, 5, 8)))  # nor may its old content be compared: it is gone


def test_equal_content_in_other_memory_is_the_same() -> None:
    text = noise(1, 5, 8)

    assert Watched.of(text).same(Watched.of(text.clone()))
    assert not Watched.of(text).same(Watched.of(text + 1e-6))


@pytest.mark.parametrize("other", [noise(1, 5, 9), noise(1, 5, 8).double(), 3, None])
def test_other_shapes_and_types_are_not_the_same(other: object) -> None:
    assert not Watched.of(noise(1, 5, 8)).same(Watched.of(other))


def test_tensors_that_count_no_versions_are_told_by_their_content() -> None:
    with torch.inference_mode():
        text = noise(1, 5, 8).clone()
        before = Watched.of(text)
        assert Watched.of(text).same(before)
        text.mul_(2)

        assert not Watched.of(text).same(before)


# -- the timeline ------------------------------------------------------------------------------------------------------


def test_a_step_is_told_by_its_timestep() -> None:
    reading = read(noise(1, 4), t=500.0)

    assert [TIMELINE.expects(step, reading) for step in (-1, 0, 1, 2, 3)] == [False, False, True, False, False]
    assert TIMELINE.expects(1, read(noise(1, 4), t=500.0001))  # rounding
    assert not TIMELINE.expects(1, read(noise(1, 4), t=500.1))


def test_streams_are_told_by_all_that_does_not_change_with_the_steps() -> None:
    x, text = noise(1, 4), noise(1, 5, 8)
    one = read(x, text=text)

    assert TIMELINE.same_stream(one, read(noise(1, 4, seed=9), t=1.0, text=text))
    assert not TIMELINE.same_stream(one, read(x, y=4, text=text))
    assert not TIMELINE.same_stream(one, read(x, text=text + 1))
    assert not TIMELINE.same_stream(one, read(noise(2, 4), text=text))


def test_inputs_known_to_vary_tell_no_streams() -> None:
    varying = Timeline(timesteps=(1.0,), moves=(0.0,), time_inputs=(0,), varying_inputs=(0,))

    assert varying.same_stream(read(noise(1, 4)), read(noise(1, 4), text=noise(1, 5, 8, seed=3)))


@given(st.floats(0.0, 1.0))
def test_a_step_may_move_more_than_calibrated_but_unrelated_latents_are_too_far(expected: float) -> None:
    bound = largest_move(expected)

    assert bound > expected
    assert bound < 1.4 or expected > 0.9  # unrelated latents of equal norm lie sqrt(2) apart


# -- marks -------------------------------------------------------------------------------------------------------------


def test_marks_nest_and_belong_to_their_owner() -> None:
    one, two = object(), object()
    assert marked_for(one) is None

    with mark(one, 5) as outer, mark(two, None) as other, mark(one, None) as inner:
        assert marked_for(one) is inner
        assert marked_for(two) is other
        assert inner is not outer

    assert marked_for(one) is marked_for(two) is None


def test_a_mark_ends_with_its_block_even_after_an_error() -> None:
    owner = object()
    with pytest.raises(RuntimeError, match="stop"), mark(owner, None):
        raise RuntimeError("stop")

    assert marked_for(owner) is None


def test_a_thread_does_not_see_the_marks_of_another() -> None:
    owner, seen = object(), []
    with mark(owner, None):
        thread = threading.Thread(target=lambda: seen.append(marked_for(owner)))
        thread.start()
        thread.join()

    assert seen == [None]
